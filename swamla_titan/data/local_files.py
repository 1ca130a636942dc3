"""Files and folders on disk."""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

from swamla_titan.data.document import Document, Position, too_large
from swamla_titan.data.faults import DataFault, Fault, readable
from swamla_titan.data.parquet import RowGroup, row_group_sizes
from swamla_titan.data.patience import Patience
from swamla_titan.data.text_units import FileRange, WholeFile
from swamla_titan.errors import UserError

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
KNOWN = (*TEXT, *JSON_LINES, *PARQUET)
COMPRESSED = tuple(kind + packed for kind in KNOWN for packed in (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4"))

# Files of many documents are cut in ranges of this many bytes: enough ranges that streams need not share one (each
# of them would read it all), not so many that opening files costs more than reading them.
MIN_RANGE, MAX_RANGE = 64 << 10, 16 << 20
RANGES_PER_STREAM = 4


Result = TypeVar("Result")


class Unit(Protocol):
    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]: ...


class LocalSource:
    """A file, or every known file below a folder, sorted by path; hidden files and folders are passed over.

    `setting` names the configuration key that `path` came from, for messages. A file that cannot be opened raises its
    DataFault, or with `skip_files` has no units. `recorded` is what `record` gave when the run began: if there are no
    other files now than there were, they are divided as they were, those of another size or gone as well: reading comes
    upon the damage. That, too, is for `skip_files` only: others are to see that their data have changed.
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
        skip_files: bool = False,
        patience: Patience | None = None,
        recorded: dict[str, Any] | None = None,
    ) -> None:
        self._faults: list[Fault] = []
        self._skip_files = skip_files
        self._patience = patience or Patience()
        root, names, self._unknown = find_files(path, setting)
        now: dict[str, int] = {}
        for name in names:
            size = partial(_size, os.path.join(root, name))
            now[name.replace(os.sep, "/")] = self._opened(size, -1)
        entries = _as_recorded(recorded if skip_files else None, now)
        if entries is None:
            entries = [self._entry(root, name, size, text_key) for name, size in now.items()]
        else:
            self._faults += [DataFault(each["name"], "", each["lost"]) for each in entries if "lost" in each]
        self._entries = entries

        cut_in_ranges = (*JSON_LINES, *TEXT) if text_separator else JSON_LINES
        total = sum(entry["bytes"] for entry in entries if entry["name"].lower().endswith(cut_in_ranges))
        range_size = max(MIN_RANGE, min(MAX_RANGE, -(-total // (RANGES_PER_STREAM * streams))))
        self._units: list[Unit] = []
        self._unit_sizes: list[int] = []  # in bytes
        self._unit_files: list[str] = []
        for entry in entries:
            name, size = entry["name"], entry["bytes"]
            file = os.path.join(root, name.replace("/", os.sep))
            units: list[tuple[Unit, int]] = []
            if "lost" in entry:
                pass
            elif name.lower().endswith(PARQUET):
                for number, group in enumerate(entry["groups"]):
                    units.append((RowGroup(file, size, number, text_key, max_document_bytes), group))
            elif name.lower().endswith(cut_in_ranges):
                json_key = text_key if name.lower().endswith(JSON_LINES) else None
                separator = b"\n" if json_key is not None else text_separator.encode()
                for start in range(0, size, range_size):
                    end = min(size, start + range_size)
                    part = FileRange(file, size, start, end, separator, max_document_bytes, json_key)
                    units.append((part, end - start))
            elif size > max_document_bytes:
                advice = ", or split the file by data.text_separator"
                self._pass_over(entry, too_large(file, "", size, max_document_bytes, advice))
            else:
                units.append((WholeFile(file, size), size))
            self._units += [unit for unit, _ in units]
            self._unit_sizes += [part_size for _, part_size in units]
            self._unit_files += [name] * len(units)
        whole = [entry for entry in entries if "lost" not in entry]
        self._num_files, self._num_bytes = len(whole), sum(entry["bytes"] for entry in whole)
        if not self._units and self._faults:
            raise self._faults[0]
        self._fingerprint = _digest(entries, text_key, text_separator)

    def _opened(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """`work()`, patiently; where it comes to nothing, and files may be passed over, `otherwise`."""
        while True:
            try:
                return work()
            except Fault as fault:
                if self._patience.again(fault):
                    continue
                self._patience.give_up(fault)
                # One that merely does not answer is not passed over for a whole run.
                if not self._skip_files or not isinstance(fault, DataFault):
                    raise
                self._faults.append(fault)
                return otherwise

    def _entry(self, root: str, name: str, size: int, text_key: str) -> dict[str, Any]:
        """What is to be remembered of a file as it is now."""
        entry: dict[str, Any] = {"name": name, "bytes": max(0, size)}
        if size >= 0 and name.lower().endswith(PARQUET):
            file = os.path.join(root, name.replace("/", os.sep))
            entry["groups"] = self._opened(lambda: row_group_sizes(file, text_key), None)
        if size < 0 or entry.get("groups", ()) is None:
            entry["lost"] = self._faults[-1].reason
        return entry

    def _pass_over(self, entry: dict[str, Any], fault: DataFault) -> None:
        if not self._skip_files:
            raise fault
        entry["lost"] = fault.reason
        self._faults.append(fault)

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
        if self._unknown:
            names = ", ".join(self._unknown[:3]) + (", ..." if len(self._unknown) > 3 else "")
            found += f"; passed over: {counted(len(self._unknown), 'file')} of unknown kind ({names})"
        return found

    def file_of(self, unit: int) -> str:
        return self._unit_files[unit]

    def record(self) -> dict[str, Any]:
        return {"files": self._entries}

    @property
    def passed_over(self) -> list[Fault]:
        return self._faults

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


def _as_recorded(recorded: dict[str, Any] | None, now: dict[str, int]) -> list[dict[str, Any]] | None:
    """The entries that were recorded, if the files of `now` (name -> bytes) are those, some of them damaged at most."""
    entries: list[dict[str, Any]] = (recorded or {}).get("files", [])
    known = {entry["name"] for entry in entries}
    intact = any(now.get(entry["name"]) == entry["bytes"] for entry in entries if "lost" not in entry)
    return entries if intact and now.keys() <= known else None


def _digest(entries: list[dict[str, Any]], text_key: str, text_separator: str) -> str:
    digest = hashlib.blake2b(repr((text_key, text_separator)).encode(), digest_size=16)
    for entry in entries:
        digest.update(f"{entry['name']}\0{entry['bytes']}\0".encode("utf-8", errors="surrogateescape"))
    for entry in entries:
        if "lost" in entry:
            digest.update(b"lost\0")
        elif "groups" in entry:
            digest.update(repr(entry["groups"]).encode())
    return digest.hexdigest()


def _size(path: str) -> int:
    with readable(path):  # a link may point to nothing
        return os.path.getsize(path)
