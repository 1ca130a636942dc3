"""Files and folders on disk."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from swamla_titan.data.document import Document, Position, too_large
from swamla_titan.data.faults import DataFault, Fault, readable
from swamla_titan.data.folder import JSON_LINES, PARQUET, TEXT, Listing, find_files, listed, special_kind
from swamla_titan.data.parquet import NoTextColumn, RowGroup, row_groups
from swamla_titan.data.retry import Retry
from swamla_titan.data.text_units import FileRange, WholeFile, require_text
from swamla_titan.errors import UserError

# Files of many documents are cut in ranges of this many bytes. A stream of a corpus that is not counted reads whole
# ranges: enough of them that half a range more or less is little, not so many that opening files costs more than
# reading them.
MIN_RANGE, MAX_RANGE = 16 << 10, 16 << 20
RANGES_PER_STREAM = 64


SKIPPING = 'data.on_error = "skip_file" skips such files'

Result = TypeVar("Result")


class Unit(Protocol):
    @property
    def num_documents(self) -> int | None:
        """How many documents it has; reading can begin at any of them. None: that is known only after reading."""
        ...

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]: ...


class LocalSource:
    """A file, or every file below a folder that holds data (see folder.py), sorted by path.

    `setting` names the configuration key that `path` came from, for messages. A file that cannot be opened raises its
    DataFault, or with `skip_files` has no units. `recorded` is what `record` gave when the run began: files that were
    there then are divided as they were, those of another size or gone as well: reading comes upon the damage. That,
    too, is for `skip_files` only: others are to see that their data have changed. `entries`, from what `record` gave,
    names the files to read instead of looking for them.
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
        retry: Retry | None = None,
        recorded: dict[str, Any] | None = None,
        entries: list[dict[str, Any]] | None = None,
    ) -> None:
        self._faults: list[Fault] = []
        self._skip_files = skip_files
        self._retry = retry or Retry()
        self._may_skip = setting == "data.path"
        self._special: list[str] = []
        looked_for = entries is None  # those that a run had before may be lost by now
        if entries is None:
            self._listing = find_files(path, setting)
            entries = self._found(self._sizes(setting), text_key, recorded if skip_files else None)
        else:
            path = os.path.expanduser(path)
            folder = path if os.path.isdir(path) else os.path.dirname(path)
            self._listing = Listing(folder, [entry["name"] for entry in entries], [], [])
            self._faults += _lost(entries)
        root = self._listing.root
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
                for number, (group_bytes, rows) in enumerate(entry["groups"]):
                    if rows:
                        units.append((RowGroup(file, size, number, rows, text_key, max_document_bytes), group_bytes))
            elif name.lower().endswith(cut_in_ranges):
                json_key = text_key if name.lower().endswith(JSON_LINES) else None
                separator = b"\n" if json_key is not None else text_separator.encode(errors="surrogateescape")
                for start in range(0, size, range_size):
                    end = min(size, start + range_size)
                    part = FileRange(file, size, start, end, separator, max_document_bytes, json_key)
                    units.append((part, end - start))
            elif size > max_document_bytes:
                advice = ", or split the file by data.text_separator"
                too_long = too_large(file, "", size, max_document_bytes, advice)
                self._skip(too_long)
                entry["lost"] = too_long.reason
            elif size > 0:
                units.append((WholeFile(file, size), size))
            self._units += [unit for unit, _ in units]
            self._unit_sizes += [part_size for _, part_size in units]
            self._unit_files += [name] * len(units)
        whole = [entry for entry in entries if "lost" not in entry]
        self._num_files, self._num_bytes = len(whole), sum(entry["bytes"] for entry in whole)
        if not self._units and self._faults and looked_for:
            raise self._faults[0]
        self._fingerprint = _digest(entries, text_key, text_separator)

    def _sizes(self, setting: str) -> dict[str, int]:
        """{name: bytes, -1 where it cannot be looked at} of the files listed; only regular ones are ever opened, as
        reading a pipe or a device may never end."""
        sizes: dict[str, int] = {}
        for name in self._listing.names:
            found = self._opened(partial(_status, os.path.join(self._listing.root, name)), None)
            if found is not None and not stat.S_ISREG(found.st_mode):
                self._special.append(f"{name}: {special_kind(found.st_mode)}")
            else:
                sizes[name.replace(os.sep, "/")] = -1 if found is None else found.st_size
        if not sizes:
            raise UserError(f"{setting}: there is no regular file ({listed(self._special)}). Give files of text.")
        return sizes

    def _opened(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """`work()`, tried again; where it fails for good and files may be skipped, `otherwise`."""
        try:
            return self._retry.call(work)
        except DataFault as fault:  # a file that merely does not answer is not skipped for a whole run
            self._skip(fault)
            return otherwise

    def _found(self, now: dict[str, int], text_key: str, recorded: dict[str, Any] | None) -> list[dict[str, Any]]:
        """What is to be remembered of each file of `now` (name -> bytes): as it is now, or if the run began with it and
        some of those files are still whole, as it was then."""
        before = {entry["name"]: entry for entry in (recorded or {}).get("files", [])}
        if not any(now.get(name) == entry["bytes"] for name, entry in before.items() if "lost" not in entry):
            before = {}
        self._faults += _lost(before.values())
        root = self._listing.root
        try:
            new = {name: self._entry(root, name, size, text_key) for name, size in now.items() if name not in before}
        except NoTextColumn as fault:
            self._compare_with_others(fault, root, text_key, now)
            raise
        return [entry for _, entry in sorted({**before, **new}.items())]

    def _entry(self, root: str, name: str, size: int, text_key: str) -> dict[str, Any]:
        """What is to be remembered of a file as it is now."""
        entry: dict[str, Any] = {"name": name, "bytes": max(0, size)}
        file = os.path.join(root, name.replace("/", os.sep))
        is_good: bool | None = size >= 0
        if size >= 0 and name.lower().endswith(PARQUET):
            entry["groups"] = self._opened(lambda: row_groups(file, text_key), None)
            is_good = entry["groups"] is not None
        elif size > 0:
            is_good = self._opened(partial(require_text, file), None)
        if not is_good:
            entry["lost"] = next(fault.reason for fault in self._faults if fault.file == file)
        return entry

    def _skip(self, fault: DataFault) -> None:
        """Remembers the fault of a file that is skipped, or raises it."""
        if not self._skip_files:
            if self._may_skip and len(self._listing.names) > 1 and not isinstance(fault, NoTextColumn):
                fault.advice = ". ".join(part for part in (fault.advice, SKIPPING) if part)
            raise fault
        self._faults.append(fault)

    def _compare_with_others(self, fault: NoTextColumn, root: str, text_key: str, now: dict[str, int]) -> None:
        """Where another file has the column of text, the fault is the file's, not the key's."""
        for name in now:
            file = os.path.join(root, name.replace("/", os.sep))
            if not name.lower().endswith(PARQUET) or file == fault.file:
                continue
            with suppress(Fault):
                row_groups(file, text_key)
                advice = f"Remove it, or write it again with the column that other files have, such as {name}"
                fault.advice = f"{advice}. {SKIPPING}" if self._may_skip else advice
                return

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def unit_sizes(self) -> list[int]:
        return self._unit_sizes

    @property
    def text_bytes(self) -> int:
        return sum(self._unit_sizes)

    def num_documents(self, unit: int) -> int | None:
        return self._units[unit].num_documents

    def position_of(self, unit: int, ordinal: int) -> Position | None:
        return {"ordinal": ordinal} if self._units[unit].num_documents is not None else None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def describe(self) -> str:
        found = (
            f"{counted(self._num_files, 'file')}, {readable_size(self._num_bytes)} in {counted(self.num_units, 'unit')}"
        )
        left = [
            (self._listing.unknown, "of unknown kind"),
            (self._listing.about, "about the data"),
            (self._special, "not regular"),
        ]
        passed_over = [f"{counted(len(names), 'file')} {what} ({listed(names)})" for names, what in left if names]
        if passed_over:
            found += f"; passed over: {', '.join(passed_over)}"
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


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def readable_size(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return counted(size, "byte")


def _lost(entries: Iterable[dict[str, Any]]) -> list[Fault]:
    return [DataFault(entry["name"], "", entry["lost"]) for entry in entries if "lost" in entry]


def _digest(entries: list[dict[str, Any]], text_key: str, text_separator: str) -> str:
    digest = hashlib.blake2b(repr((text_key, text_separator)).encode(errors="surrogateescape"), digest_size=16)
    for entry in entries:
        digest.update(f"{entry['name']}\0{entry['bytes']}\0".encode("utf-8", errors="surrogateescape"))
    for entry in entries:
        if "lost" in entry:
            digest.update(b"lost\0")
        elif "groups" in entry:
            digest.update(repr(entry["groups"]).encode())
    return digest.hexdigest()


def _status(path: str) -> os.stat_result:
    with readable(path):  # a link may point to nothing
        return os.stat(path)
