"""A document, and a source of documents with its units."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swamla_titan.data.faults import DataFault, Fault

MIB = 1 << 20

# Where reading continues inside a unit: small, made of JSON types. "ordinal" is the number, within the unit, of the
# document read next; the other keys are the source's own.
Position = dict[str, Any]

Cursor = dict[str, Any]  # where a stream stands, see streams.py; made of JSON types


@dataclass(frozen=True)
class Document:
    """One text, with what is needed to continue after it.

    `ordinal` numbers the documents of a unit from 0; `position` is the place just after this document; `replaced`
    counts the stretches of bytes that were not UTF-8 and became U+FFFD.
    """

    text: str
    ordinal: int
    position: Position
    replaced: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing but white space: there is nothing to learn from it, and it is skipped everywhere."""
        return not self.text or self.text.isspace()


class Unit(Protocol):
    """A part of a source that is read independently of the others: a file, a part of one, a shard."""

    @property
    def num_documents(self) -> int | None:
        """How many documents it has; reading can begin at any of them. None: that is known only after reading."""
        ...

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        """Its documents from `position` (None: its start) on, but only those with `ordinal % every == offset`.

        The others are skipped as cheaply as possible. Raises DataFault for input that cannot be used, Unreachable where
        a disk or a server does not answer; both are a Fault.
        """
        ...


@dataclass
class Source:
    """A fixed, ordered list of units. Loader processes get a copy of it.

    `unit_sizes` says how much text each unit holds, about: in bytes, or where `sizes_are_known` is False in any
    measure. `unit_files` names the file that a unit is part of; units of one file follow each other, in the order of
    the file. `fingerprint` changes with the content as far as names and sizes show, not with the folder it lies in;
    sizes follow from what it covers. `old_fingerprint` is what an earlier version had in its place. `description` says
    what there is to read, and what is not read, in a line for the log. `keys` are those of [data] that decide what is
    read as text. `record` has what must be remembered of the files (JSON types) to divide them into the same units once
    more, also when some of them cannot be read any more. `unreadable` says why files have no units: they could not be
    opened, and the policy is to continue without them.
    """

    units: Sequence[Unit]
    unit_sizes: Sequence[int]
    unit_files: Sequence[str]
    fingerprint: str
    description: str
    sizes_are_known: bool = True
    keys: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)
    unreadable: list[Fault] = field(default_factory=list)
    old_fingerprint: str = ""

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def text_bytes(self) -> int | None:
        """How many bytes of text there are in all, about; None where that is known only after reading."""
        return sum(self.unit_sizes) if self.sizes_are_known else None

    def num_documents(self, unit: int) -> int | None:
        """How many documents a unit has, if that is known without reading it."""
        return self.units[unit].num_documents

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        """Documents of a unit, see `Unit.read`."""
        return self.units[unit].read(position, every, offset)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Text of UTF-8 bytes, and how many stretches of bytes were no UTF-8 and became U+FFFD."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count(b"\xef\xbf\xbd")


def replace_surrogates(text: str) -> tuple[str, int]:
    """JSON can spell half a surrogate pair, which no encoding can write: each becomes U+FFFD and is counted."""
    if text.isascii():
        return text, 0
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        clean = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
        return clean, clean.count("\ufffd") - text.count("\ufffd")


def too_large(file: str, place: str, size: int | None, max_document_bytes: int, advice: str = "") -> DataFault:
    """The fault of a document above data.max_document_mib; `size` None means that it was not read to its end."""
    found = f"a document of {size / MIB:.1f} MiB" if size is not None else "a document"
    limit = f"data.max_document_mib = {max_document_bytes // MIB}"
    return DataFault(file, place, f"{found} is larger than {limit}", f"Raise data.max_document_mib{advice}")
