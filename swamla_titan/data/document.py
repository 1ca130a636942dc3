"""Documents, and sources of documents, which consist of units."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from swamla_titan.data.faults import DataFault, Fault

MIB = 1 << 20

# A place inside a unit, of JSON types: "ordinal" is the number, within the unit, of the document to be read next; other
# keys are the source's own.
Position = dict[str, Any]

Cursor = dict[str, Any]  # a stream's position, of JSON types; see streams.py


def text_hash(text: str) -> int:
    """A hash in [0, 2**64), the same on every machine and in every run."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Prepared:
    """A text that was tokenized in advance: its tokens, the last one being end of text, and what is known of it."""

    tokens: np.ndarray  # unsigned [n]
    hash: int  # `text_hash`
    size: int  # bytes in UTF-8


@dataclass(frozen=True)
class Document:
    """A text, and the position after it, from which reading can continue.

    `ordinal` numbers the documents of a unit from 0. `replaced` counts invalid UTF-8 byte sequences, which became
    U+FFFD. A document that was `prepared` has no text.
    """

    text: str
    ordinal: int
    position: Position
    replaced: int = 0
    prepared: Prepared | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it is nothing but white space; such documents are skipped everywhere."""
        return self.prepared is None and (not self.text or self.text.isspace())

    @property
    def hash(self) -> int:
        """The `text_hash` of its text."""
        return self.prepared.hash if self.prepared else text_hash(self.text)

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return self.prepared.size if self.prepared else len(self.text.encode(errors="surrogatepass"))


class Unit(Protocol):
    """A part of a source that is read independently of the others: a file, a part of one, a shard."""

    @property
    def num_documents(self) -> int | None:
        """Number of documents, at any of which reading can begin; None if it is known only after reading."""
        ...

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        """Yield the documents from `position` (None: the start) on that have `ordinal % every == offset`.

        The others are skipped as cheaply as possible. Raises DataFault for input that cannot be used, Unreachable where
        a disk or a server does not answer; both are Faults.
        """
        ...


class Index(Protocol):
    """What a source of prepared documents knows of them without reading them.

    `starts`: the number of each unit's first document, and behind the last one the number of all, int64 [units + 1].
    """

    starts: np.ndarray

    def scan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Number of tokens, int64 [n], and `text_hash`, uint64 [n], of all documents, many at a time."""
        ...

    def require_tokenizer(self, name: str, fingerprint: str) -> None:
        """Raise UserError unless the documents were prepared with this tokenizer."""
        ...


@dataclass
class Source:
    """A fixed, ordered list of units; loader processes get a copy of it.

    unit_sizes: about how much text each unit holds, in bytes; in any measure if `sizes_are_known` is False.
    unit_files: the file that each unit is a part of; units of one file follow each other, in the order of the file.
    fingerprint: changes with names and sizes of the files, not with the folder that they are in.
    old_fingerprint: the same as an earlier version computed it.
    index: of documents that were tokenized in advance, any of which can be read at once; None: they are texts.
    description: a log line on what is read, and what is not.
    keys: those of [data] that determine the text of documents.
    record: what divides the files into the same units again (JSON types), even if some cannot be read any more.
    unreadable: files without units, because they could not be opened and data.on_error says to skip such files.
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
    index: Index | None = None

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def num_parts(self) -> int:
        """How many parts streams can share: documents that can be read at once, or units."""
        return self.num_units if self.index is None else int(self.index.starts[-1])

    @property
    def text_bytes(self) -> int | None:
        """About how many bytes of text there are; None if it is known only after reading."""
        return sum(self.unit_sizes) if self.sizes_are_known else None

    def num_documents(self, unit: int) -> int | None:
        """Number of documents of a unit; None if it is known only after reading."""
        return self.units[unit].num_documents

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        """Read a unit; see `Unit.read`."""
        return self.units[unit].read(position, every, offset)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Decode UTF-8; also returns the number of invalid byte sequences, which became U+FFFD."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count(b"\xef\xbf\xbd")


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD; also returns their number."""
    if text.isascii():
        return text, 0
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        clean = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
        return clean, clean.count("\ufffd") - text.count("\ufffd")


def too_large(file: str, place: str, size: int | None, max_document_bytes: int, advice: str = "") -> DataFault:
    """The fault of a document larger than data.max_document_mib; `size` None: it was not read to its end."""
    found = f"a document of {size / MIB:.1f} MiB" if size is not None else "a document"
    limit = f"data.max_document_mib = {max_document_bytes // MIB}"
    return DataFault(file, place, f"{found} is larger than {limit}", f"Raise data.max_document_mib{advice}")
