"""Prepared shards (data/shards.py): documents that `data prepare` tokenized, any of which can be read at once."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from swamla_titan.config.sections import Data
from swamla_titan.data.document import Document, Position, Source
from swamla_titan.data.faults import DataFault, cut_short, readable, refused
from swamla_titan.data.retry import Retry
from swamla_titan.data.shards import INDEX, RECORD, UNPACK, Manifest, new_digest, prepared, read_manifest, shard_name
from swamla_titan.data.sources.files import is_url
from swamla_titan.data.sources.folder import special_kind
from swamla_titan.errors import UserError

_VERIFIED = 256  # documents that are verified when shards are opened, and at least one of each shard
_SCANNED = 1 << 17  # records of the index that are read together
_OPEN_FILES = 256  # of a process
_AGAIN = "Put the folder back as it was prepared, or prepare it again"


class _File:
    """An open file, which is read by position; closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self._path, self._descriptor = path, -1
        with readable(path):
            # Not mapped into memory, because a read beyond the end of a truncated file would kill the process.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self, offset: int, size: int, ordinal: int) -> bytes:
        """Read for document `ordinal`."""
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise refused(self._path, f"document {ordinal}", error) from error
        if len(content) < size:  # at most 2 GiB are read at once
            if not content:
                raise cut_short(self._path, f"document {ordinal}")
            content += self.read(offset + len(content), size - len(content), ordinal)
        return content

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


_opened = lru_cache(_OPEN_FILES)(_File)


@dataclass(frozen=True)
class Shard:
    """A shard, a unit: documents [first, first + num_documents) of the index."""

    path: str
    index: str
    first: int
    num_documents: int
    tokens: int
    dtype: np.dtype[Any]

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        start = position["ordinal"] if position else 0
        for ordinal in range(start + (offset - start) % every, self.num_documents, every):
            yield self._document(ordinal)

    def _document(self, ordinal: int) -> Document:
        size, width = RECORD.itemsize, self.dtype.itemsize
        before = 1 if ordinal else 0  # the record before it says where the document begins
        records = _opened(self.index).read((self.first + ordinal - before) * size, (1 + before) * size, ordinal)
        start: int = UNPACK(records)[0] if ordinal else 0
        record = UNPACK(records, before * size)
        if not start < record[0] <= self.tokens:
            raise DataFault(self.index, f"document {self.first + ordinal}", "it lies outside of its shard", _AGAIN)
        tokens = _opened(self.path).read(start * width, (record[0] - start) * width, ordinal)
        try:
            found, replaced = prepared(tokens, record, self.dtype)
        except ValueError as error:
            raise DataFault(self.path, f"document {ordinal}", str(error), _AGAIN, may_pass=True) from error
        return Document("", ordinal, {"ordinal": ordinal + 1}, replaced, found)


class ShardIndex:
    """The index of a folder of shards, see `Index`."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._path, self._tokenizer, self._digest = os.path.join(folder, INDEX), manifest.tokenizer, manifest.index
        self.starts = np.cumsum([0, *(shard.documents for shard in manifest.shards)])

    def scan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Number of tokens and `text_hash` of all documents; at the end DataFault if the file was changed."""
        digest = new_digest()
        for first, end in zip(self.starts.tolist(), self.starts[1:].tolist()):
            before = 0
            for start in range(first, end, _SCANNED):
                records = self._records(start, min(end, start + _SCANNED))
                digest.update(records.tobytes())
                counts = np.diff(records["end"].astype(np.int64), prepend=before)
                before = int(records["end"][-1])
                yield counts, records["hash"]
        if digest.hexdigest() != self._digest:
            raise DataFault(self._path, "", "it is not what was prepared: its digest differs", _AGAIN)

    def _records(self, first: int, end: int) -> np.ndarray:
        """The records [first, end), of RECORD."""
        size = RECORD.itemsize
        return np.frombuffer(_opened(self._path).read(first * size, (end - first) * size, first), RECORD)

    def require_tokenizer(self, name: str, fingerprint: str) -> None:
        ours = self._tokenizer
        if fingerprint == ours.fingerprint:
            return
        differs = f"data.tokenizer is {name}" if name != ours.name else "that of data.tokenizer has another vocabulary"
        raise UserError(
            f"data.path: {os.path.dirname(self._path)} was prepared with the tokenizer {ours.name} "
            f"({ours.vocab_size} tokens), and {differs}. Set data.tokenizer to it, or prepare the shards again"
        )


def open_source(data: Data, retry: Retry, recorded: dict[str, Any] | None = None) -> Source:
    """Open a folder of prepared shards; each shard is a unit.

    Sizes of all files and some documents of each shard are verified now, the others when they are read. What is damaged
    raises its DataFault, or with data.on_error = "skip_file" is found again by the streams, which skip that shard.
    """
    if not data.path:
        raise UserError("data.path is empty: give the folder of the shards.")
    if is_url(data.path):
        raise UserError(
            f"data.path: {data.path}: shards are read from a disk, because documents are read one by one: copy them"
        )
    _opened.cache_clear()  # other files may have the names since
    folder = os.path.expanduser(data.path)
    manifest = read_manifest(folder, "data.path")
    index = ShardIndex(folder, manifest)
    starts = index.starts.tolist()
    units = [
        Shard(
            os.path.join(folder, shard_name(number)),
            os.path.join(folder, INDEX),
            starts[number],
            shard.documents,
            shard.tokens,
            manifest.token_dtype,
        )
        for number, shard in manifest.numbered()
    ]
    faults = _faults(folder, manifest, units, retry)
    if faults and (data.on_error == "stop" or faults[0].file == os.path.join(folder, INDEX)):
        if len(faults) > 1:
            faults[0].reason += f" ({len(faults) - 1} more of its files are damaged)"
        raise faults[0]
    sizes, digests = manifest.sizes(), manifest.digests()
    return Source(
        units,
        unit_sizes=[shard.bytes for shard in manifest.shards],
        unit_files=[shard_name(number) for number, _ in manifest.numbered()],
        fingerprint=manifest.fingerprint,
        description=description(manifest),
        record={"files": [{"name": name, "bytes": size, "digest": digests[name]} for name, size in sizes.items()]},
        unreadable=list(faults),
        index=index,
    )


def description(manifest: Manifest) -> str:
    """A line on prepared shards."""
    count = len(manifest.shards)
    return (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens of {manifest.tokenizer.name} in "
        f"{count:,} shard{'' if count == 1 else 's'}"
    )


def _faults(folder: str, manifest: Manifest, units: list[Shard], retry: Retry) -> list[DataFault]:
    """What is wrong with the files, by their sizes and some of their documents; the index comes first."""
    faults = []
    for name, size in manifest.sizes().items():
        try:
            retry.call(lambda name=name, size=size: _require_size(os.path.join(folder, name), size))  # type: ignore[misc]
        except DataFault as fault:
            faults.append(fault)
    damaged = {fault.file for fault in faults}
    if os.path.join(folder, INDEX) in damaged:
        return faults
    for unit in units:
        if unit.path in damaged:
            continue
        # Evenly spread, the first and the last included.
        count = min(unit.num_documents, max(2, _VERIFIED // len(units)))
        try:
            for ordinal in np.linspace(0, unit.num_documents - 1, count, dtype=np.int64).tolist():
                retry.call(lambda ordinal=ordinal, unit=unit: next(unit.read({"ordinal": ordinal}, 1, 0)))  # type: ignore[misc]
        except DataFault as fault:
            faults.append(fault)
    return faults


def _require_size(path: str, size: int) -> None:
    with readable(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataFault(path, "", f"it is not a regular file but {special_kind(status.st_mode)}", _AGAIN)
    if status.st_size != size:
        found = f"it has {status.st_size:,} bytes, and was prepared with {size:,}"
        raise DataFault(path, "", found, _AGAIN, may_pass=False)
