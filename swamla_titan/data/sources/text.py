"""Units of text files: full files, and byte ranges of files of many documents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from swamla_titan.data.document import Document, Position, decode_utf8, replace_surrogates, too_large
from swamla_titan.data.faults import DataFault, cut_short, of_another_size
from swamla_titan.data.sources.content import HEAD_BYTES, other_than_text
from swamla_titan.data.sources.files import decompressed_head, head_of, opened, require_size
from swamla_titan.data.sources.folder import listed

BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 18  # bytes read at a time while looking for a separator
BEYOND = 1 << 14  # the same, beyond a range's end: its last document may end soon


ENDLESS = 1 << 62  # the end of a text whose length is not known


@dataclass(frozen=True)
class WholeFile:
    """A file of `size` bytes that is one document; `compressed`: the ending by which it is, see files.py."""

    path: str
    size: int
    max_document_bytes: int
    compressed: str = ""

    @property
    def num_documents(self) -> int:
        return 1

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        if (position or {"ordinal": 0})["ordinal"] > 0 or offset > 0:
            return
        if self.compressed:
            require_size(self.path, self.size)
        with opened(self.path, self.compressed) as file:
            data = file.read((self.max_document_bytes if self.compressed else self.size) + 1)
        if self.compressed and len(data) > self.max_document_bytes:
            raise too_large(self.path, "", None, self.max_document_bytes, ", or split the file by data.text_separator")
        if not self.compressed and len(data) != self.size:
            raise of_another_size(self.path, self.size)
        text, replaced = decode_utf8(data.removeprefix(BOM))
        yield Document(text, 0, {"ordinal": 1}, replaced)


@dataclass(frozen=True)
class FileRange:
    """The documents that start in bytes [start, end) of a file whose documents `separator` separates.

    Overlapping separators are one border: with "\\n\\n", all of "\\n\\n\\n" separates two documents. So the bytes
    around a border determine it, without reading the file from its beginning, and neighbouring ranges meet exactly: no
    document is lost, read twice or cut differently, however the ranges are chosen.
    """

    path: str
    size: int  # of the file
    start: int
    end: int
    separator: bytes
    max_document_bytes: int
    json_key: str | None = None  # lines are JSON objects with the text in this field; None: plain text
    compressed: str = ""  # the ending by which it is, see files.py; `start` and `end` are then those of the text

    @property
    def num_documents(self) -> None:
        return None

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        require_size(self.path, self.size)
        with opened(self.path, self.compressed) as file:
            start = position["byte"] if position else self._first_start(file)
            ordinal = position["ordinal"] if position else 0
            for data, at, after in self._split(file, start):
                if at == 0 or self.json_key is not None:  # files with a byte order mark may have been concatenated
                    data = data.removeprefix(BOM)
                if not data or data.isspace():
                    continue
                if ordinal % every == offset:
                    text, replaced = self._parse(data, at)
                    yield Document(text, ordinal, {"ordinal": ordinal + 1, "byte": after}, replaced)
                ordinal += 1

    def _first_start(self, file: BinaryIO) -> int:
        """The first byte at or after `start` that follows a border; the file's first byte and its end count as such."""
        if self.start == 0:
            return 0
        # A border that ends at `start` or later has a separator from here on, and each of its separators leads to its
        # end. What is before the first separator is the rest of an earlier range's document.
        begin = max(0, self.start - len(self.separator))
        if not self._holds_separator(file, begin):
            # The range is in the middle of one document.
            if self.end - self.start > self.max_document_bytes:
                raise self._too_large(self.start)
            return self.end
        _, _, after = next(self._split(file, begin))
        return after

    def _holds_separator(self, file: BinaryIO, begin: int) -> bool:
        """Whether a separator starts in bytes [begin, end), so that not each range reads a long document to its end."""
        file.seek(begin)
        at, kept = begin, b""
        while at < self.end + len(self.separator) - 1:
            chunk = file.read(min(CHUNK, self.end + len(self.separator) - 1 - at))
            if not chunk:
                break
            if self.separator in kept + chunk:
                return True
            at += len(chunk)
            kept = (kept + chunk)[-len(self.separator) + 1 :] if len(self.separator) > 1 else b""
        return False

    def _split(self, file: BinaryIO, start: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (document, its first byte, first byte after the border behind it) for each that starts before `end`.

        A border that reaches `end` is not followed further, because the document behind it is not in this range.
        """
        self._seek(file, start)
        buffer = bytearray()
        at = start  # of the buffer's first byte
        searched = 0  # no separator starts before this place of the buffer
        while at < self.end:
            found = buffer.find(self.separator, searched)
            if found < 0:
                # Only a separator that the next chunk may complete is searched again.
                searched = max(0, len(buffer) - len(self.separator) + 1)
                if len(buffer) - len(self.separator) > self.max_document_bytes:
                    raise self._too_large(at)
                if self._fill(file, buffer, at):
                    continue
                if len(buffer) > self.max_document_bytes:
                    raise self._too_large(at)
                if buffer:
                    yield bytes(buffer), at, at + len(buffer)
                return
            if found > self.max_document_bytes:
                raise self._too_large(at)
            after = self._border_end(file, buffer, at, found)
            yield bytes(memoryview(buffer)[:found]), at, at + after
            del buffer[:after]
            at += after
            searched = 0

    def _border_end(self, file: BinaryIO, buffer: bytearray, at: int, found: int) -> int:
        """The end of the border that begins with the separator at index `found` of the buffer."""
        length = len(self.separator)
        while length > 1 and at + found + length < self.end:
            overlapping = found + 2 * length - 1  # the end of the last separator that would overlap this one
            while len(buffer) < overlapping and self._fill(file, buffer, at):
                pass
            last = buffer.rfind(self.separator, found + 1, overlapping)
            if last < 0:
                break
            found = last
        return found + length

    def _seek(self, file: BinaryIO, start: int) -> None:
        if not self.compressed:
            file.seek(start)
            return
        while start > 0 and (skipped := len(file.read(min(CHUNK, start)))):
            start -= skipped

    def _fill(self, file: BinaryIO, buffer: bytearray, at: int) -> bool:
        """Append the next bytes to the buffer, which begins with byte `at`; returns False at the end of the file."""
        there = at + len(buffer)
        size = CHUNK
        if not self.compressed:
            size = min(CHUNK, max(self.end - there, BEYOND), self.size - there)
            if size <= 0:
                return False
        chunk = file.read(size)
        if not chunk:
            if self.compressed:  # whose end only reading shows
                return False
            raise cut_short(self.path, self._place(there))
        buffer += chunk
        return True

    def require_first(self, head: bytes) -> None:
        """Raise DataFault unless the first document is valid, as far as the file's first bytes show it."""
        lines, at = head.split(b"\n"), 0
        if len(head) >= HEAD_BYTES or self.compressed:
            lines.pop()  # it may continue
        for line in lines:
            data = line.removeprefix(BOM)
            if data and not data.isspace():
                self._parse(data, at)
                return
            at += len(line) + 1

    def _parse(self, data: bytes, at: int) -> tuple[str, int]:
        text, replaced = decode_utf8(data)
        if self.json_key is None:
            return text, replaced
        try:
            row = _loaded(text)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise self._fault(at, f"not valid JSON ({reason})", self._json_advice(data)) from error
        if not isinstance(row, dict):
            raise self._fault(at, f"expected a JSON object, found {_shown(row)}", self._json_advice(data))
        if self.json_key not in row:
            there = listed([f'"{name}"' for name in row], 20) or "none"
            raise self._fault(
                at, f'no field "{self.json_key}"', f"Set data.text_key to one of the fields there: {there}"
            )
        value = row[self.json_key]
        if value is None:
            return "", replaced  # a missing text, as datasets have them: an empty document
        if not isinstance(value, str):
            raise self._fault(
                at,
                f'the field "{self.json_key}" is not a string but {_shown(value)}',
                "Set data.text_key to the field that holds the text",
            )
        value, surrogates = replace_surrogates(value)
        return value, replaced + surrogates

    def _json_advice(self, data: bytes) -> str:
        """What to do about a line that is not a JSON object."""
        start = data.strip()[:1]
        if start == b"[":
            return "If the file is one JSON array, write its objects a line each: jq -c '.[]' FILE > NEW.jsonl"
        if start == b"{" and not data.strip().endswith(b"}"):
            return "If a JSON object takes several lines here, write each on one: jq -c . FILE > NEW.jsonl"
        key = self.json_key
        return f'Each line must be one JSON object with the text in the field "{key}": correct or remove the line'

    def _fault(self, at: int, reason: str, advice: str = "") -> DataFault:
        return DataFault(self.path, self._place(at), reason, advice)

    def _too_large(self, at: int) -> DataFault:
        advice = "" if self.json_key is not None else ", or change data.text_separator"
        return too_large(self.path, self._place(max(at, self.start)), None, self.max_document_bytes, advice)

    def _place(self, at: int) -> str:
        """The place of a byte, for a message: of JSON its line, which is counted only for a fault."""
        if self.json_key is None:
            return f"from byte {at}"
        lines = 1
        with opened(self.path, self.compressed) as file:
            left = at
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                lines += chunk.count(b"\n")
                left -= len(chunk)
        return f"line {lines}"


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer has more digits than Python converts; it is not the text, so rounding does no harm
        return json.loads(text, parse_int=float)


def _shown(value: object) -> str:
    """The beginning of a JSON value, for a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:60]


def require_text(path: str, compressed: str = "", json_key: str | None = None) -> float:
    """Raise DataFault if a file does not begin with text, or with a JSON object that has text in the field `json_key`.

    Returns how many bytes of text a byte of the file stands for, if it is `compressed`; else 1.
    """
    head, ratio = decompressed_head(path, compressed) if compressed else (head_of(path), 1.0)
    if other := other_than_text(head):
        raise DataFault(path, "", f"it is {other.what}", other.advice)
    if json_key is not None:
        FileRange(path, ENDLESS, 0, ENDLESS, b"\n", ENDLESS, json_key, compressed).require_first(head)
    return ratio
