"""The source of local files and folders."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from swamla_titan.config.sections import Data
from swamla_titan.data.document import MIB, Source, Unit, too_large
from swamla_titan.data.faults import DataFault, Fault, readable
from swamla_titan.data.retry import Retry
from swamla_titan.data.sources.files import compression, is_url
from swamla_titan.data.sources.folder import (
    JSON_LINES,
    PARQUET,
    TEXT,
    Listing,
    find_files,
    kind,
    listed,
    root_of,
    special_kind,
)
from swamla_titan.data.sources.parquet import NoTextColumn, RowGroup, row_groups
from swamla_titan.data.sources.text import ENDLESS, FileRange, WholeFile, require_text
from swamla_titan.errors import UserError

# Files of many documents are cut into ranges of this many bytes. If tokens are not counted, streams read full ranges:
# so many that half a range more or less is little, and not so many that opening files costs more than reading them.
MIN_RANGE, MAX_RANGE = 16 << 10, 16 << 20
RANGES_PER_STREAM = 64

REQUESTS = 32  # at a time, to a store whose files are opened

SKIPPING = 'data.on_error = "skip_file" skips such files'

Entry = dict[str, Any]  # a file in the data record: name, bytes, row groups of parquet, "lost" if it is unreadable
Result = TypeVar("Result")


def open_source(data: Data, retry: Retry, recorded: dict[str, Any] | None = None) -> Source:
    """Open a file, or all data files below a folder (see folder.py), sorted by path.

    A file that cannot be opened raises its DataFault, or with data.on_error = "skip_file" has no units. `recorded` is
    the `Source.record` of the run's beginning. Files in it are divided as they were then, even if they are missing or
    have another size, because reading finds the damage. Only "skip_file" uses it; other runs should notice that their
    data have changed.
    """
    return open_local(data, data.path, retry=retry, recorded=recorded)


def open_local(
    data: Data,
    path: str,
    setting: str = "data.path",
    retry: Retry | None = None,
    recorded: dict[str, Any] | None = None,
    entries: list[Entry] | None = None,
) -> Source:
    """Open local files at `path`, the value of the key `setting`; see `open_source`.

    `entries`, from a `Source.record`: the files to read, without a search for others.
    """
    looked_for = entries is None  # recorded files may be unreadable by now
    if entries is None:
        retry = retry or Retry()
        opening = _Opening(data, setting, retry, retry.call(lambda: find_files(path, setting)))
        entries = opening.entries(recorded)
    else:
        retry, names = retry or Retry(), [entry["name"] for entry in entries]
        opening = _Opening(data, setting, retry, Listing(retry.call(lambda: root_of(path)), names, [], []))
        opening.faults += _lost(entries)
    units, sizes, files = [], [], []
    for entry, unit, size in opening.units(entries):
        units.append(unit)
        sizes.append(size)
        files.append(entry["name"])
    if not units and opening.faults and looked_for:
        raise opening.faults[0]
    return Source(
        units,
        sizes,
        files,
        fingerprint=_digest(entries, data.text_key, data.text_separator),
        description=opening.description(entries, len(units)),
        keys=("text_key", "text_separator"),
        record={"files": entries},
        unreadable=opening.faults,
    )


class _Opening:
    """Opens files, and collects the faults of those that are skipped because they cannot be read."""

    def __init__(self, data: Data, setting: str, retry: Retry, listing: Listing) -> None:
        self._data, self._setting, self._retry, self._listing = data, setting, retry, listing
        self._largest = data.max_document_mib * MIB
        self._may_skip = setting == "data.path"
        self._skips = self._may_skip and data.on_error == "skip_file"
        self.faults: list[Fault] = []
        self._special: list[str] = []  # names of files that are not regular

    def entries(self, recorded: dict[str, Any] | None) -> list[Entry]:
        """The entry of each file: as it was when the run began, if some of its files are intact, else as it is now."""
        now = self._sizes()
        before = {entry["name"]: entry for entry in (recorded or {}).get("files", [])}
        if not any(now.get(name) == entry["bytes"] for name, entry in before.items() if "lost" not in entry):
            before = {}
        self.faults += _lost(list(before.values()))
        new = {name: size for name, size in now.items() if name not in before}
        try:
            found = self._entries_of(new)
        except NoTextColumn as fault:
            self._compare_with_others(fault, now)
            raise
        return [entry for _, entry in sorted({**before, **found}.items())]

    def _entries_of(self, sizes: dict[str, int]) -> dict[str, Entry]:
        """The entries of files as they are now, by name; a store is asked for many at a time."""
        if not is_url(self._listing.root):
            return {name: self._entry(self._path(name), name, size) for name, size in sizes.items()}
        threads = ThreadPoolExecutor(REQUESTS)
        try:
            found = threads.map(lambda item: self._entry(self._path(item[0]), *item), sizes.items())
            entries = dict(zip(sizes, found))
        finally:
            threads.shutdown(cancel_futures=True)
        self.faults.sort(key=lambda fault: fault.file)
        return entries

    def _sizes(self) -> dict[str, int]:
        """{name: bytes, -1 if it cannot be read} of the files listed; a store lists them with their sizes.

        Only regular files are opened, because reading a pipe or a device may never end.
        """
        sizes: dict[str, int] = {}
        if self._listing.sizes:
            return {name: self._listing.sizes[name] for name in self._listing.names}
        for name in self._listing.names:
            found = self._opened(partial(_status, os.path.join(self._listing.root, name)), None)
            if found is not None and not stat.S_ISREG(found.st_mode):
                self._special.append(f"{name}: {special_kind(found.st_mode)}")
            else:
                sizes[name.replace(os.sep, "/")] = -1 if found is None else found.st_size
        if not sizes:
            raise UserError(f"{self._setting}: there is no regular file ({listed(self._special)}). Give files of text.")
        return sizes

    def _entry(self, file: str, name: str, size: int) -> Entry:
        """The entry of a file as it is now."""
        entry: Entry = {"name": name, "bytes": max(0, size)}
        is_good: bool | None = size >= 0
        if size >= 0 and kind(name) in PARQUET:
            entry["groups"] = self._opened(lambda: row_groups(file, self._data.text_key), None)
            is_good = entry["groups"] is not None
        elif size > 0:
            json_key = self._data.text_key if kind(name) in JSON_LINES else None
            ratio = self._opened(partial(require_text, file, compression(name), json_key), None)
            is_good = ratio is not None
            if compression(name) and ratio is not None:
                entry["text_bytes"] = round(size * ratio)
        if not is_good:
            entry["lost"] = next(fault.reason for fault in self.faults if fault.file == file)
        return entry

    def _opened(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """Run `work()` with retries; returns `otherwise` if it fails for good and the file may be skipped."""
        # Files of a store are opened by threads, each of which waits for its own.
        retry = Retry(self._retry.seconds) if is_url(self._listing.root) else self._retry
        try:
            return retry.call(work)
        # Not Unreachable: such a file may answer later, and would be skipped in all of the run.
        except DataFault as fault:
            self._skip(fault)
            return otherwise

    def _skip(self, fault: DataFault) -> None:
        """Add the fault of a file that is skipped, or raise it."""
        if not self._skips:
            if self._may_skip and len(self._listing.names) > 1 and not isinstance(fault, NoTextColumn):
                fault.advice = ". ".join(part for part in (fault.advice, SKIPPING) if part)
            raise fault
        self.faults.append(fault)

    def _compare_with_others(self, fault: NoTextColumn, now: dict[str, int]) -> None:
        """Change the advice if another file has the text column: then the file is at fault and not the key."""
        for name in now:
            file = self._path(name)
            if kind(name) not in PARQUET or file == fault.file:
                continue
            with suppress(Fault):
                row_groups(file, self._data.text_key)
                advice = f"Remove it, or write it again with the column that other files have, such as {name}"
                fault.advice = f"{advice}. {SKIPPING}" if self._may_skip else advice
                return

    def units(self, entries: list[Entry]) -> Iterator[tuple[Entry, Unit, int]]:
        """(file, unit, bytes of text) of each unit of the files."""
        of_documents = (*JSON_LINES, *TEXT) if self._data.text_separator else JSON_LINES
        total = sum(entry["bytes"] for entry in entries if entry["name"].lower().endswith(of_documents))
        range_size = max(MIN_RANGE, min(MAX_RANGE, -(-total // (RANGES_PER_STREAM * self._data.streams))))
        for entry in entries:
            if "lost" in entry:  # no units, even if it is readable again, because the order must not change in a run
                continue
            if kind(entry["name"]) in PARQUET:
                units = self._row_groups(entry)
            elif kind(entry["name"]) in of_documents:
                units = self._ranges(entry, range_size)
            else:
                units = self._whole(entry)
            for unit, size in units:
                yield entry, unit, size

    def _row_groups(self, entry: Entry) -> Iterator[tuple[Unit, int]]:
        file, key = self._path(entry["name"]), self._data.text_key
        for number, (size, rows) in enumerate(entry["groups"]):
            if rows:
                yield RowGroup(file, entry["bytes"], number, rows, key, self._largest), size

    def _ranges(self, entry: Entry, range_size: int) -> Iterator[tuple[Unit, int]]:
        file, size, compressed = self._path(entry["name"]), entry["bytes"], compression(entry["name"])
        json_key = self._data.text_key if kind(entry["name"]) in JSON_LINES else None
        separator = b"\n" if json_key is not None else self._data.text_separator.encode(errors="surrogateescape")
        if compressed and size:
            yield FileRange(file, size, 0, ENDLESS, separator, self._largest, json_key, compressed), entry["text_bytes"]
            return
        # Each range finds its first document, so that the file need not be read here.
        for start in range(0, size, range_size):
            end = min(size, start + range_size)
            yield FileRange(file, size, start, end, separator, self._largest, json_key), end - start

    def _whole(self, entry: Entry) -> Iterator[tuple[Unit, int]]:
        file, size, compressed = self._path(entry["name"]), entry["bytes"], compression(entry["name"])
        if size > self._largest and not compressed:
            too_long = too_large(file, "", size, self._largest, ", or split the file by data.text_separator")
            self._skip(too_long)
            entry["lost"] = too_long.reason
        elif size > 0:
            yield WholeFile(file, size, self._largest, compressed), entry["text_bytes"] if compressed else size

    def _path(self, name: str) -> str:
        return os.path.join(self._listing.root, name.replace("/", os.sep))

    def description(self, entries: list[Entry], num_units: int) -> str:
        """A log line on what is read, and what is not."""
        whole = [entry["bytes"] for entry in entries if "lost" not in entry]
        found = f"{counted(len(whole), 'file')}, {readable_size(sum(whole))} in {counted(num_units, 'unit')}"
        listing = self._listing
        left = [(listing.unknown, "of unknown kind"), (listing.about, "about the data"), (self._special, "not regular")]
        left_out = [f"{counted(len(names), 'file')} {what} ({listed(names)})" for names, what in left if names]
        return f"{found}; left out: {', '.join(left_out)}" if left_out else found


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def readable_size(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return counted(size, "byte")


def _lost(entries: list[Entry]) -> list[Fault]:
    return [DataFault(entry["name"], "", entry["lost"]) for entry in entries if "lost" in entry]


def _digest(entries: list[Entry], text_key: str, text_separator: str) -> str:
    digest = hashlib.blake2b(repr((text_key, text_separator)).encode(errors="surrogateescape"), digest_size=16)
    for entry in entries:
        digest.update(f"{entry['name']}\0{entry['bytes']}\0".encode("utf-8", errors="surrogateescape"))
    for entry in entries:
        if "lost" in entry:
            digest.update(b"lost\0")
        elif "groups" in entry:
            digest.update(repr(entry["groups"]).encode())
        elif "text_bytes" in entry:
            digest.update(repr(entry["text_bytes"]).encode())
    return digest.hexdigest()


def _status(path: str) -> os.stat_result:
    with readable(path):  # a link may point to nothing
        return os.stat(path)
