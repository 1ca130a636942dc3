"""Files and folders on disk."""

import hashlib
import os
from collections.abc import Iterator
from typing import Protocol

from swamla_titan.data.document import Document, Position, too_large
from swamla_titan.data.parquet import row_groups
from swamla_titan.data.text_units import FileRange, WholeFile, readable
from swamla_titan.errors import UserError

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
KNOWN = (*TEXT, *JSON_LINES, *PARQUET)
COMPRESSED = tuple(kind + packed for kind in KNOWN for packed in (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4"))

# Files of many documents are cut in ranges of this many bytes: enough ranges that streams need not share one (each
# of them would read it all), not so many that opening files costs more than reading them.
MIN_RANGE, MAX_RANGE = 64 << 10, 16 << 20
RANGES_PER_STREAM = 4


class Unit(Protocol):
    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]: ...


class LocalSource:
    """A file, or every known file below a folder, sorted by path; hidden files and folders are passed over.

    `setting` names the configuration key that `path` came from, for messages.
    """

    def __init__(
        self,
        path: str,
        *,
        text_key: str,
        text_separator: str,
        max_document_bytes: int,
        streams: int,
        setting: str = "data.path",
    ) -> None:
        root, names, self._passed_over = find_files(path, setting)
        sizes = [_size(os.path.join(root, name)) for name in names]
        self._num_files, self._num_bytes = len(names), sum(sizes)
        digest = hashlib.blake2b(repr((text_key, text_separator)).encode(), digest_size=16)
        for name, size in zip(names, sizes):
            digest.update(f"{name.replace(os.sep, '/')}\0{size}\0".encode("utf-8", errors="surrogateescape"))

        cut_in_ranges = (*JSON_LINES, *TEXT) if text_separator else JSON_LINES
        total = sum(size for name, size in zip(names, sizes) if name.lower().endswith(cut_in_ranges))
        range_size = max(MIN_RANGE, min(MAX_RANGE, -(-total // (RANGES_PER_STREAM * streams))))
        self._units: list[Unit] = []
        self._unit_sizes: list[int] = []  # in bytes
        for name, size in zip(names, sizes):
            file = os.path.join(root, name)
            if name.lower().endswith(PARQUET):
                groups = row_groups(file, text_key, max_document_bytes)
                self._units += groups
                self._unit_sizes += [group.size for group in groups]
                digest.update(repr([group.size for group in groups]).encode())
            elif name.lower().endswith(cut_in_ranges):
                json_key = text_key if name.lower().endswith(JSON_LINES) else None
                separator = b"\n" if json_key is not None else text_separator.encode()
                for start in range(0, size, range_size):
                    end = min(size, start + range_size)
                    self._units.append(FileRange(file, size, start, end, separator, max_document_bytes, json_key))
                    self._unit_sizes.append(end - start)
            else:
                if size > max_document_bytes:
                    raise too_large(file, size, max_document_bytes, ", or split the file by data.text_separator")
                self._units.append(WholeFile(file, max_document_bytes))
                self._unit_sizes.append(size)
        self._fingerprint = digest.hexdigest()

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def unit_sizes(self) -> list[int]:
        return self._unit_sizes

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def describe(self) -> str:
        found = (
            f"{counted(self._num_files, 'file')}, {readable_size(self._num_bytes)} in {counted(self.num_units, 'unit')}"
        )
        if self._passed_over:
            names = ", ".join(self._passed_over[:3]) + (", ..." if len(self._passed_over) > 3 else "")
            found += f"; passed over: {counted(len(self._passed_over), 'file')} of unknown kind ({names})"
        return found

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        return self._units[unit].read(position, every, offset)


def find_files(path: str, setting: str) -> tuple[str, list[str], list[str]]:
    """(folder, sorted names of the files to read below it, of those of unknown kinds). UserError if there is no file
    to read, or a compressed one that would be missed."""
    known = ", ".join(KNOWN)
    if not path:
        raise UserError(f"{setting} is empty: give a file or folder ({known}).")
    if not os.path.exists(path):
        raise UserError(f"{setting}: {path} does not exist.")
    if not os.path.isdir(path):
        if path.lower().endswith(COMPRESSED):
            raise _compressed(setting, path, 1)
        if not path.lower().endswith(KNOWN):
            raise UserError(f"{setting}: {path} is of an unknown kind. Known: {known}.")
        return os.path.dirname(path), [os.path.basename(path)], []

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    seen: set[str] = set()  # folders: links may lead to one twice, or around in a circle
    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        found += [os.path.relpath(os.path.join(folder, name), path) for name in files if not name.startswith(".")]
    names = [name for name in found if name.lower().endswith(KNOWN)]
    passed_over = sorted(name for name in found if not name.lower().endswith(KNOWN))
    compressed = [name for name in passed_over if name.lower().endswith(COMPRESSED)]
    if compressed:
        raise _compressed(setting, os.path.join(path, compressed[0]), len(compressed))
    if not names:
        raise UserError(f"{setting}: {path} holds no file of a known kind. Known: {known}.")
    return path, sorted(names), passed_over


def _compressed(setting: str, file: str, count: int) -> UserError:
    also = f" and {count - 1} more" if count > 1 else ""
    return UserError(
        f"{setting}: {file}{also}: compressed files are not read. Decompress them, move them elsewhere, or read the "
        'folder with data.source = "huggingface", which reads compressed files too.'
    )


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def readable_size(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return counted(size, "byte")


def _size(path: str) -> int:
    with readable(path):  # a link may point to nothing
        return os.path.getsize(path)
