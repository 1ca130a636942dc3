"""Text files as units: whole files, and byte ranges of files of many documents."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from swamla_titan.data.document import Document, Position, decode_utf8, replace_surrogates, too_large
from swamla_titan.data.faults import DataFault, cut_short, of_another_size, readable

BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 18  # bytes read at a time while looking for a separator


@dataclass(frozen=True)
class WholeFile:
    """A file that is one document."""

    path: str
    size: int

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        if (position or {"ordinal": 0})["ordinal"] > 0 or offset > 0:
            return
        with readable(self.path), open(self.path, "rb") as file:
            data = file.read(self.size + 1)
        if len(data) != self.size:
            raise of_another_size(self.path, self.size)
        text, replaced = decode_utf8(data.removeprefix(BOM))
        yield Document(text, 0, {"ordinal": 1}, self.path, replaced)


@dataclass(frozen=True)
class FileRange:
    """The documents that start in bytes [start, end) of a file in which `separator` stands between documents.

    Both ends are first moved on to where a document starts, each by the same rule, so neighbouring ranges meet
    exactly: no document is lost or read twice, however they are cut and whatever the separator.
    """

    path: str
    size: int  # of the file
    start: int
    end: int
    separator: bytes
    max_document_bytes: int
    json_key: str | None = None  # a line is a JSON object, and this field of it the text; None: plain text

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        with readable(self.path), open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size > self.size:  # what is cut short is read up to there
                raise of_another_size(self.path, self.size)
            start = position["byte"] if position else self._document_start(file, self.start)
            if start is None:
                raise self._too_large(self.start)
            # Where the last document has no end in sight, reading it from its start finds it too large.
            end = self._document_start(file, self.end) or self.size
            ordinal = position["ordinal"] if position else 0
            for data, at, after in self._split(file, start, end):
                if at == 0:
                    data = data.removeprefix(BOM)
                if not data or data.isspace():
                    continue
                if ordinal % every == offset:
                    text, replaced = self._parse(data, at)
                    yield Document(
                        text, ordinal, {"ordinal": ordinal + 1, "byte": after}, f"{self.path}, byte {at}", replaced
                    )
                ordinal += 1

    def _document_start(self, file: BinaryIO, cut: int) -> int | None:
        """First byte at or after `cut` that follows a separator; the file's first byte and its end count as well.

        None if there is no separator for longer than a document may be.
        """
        if cut <= 0 or cut >= self.size:
            return max(0, min(cut, self.size))
        at = max(0, cut - len(self.separator))
        file.seek(at)
        tail = b""  # of what was read: a separator may lie across two chunks
        while True:
            chunk = file.read(CHUNK)
            if not chunk:
                if at < self.size:
                    raise cut_short(self.path, self._place(at))
                return self.size
            window = tail + chunk
            found = window.find(self.separator)
            if found >= 0:
                return at - len(tail) + found + len(self.separator)
            at += len(chunk)
            tail = window[len(window) - len(self.separator) + 1 :]
            if at - cut > self.max_document_bytes + CHUNK:
                return None

    def _split(self, file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """(document, its first byte, first byte after it and its separator), from `start` to `end`."""
        file.seek(start)
        buffer = bytearray()
        at = start  # of the buffer's first byte
        searched = 0  # no separator starts before this place of the buffer
        consumed = 0
        while True:
            found = buffer.find(self.separator, searched)
            if found >= 0:
                if found - consumed > self.max_document_bytes:
                    raise self._too_large(at + consumed)
                after = found + len(self.separator)
                yield bytes(buffer[consumed:found]), at + consumed, at + after
                consumed = searched = after
                continue
            del buffer[:consumed]
            at += consumed
            searched = max(0, len(buffer) - len(self.separator) + 1)
            consumed = 0
            if len(buffer) > self.max_document_bytes + len(self.separator):
                raise self._too_large(at)
            chunk = file.read(max(0, min(CHUNK, end - at - len(buffer))))
            if not chunk:
                if at + len(buffer) < end:
                    raise cut_short(self.path, self._place(at + len(buffer)))
                break
            buffer += chunk
        if buffer:
            if len(buffer) > self.max_document_bytes:
                raise self._too_large(at)
            yield bytes(buffer), at, at + len(buffer)

    def _parse(self, data: bytes, at: int) -> tuple[str, int]:
        text, replaced = decode_utf8(data)
        if self.json_key is None:
            return text, replaced
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise self._fault(
                at,
                f"not valid JSON ({reason})",
                f'Each line must be one JSON object with the text in the field "{self.json_key}": correct or remove '
                "the line",
            ) from error
        if not isinstance(row, dict):
            raise self._fault(at, f"expected a JSON object, found {json.dumps(row)[:60]}")
        if self.json_key not in row:
            there = ", ".join(f'"{name}"' for name in row) or "none"
            raise self._fault(
                at, f'no field "{self.json_key}"', f"Set data.text_key to one of the fields there: {there}"
            )
        value = row[self.json_key]
        if value is None:
            return "", replaced  # a missing text, as data sets have them: an empty document
        if not isinstance(value, str):
            raise self._fault(
                at,
                f'the field "{self.json_key}" is not a string but {json.dumps(value)[:60]}',
                "Set data.text_key to the field that holds the text",
            )
        value, surrogates = replace_surrogates(value)
        return value, replaced + surrogates

    def _fault(self, at: int, reason: str, advice: str = "") -> DataFault:
        return DataFault(self.path, self._place(at), reason, advice)

    def _too_large(self, at: int) -> DataFault:
        advice = "" if self.json_key is not None else ", or change data.text_separator"
        return too_large(self.path, self._place(at), None, self.max_document_bytes, advice)

    def _place(self, at: int) -> str:
        """A byte of the file, for people: of JSON its line. Lines are counted only now, when there is a fault."""
        if self.json_key is None:
            return f"from byte {at}"
        lines = 1
        with readable(self.path), open(self.path, "rb") as file:
            left = at
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                lines += chunk.count(b"\n")
                left -= len(chunk)
        return f"line {lines}"
