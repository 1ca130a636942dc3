"""Datasets that Hugging Face's `datasets` streams, from the Hub or from a local folder."""

import hashlib
import itertools
import json
import logging
import os
import reprlib
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from swamla_titan.config.sections import Data
from swamla_titan.data.document import MIB, Document, Position, Source, replace_surrogates, too_large
from swamla_titan.data.faults import DataFault, Fault, SetupFault, Unreachable, network_fault, with_name
from swamla_titan.data.retry import Retry
from swamla_titan.data.sources.folder import listed, special_kind
from swamla_titan.data.sources.parquet import STRING_TYPES, is_any
from swamla_titan.data.sources.text import require_text
from swamla_titan.errors import UserError
from swamla_titan.system.machine import chain

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def open_source(data: Data, retry: Retry, recorded: dict[str, Any] | None = None) -> Source:
    """Open one split of a dataset; a unit is a shard of `datasets` (a file, or a row group of one)."""
    import datasets  # takes a second, and only this source needs it

    if not data.path:
        raise UserError("data.path is empty: give the name of a dataset, or a folder that holds one.")
    path, key = os.path.expanduser(data.path), data.text_key
    if os.path.isfile(path):
        raise UserError(f"data.path: {path} is a file: give the folder that it is in.")
    is_folder, skips_files = os.path.isdir(path), data.on_error == "skip_file"
    files = _names_and_sizes(path) if is_folder else []
    label = " ".join(part for part in (path, data.name, f"[{data.split}]") if part)
    _disable_retries()
    text_alone = datasets.Features({key: datasets.Value("string")})
    dataset, builder = _loaded(label, partial(_load, data, path, text_alone), retry)
    unread = _unread(path, files, builder)
    if path in _without_commit:
        logger.warning(
            "data.path: the commit of %s is not known (%s); if it changes, a resumed run will not notice",
            path,
            _without_commit.pop(path),
        )
    columns, reads_text = dataset.column_names, _reads_only(builder)
    # The columns are those of the first file, which may lack the column if files are skipped.
    if columns is not None and not (skips_files and reads_text):
        _require_column(label, key, columns)
    if reads_text:  # whatever the first file holds
        dataset = dataset.cast(text_alone)
    elif columns is not None:
        dataset = dataset.select_columns([key])
    count: int = dataset.num_shards
    if not skips_files:
        for name, size in files:
            if size and name.endswith(_PLAIN_TEXT) and name not in unread:
                require_text(os.path.join(path, name))  # because other encodings, such as UTF-16, often decode
    files = _as_recorded(recorded, files, count) if is_folder else []
    content = files if is_folder else (path, data.revision or None)  # a folder may move

    def digest(name: str) -> str:
        return hashlib.blake2b(repr((content, name, data.split, key, count)).encode(), digest_size=16).hexdigest()

    found = f"{label}, {count} shard" + ("" if count == 1 else "s")
    if unread:
        found += f"; left out: {len(unread)} of the folder's files ({listed(unread)})"
    most = data.max_document_mib * MIB
    return Source(
        [Shard(dataset, number, count, f"{label}, shard {number}", label, key, most) for number in range(count)],
        unit_sizes=[1] * count,  # unknown before they are read
        unit_files=[f"{label}, shard {number}" for number in range(count)],
        fingerprint=digest(data.name),
        description=found,
        sizes_are_known=False,
        keys=("name", "split", "text_key") if is_folder else ("name", "split", "text_key", "path", "revision"),
        record={"files": [list(each) for each in files], "units": count},
        # Version 0.1 took the last file's name for data.name, unless files may be skipped.
        old_fingerprint=digest(files[-1][0]) if files else "",
    )


def _load(data: Data, path: str, text_alone: Any) -> tuple[Any, Any]:
    """Load the streamed dataset, and the builder that reads its files."""
    import datasets

    skips_files = data.on_error == "skip_file"
    load = partial(
        datasets.load_dataset,
        path,
        data.name or None,
        split=data.split,
        streaming=True,
        revision=data.revision or None,
    )
    try:
        dataset = load()
    except Exception:
        if not skips_files:
            raise
        # `datasets` reads the columns from the first file, which may be the one to skip.
        dataset = load(features=text_alone)
    builder = _builder_of(dataset)
    _read_only(builder, data.text_key)
    if dataset.num_shards < data.streams and hasattr(dataset, "reshard"):
        # Shards become row groups instead of files, if the format allows it. That opens every file, which is worth its
        # time only if there are too few shards for the streams.
        with suppress(*([Exception] if skips_files else [])):  # a file that is to be skipped cannot be opened
            dataset = dataset.reshard()
    return dataset, builder


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `count`, called `file` in messages. A position holds the state of its reader, as text."""

    dataset: Any
    number: int
    count: int
    file: str
    label: str  # of the dataset
    text_key: str
    max_document_bytes: int
    num_documents: None = None

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        _disable_retries()
        shard = self.dataset.shard(num_shards=self.count, index=self.number)
        first = 0
        if position:
            first = position["ordinal"]
            shard.load_state_dict(json.loads(position["state"]))
        rows = iter(shard)
        for ordinal in itertools.count(first):
            place = f"row {ordinal}"
            try:
                row = next(rows, None)
            except Fault as fault:
                fault.file, fault.place = self.file, place
                raise
            except Exception as error:  # whatever lies below: HTTP, file system, parser
                if "No match for FieldRef" in str(error):  # pyarrow's words for a column that is not there
                    raise DataFault(self.file, place, f'no column "{self.text_key}"', _OTHERS) from error
                raise _cache_fault(self.file, place, error) or network_fault(self.file, place, error) from error
            if row is None:
                return
            if ordinal % every == offset:
                # The state is stored as text, because nothing else reads it.
                after = {"ordinal": ordinal + 1, "state": json.dumps(shard.state_dict())}
                text, replaced = self._text(row, place)
                yield Document(text, ordinal, after, replaced)

    def _text(self, row: dict[str, Any], place: str) -> tuple[str, int]:
        if self.text_key not in row:
            _require_column(self.label, self.text_key, list(row))
        value = row[self.text_key]
        if value is None:
            return "", 0
        if not isinstance(value, str):
            raise DataFault(
                self.file,
                place,
                f'the column "{self.text_key}" is not a string but {reprlib.repr(value):.60}',
                "Set data.text_key to the column that holds the text",
            )
        if len(value) > self.max_document_bytes:
            raise too_large(self.file, place, len(value), self.max_document_bytes)
        return replace_surrogates(value)


def _loaded(label: str, load: Callable[[], Result], retry: Retry) -> Result:
    """Run `load()` with retries while the network does not answer; UserError if it fails for good."""
    file = f"data.path, data.name, data.split: {label}"

    def attempt() -> Result:
        try:
            return load()
        except Exception as error:  # whatever lies below: HTTP, file system, parser, builder
            fault = _cache_fault(file, "", error) or network_fault(file, "", error)
            # A wrong key gives all kinds of errors, but a network that is down can be recognized.
            fault.may_pass = isinstance(fault, Unreachable)
            raise fault from error

    try:
        return retry.call(attempt)
    except Fault as fault:
        error = fault.__cause__
        if fault.of_machine:
            raise
        tried = f" ({fault.tried})" if fault.tried else ""
        # All lines, because the later ones name the valid choices.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:600].rstrip(".:")
        if isinstance(error, StopIteration):  # there was no first row
            reason = "its files hold no data"
        advice = "Check the three keys and the network"
        if "save_to_disk" in reason:
            advice = "Write it as parquet, by the method to_parquet of what load_from_disk gives"
        raise UserError(f"{file} cannot be loaded: {reason}{tried}. {advice}.") from error


def _require_column(label: str, text_key: str, columns: list[str]) -> None:
    if text_key not in columns:
        raise UserError(
            f'{label}: no column "{text_key}". '
            f"Set data.text_key to one of the columns there: {listed(columns, 20)}; or, if only the first file "
            'lacks it, correct or remove that, or set data.on_error = "skip_file".'
        )


def _cache_fault(file: str, place: str, error: Exception) -> Fault | None:
    """The fault if a path in the cache folder of `datasets`, or above it, could not be opened; else None."""
    import datasets

    cache = Path(datasets.config.HF_CACHE_HOME).absolute()
    for each in chain(error):
        if isinstance(each, OSError) and isinstance(each.filename, str):
            at = Path(each.filename).absolute()
            if at in (cache, *cache.parents) or cache in at.parents:
                reason = f"{cache}, where Hugging Face's libraries keep files, cannot be used ({each.strerror})"
                return SetupFault(file, place, reason, "Set HF_HOME to a folder that can be written")
    return None


def commit_of(path: str, revision: str) -> str:
    """Resolve a revision of a dataset (empty: the newest) to a commit, so that a whole run reads the same one.

    Returns the revision unchanged for a folder, or if the Hub does not answer.
    """
    from huggingface_hub import HfApi

    if os.path.exists(os.path.expanduser(path)):
        return revision
    try:
        return HfApi().dataset_info(path, revision=revision or None, timeout=30).sha or revision
    except Exception as error:  # offline, or no such dataset, which loading will show
        _without_commit[path] = with_name(error)
        return revision


# Why the commit of a dataset is not known; a warning once it is open, because an error in opening it says more.
_without_commit: dict[str, str] = {}


def _names_and_sizes(folder: str) -> list[tuple[str, int]]:
    """(name, bytes) of the files below a folder; UserError for a pipe or a device, because `datasets` would hang."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk continues with what is left here
        for name in sorted(files):
            path = os.path.join(place, name)
            if name.startswith(".") or not os.path.exists(path):
                continue
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                kind = special_kind(status.st_mode)
                raise UserError(f"data.path: {path} is not a regular file but {kind}. Move it elsewhere.")
            found.append((os.path.relpath(path, folder), status.st_size))
    return sorted(found)


def _builder_of(dataset: Any) -> Any:
    """The builder that reads the files of a streamed dataset; None if it builds no tables."""
    return getattr(getattr(getattr(dataset, "_ex_iterable", None), "generate_tables_fn", None), "__self__", None)


def _unread(folder: str, files: list[tuple[str, int]], builder: Any) -> list[str]:
    """Files of a folder that are in no split, because `datasets` reads only the most frequent of several formats."""
    splits = getattr(getattr(builder, "config", None), "data_files", None)
    if not isinstance(splits, dict):
        return []
    read = {os.path.relpath(str(file), os.path.abspath(folder)) for each in splits.values() for file in each}
    return [name for name, _ in files if name not in read]


def _reads_only(builder: Any) -> bool:
    """Whether `_read_only` can change a builder."""
    return hasattr(builder, "_cast_table")


def _read_only(builder: Any, text_key: str) -> None:
    """Make a builder read one column, as strings, if it can.

    Without this it would cast every file to the columns and types of the first one, and reject files in which an unused
    column has another type.
    """
    if not _reads_only(builder):
        return
    builder._cast_table = partial(_only_column, text_key)
    if getattr(getattr(builder, "config", None), "columns", ()) is None:
        builder.config.columns = [text_key]  # of parquet, whose other columns need not be read


def _only_column(text_key: str, table: pa.Table, **unused: Any) -> pa.Table:
    """Replaces a builder's cast of all columns: a table of the text column alone."""
    count = table.column_names.count(text_key)
    if count != 1:
        there = listed(table.column_names, 20) or "none"
        found = f'{count} columns are named "{text_key}"' if count else f'no column "{text_key}" among {there}'
        raise DataFault("", "", found, _OTHERS)
    column = table.column(text_key)
    if pa.types.is_null(column.type):
        column = pa.nulls(len(column), pa.string())
    elif not pa.types.is_string(column.type):
        column = _as_strings(text_key, column)
    return pa.table({text_key: column})


def _as_strings(text_key: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if is_any(column.type, STRING_TYPES):
        return column.cast(pa.string())
    value = next((value for value in column if value.is_valid), None)
    found = values if value is None else reprlib.repr(value.as_py())[:60]
    raise DataFault(
        "",
        "",
        f'the column "{text_key}" is not a string but {found}',
        "Set data.text_key to the column that holds the text",
    )


_PLAIN_TEXT = (".txt", ".json", ".jsonl", ".csv", ".tsv")
_OTHERS = "Where other files have it, correct this one or remove it; else set data.text_key to the column of the text"


def _as_recorded(
    recorded: dict[str, Any] | None, files: list[tuple[str, int]], num_units: int
) -> list[tuple[str, int]]:
    """The files as they were when the run began, if only sizes differ; otherwise as they are now: another dataset.

    A file that was truncated is still a file of the run.
    """
    before = [(name, size) for name, size in (recorded or {}).get("files", [])]
    if (recorded or {}).get("units") != num_units or [name for name, _ in before] != [name for name, _ in files]:
        return files
    for (name, size), (_, was) in zip(files, before):
        if size != was:
            logger.warning("data.path: %s has %d bytes; when the run began, it had %d", name, size, was)
    return before


def _disable_retries() -> None:
    """Make `datasets` raise errors at once; its own retries take minutes without a log line, at limits of its own."""
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # because faults report the same
    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        setattr(datasets.config, name, 1)
    for name in vars(datasets.config).keys() & _WAITS:
        setattr(datasets.config, name, 0)


# Seconds that it would sleep even after the last try; which of these names exist depends on its version.
_WAITS = {
    "STREAMING_READ_RETRY_INTERVAL",
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL",
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL",
    "STREAMING_OPEN_RETRY_INTERVAL",
}
