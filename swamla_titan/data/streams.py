"""The order of data: each logical stream reads the corpus segment by segment, shuffles, and packs documents.

A stream knows nothing of ranks and loader processes. What it yields is a function of (data, seed, its own number), and
its cursor, a few numbers, is all that is needed to continue from the same place. Documents are cut to fill sequences:
no padding, no target lost, no target twice.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from swamla_titan.data.corpus import Corpus
from swamla_titan.data.document import Cursor, Document, Position
from swamla_titan.data.exclusions import Exclusion, Moment, first_excluded
from swamla_titan.data.faults import Fault
from swamla_titan.data.order import permutation
from swamla_titan.data.retry import Retry, read_on
from swamla_titan.data.segments import Epoch, Slice
from swamla_titan.data.tokenizer import Tokenizer, with_eot
from swamla_titan.errors import UserError

# Documents are shuffled in blocks. A block ends early at this many characters, because a worker holds a block of each
# of its streams in memory. The limit is part of the order of the data.
BLOCK_CHARS = 16 << 20

_SLICES, _BLOCK = range(2)  # seeds by what a permutation is for, so that the two have different random numbers


def data_changed() -> UserError:
    """The error for a cursor that points to no document."""
    return UserError(
        "The checkpoint's place in the training data is not there any more: the data have changed since it was "
        "written. Restore them, or start a new run."
    )


@dataclass
class StreamDocument:
    """A document; its tokens from `begin` to `finish` are read, see `Slice`."""

    text: str
    key: tuple[int, int, int]  # (edition, unit, ordinal)
    replaced: int
    tokens: np.ndarray | None  # all, if they are known
    begin: int | float = 0
    finish: int | float | None = None

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """Cut the part that is read out of all `tokens` of the document."""
        begin, finish = (int(at * len(tokens)) if isinstance(at, float) else at for at in (self.begin, self.finish))
        return tokens[begin:finish]


class DocumentStream(Iterator[tuple[StreamDocument, Cursor]]):
    """The endless sequence of a stream's documents, epoch after epoch, each in another order; each with its cursor.

    An epoch of a stream is one segment of the corpus; the next epoch is the next segment. In an epoch the segment's
    units are read in a shuffled order, and the documents of a unit in shuffled blocks of `data.shuffle_documents`; with
    1 everything is read in the order of the files. A document that a border of segments cuts is read at the end of one
    epoch and at the beginning of the next, so that its parts follow each other.

    If files were added to a run, the corpus has several editions, see `Corpus`; the stream changes to the next one at
    the end of an epoch.

    A document that cannot be read raises its Fault, or with data.on_error = "skip_file" is excluded, together with what
    follows it in its file, in this and in all later epochs, see exclusions.py.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: int,
        cursor: Cursor | None = None,
        excluded: Iterable[Exclusion] = (),
        retry: Retry | None = None,
    ) -> None:
        """Begin with the document of `cursor`, or with the first one.

        `stream`: the key of its cursor, which in a mixture has the number of the source too. `excluded`: what the job
        has excluded so far. UserError if the cursor points to no document.
        """
        self._retry = retry or corpus.new_retry()
        # Exclusions of this stream; it appends what it finds unreadable.
        self.excluded = [each for each in excluded if each.stream == stream]
        # Whether the document of the cursor could not be read any more, so that the block after it comes first.
        self.lost_its_place = False
        self._corpus = corpus
        self._stream = stream
        self._shuffle = corpus.data.shuffle_documents
        self._reader: Iterator[Document] | None = None
        self._block: list[StreamDocument | None] = []
        self._order: list[int] = []
        self._empty_epochs = 0  # consecutive ones
        self._epoch_has_text = cursor is not None
        self._edition: int = cursor["edition"] if cursor else 0
        self._epoch: int = cursor["epoch"] if cursor else 0
        self._item: int = cursor["item"] if cursor else 0  # place in the epoch's order
        self._block_start: Position | None = cursor["position"] if cursor else None
        self._after_block: Position | None = self._block_start
        if self._edition >= len(corpus.sources):
            raise data_changed()
        self._begin_epoch()
        self._next = 0  # index in the block of the next document
        self._reloading = cursor is not None
        if cursor is not None:
            self._load_block()
            if not self.lost_its_place:
                self._next = cursor["document"]
                place = (self._item, self._block_start)
                if place != (cursor["item"], cursor["position"]) or self._next >= len(self._block):
                    raise data_changed()
        self._reloading = False

    def __next__(self) -> tuple[StreamDocument, Cursor]:
        if self._next == len(self._block):
            self._load_block()
            self._next = 0
        place = self._order[self._next]
        document = self._block[place]
        assert document is not None, "a document of a block is taken once"
        self._block[place] = None  # frees its text; resuming reads the block again
        cursor = {
            "edition": self._edition,
            "epoch": self._epoch,
            "item": self._item,
            "position": self._block_start,
            "document": self._next,
        }
        self._next += 1
        return document, cursor

    def _begin_epoch(self) -> None:
        segments = self._corpus.segments[self._edition]
        stream = self._stream % self._corpus.data.streams
        self._segment = (self._corpus.first_segments[stream] + self._epoch) % len(segments.cuts)
        self._slices = segments.epoch(self._segment, self._seeds(_SLICES) if self._shuffle > 1 else ())

    def _seeds(self, purpose: int, *more: int) -> tuple[int, ...]:
        return (self._corpus.seed, self._edition, self._segment, self._epoch, purpose, *more)

    def _load_block(self) -> None:
        """Read the next block that holds a document of this stream."""
        source = self._corpus.sources[self._edition]
        while True:
            if self._item >= len(self._slices):  # the epoch ends; one without text is followed by the next
                if self._reloading:
                    raise data_changed()
                self._next_epoch()
                source = self._corpus.sources[self._edition]
                continue
            piece = self._slices[self._item]
            part = piece.part
            if self._reader is None:  # nothing of this slice was read yet
                start = self._after_block
                if start is None and source.num_documents(part.unit) is not None:
                    start = {"ordinal": piece.first}
                self._reader = read_on(source, part.unit, start, part.every, part.offset, self._retry)
            self._block_start = self._after_block
            if self._read_block(self._reader, piece):
                self._epoch_has_text = True
                size = len(self._block)
                if self._shuffle > 1 and size > 1:
                    first = _ordinal(self._block_start)
                    self._order = permutation(size, *self._seeds(_BLOCK, part.unit, part.offset, first)).tolist()
                else:
                    self._order = list(range(size))
                return
            self._reader = self._after_block = None
            self._item += 1

    def _read_block(self, reader: Iterator[Document], piece: Slice) -> bool:
        """Fill the block; returns False if the slice has no further document."""
        self._block = []
        chars = 0
        unit = piece.part.unit
        file = self._corpus.sources[self._edition].unit_files[unit]
        # Excluded documents are not touched, because they may stall for minutes, or be readable again by now.
        ends = [end for end in (first_excluded(self.excluded, file, unit, self._moment), piece.end) if end is not None]
        try:
            while not ends or _ordinal(self._after_block) < min(ends):
                document = next(reader, None)
                if document is None or (ends and document.ordinal >= min(ends)):
                    break
                self._after_block = document.position  # even if the document does not become part of the block
                if document.ordinal < piece.first or document.is_empty or document in self._corpus.held_out:
                    continue
                key = (self._edition, unit, document.ordinal)
                tokens = document.prepared.tokens if document.prepared else None
                self._block.append(
                    StreamDocument(document.text, key, document.replaced, tokens, piece.begin, piece.finish)
                )
                chars += len(document.text)
                if len(self._block) == self._shuffle or chars >= BLOCK_CHARS:
                    break
        except Fault as fault:
            self._exclude(fault, file, unit)
        return bool(self._block)

    @property
    def _moment(self) -> Moment:
        return self._edition, self._epoch, self._item

    def _exclude(self, fault: Fault, file: str, unit: int) -> None:
        """Exclude the rest of a file behind the last document that was read, or raise its fault."""
        if fault.of_machine:
            raise fault
        if not self._corpus.skips_files:
            skipping = 'data.on_error = "skip_file" skips the rest of the file'
            fault.advice = f"{fault.advice}. {skipping}" if fault.advice else skipping
            raise fault
        if self._retry.nothing_answers:
            fault.advice = "Nothing else answers either, so it is not the file; start the same command again later"
            raise fault
        if self._reloading:
            # The order within a block follows from its number of documents, so none of them has its place any more.
            self._block = []
            self.lost_its_place, self._reloading = True, False
            self._after_block = self._block_start
        reason = fault.reason + (f" ({fault.tried})" if fault.tried else "")
        ordinal = _ordinal(self._after_block)
        self.excluded.append(Exclusion(self._stream, file, unit, ordinal, *self._moment, fault.place, reason))

    def _next_epoch(self) -> None:
        self._empty_epochs = 0 if self._epoch_has_text else self._empty_epochs + 1
        following = self._corpus.edition_after(self._edition)
        if following == self._edition:
            if self._empty_epochs >= len(self._corpus.segments[self._edition].cuts):  # once around the ring
                self._refuse_nothing()
            self._epoch += 1
        else:
            self._edition, self._epoch, self._empty_epochs = following, 0, 0
        self._item = 0
        self._epoch_has_text = False
        self._begin_epoch()

    def _refuse_nothing(self) -> None:
        if self.excluded:
            last = self.excluded[-1]
            raise UserError(
                "nothing is left of the training data: every file was skipped because it could not be "
                f"read, the last one, {last.file}, because: {last.reason}"
            )
        raise UserError(
            "validation: every document of the training data is held out. "
            "Lower validation.fraction, or give a validation.path with other text."
        )


def _ordinal(position: Position | None) -> int:
    return int(position["ordinal"]) if position else 0


class TokenCache:
    """Tokenizes documents and caches the last long ones, because other streams of the process read other parts of them.

    Without the cache, 64 streams over one book would tokenize it 64 times.
    """

    LONG_CHARS = 1 << 18
    MAX_TOKENS = 1 << 26  # in the cache, 4 bytes each

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def tokens(self, document: StreamDocument) -> np.ndarray:
        """The tokens of a document that are read, [n]; all of them are those of its text, then end of text."""
        if document.tokens is not None:
            return document.cut(document.tokens)
        tokens = self._kept.pop(document.key, None)
        if tokens is None:
            tokens = with_eot(self._tokenizer, document.text)
        if len(document.text) >= self.LONG_CHARS:
            self._kept[document.key] = tokens
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self.MAX_TOKENS:
                self._kept.popitem(last=False)
        return document.cut(tokens)


class Packed(NamedTuple):
    """A sequence of a stream, and the stream's cursor after it."""

    tokens: np.ndarray  # int32 [T + 1]: [:-1] are inputs, [1:] their targets; IGNORED is padding
    cursor: Cursor  # of the next sequence's first token
    replaced: int  # invalid UTF-8 byte sequences in documents that begin in this sequence
    excluded: list[Exclusion]  # what was found unreadable while it was packed


class PackedStream:
    """A stream's documents, concatenated and cut into sequences of T + 1 tokens that overlap by one.

    The last target of a sequence is the first input of the next, so every token but the very first is a target
    exactly once, also where sequences of several lengths follow each other.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: int,
        cache: TokenCache,
        cursor: Cursor | None = None,
        excluded: Iterable[Exclusion] = (),
        retry: Retry | None = None,
    ) -> None:
        """Continue at `cursor`, or begin a stream; see DocumentStream."""
        if cursor is not None and cursor["sequences"] == 0:
            cursor = None  # of a stream that was never read
        excluded = list(excluded)
        self._cache, self._eot = cache, corpus.tokenizer.eot_id
        self._documents = DocumentStream(corpus, stream, cursor, excluded, retry)
        self._known = sum(each.stream == stream for each in excluded)  # exclusions that were given, or yielded
        self._sequences = cursor["sequences"] if cursor else 0
        self._begin(None if self._documents.lost_its_place else cursor)

    def _begin(self, cursor: Cursor | None) -> None:
        """Begin with the document that comes next, and if there is a `cursor`, at its token."""
        self._tokens = np.empty(0, dtype=np.int32)
        self._offset = 0  # of the next sequence's first token, in the document's tokens that are read
        self._document = initial_cursor()  # the cursor of the document that is being read
        if cursor is not None:
            # The document was begun, and its replacements counted, before the cursor was saved.
            self._begin_next_document()
            self._offset = cursor["token"]
            if self._offset >= len(self._tokens):
                raise data_changed()

    def next(self, seq_len: int) -> Packed:
        """The next sequence of `seq_len` tokens, and their targets."""
        sequence = np.empty(seq_len + 1, dtype=np.int32)
        filled = replaced = 0
        # One document after the other fills the sequence. The last target is put back afterwards, because the next
        # sequence begins with it.
        while filled <= seq_len:
            while self._offset >= len(self._tokens):
                replaced += self._begin_next_document()
            part = self._tokens[self._offset : self._offset + seq_len + 1 - filled]
            sequence[filled : filled + len(part)] = part
            filled += len(part)
            self._offset += len(part)
        self._offset -= 1
        return self._packed(sequence, self._document | {"token": self._offset}, replaced)

    def _packed(self, tokens: np.ndarray, document: Cursor, replaced: int, more: Cursor | None = None) -> Packed:
        """A sequence, after which the stream continues with a token of `document`."""
        self._sequences += 1
        excluded = self._documents.excluded[self._known :]
        self._known += len(excluded)
        return Packed(tokens, document | {"sequences": self._sequences} | (more or {}), replaced, excluded)

    def _begin_next_document(self) -> int:
        """Returns the document's number of invalid UTF-8 byte sequences, which count where its beginning is read."""
        document, self._document = next(self._documents)
        self._tokens, self._offset = self._cache.tokens(document), 0
        return 0 if document.begin else document.replaced


def initial_cursor() -> Cursor:
    """The cursor at the beginning of a stream."""
    return {"edition": 0, "epoch": 0, "item": 0, "position": None, "document": 0, "token": 0, "sequences": 0}


def completed_epochs(cursors: Iterable[Cursor]) -> int:
    """How often all of the streams have read the data, since files were last added to them."""
    return min((cursor["epoch"] for cursor in cursors), default=0)


def is_cursor(value: Any) -> bool:
    """Whether a value from a checkpoint has the form of a cursor; whether it points to a document, reading shows."""
    if not isinstance(value, dict) or value.keys() - {"taken"} != initial_cursor().keys():
        return False
    taken = value.get("taken", "0")  # see best_fit.py
    if type(taken) is not str or not re.fullmatch("[0-9a-f]{1,65536}", taken):
        return False
    numbers = {**value, "position": 0, "taken": 0}.values()
    position = value["position"]
    return all(map(_is_count, numbers)) and (
        position is None or (isinstance(position, dict) and _is_position(position))
    )


def _is_position(position: dict[str, Any]) -> bool:
    """Whether it has a document's ordinal, beside what the source adds: numbers of bytes, or a state as text."""
    return "ordinal" in position and all(
        type(value) is str if name == "state" else _is_count(value) for name, value in position.items()
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def indexed_cursor(corpus: Corpus, stream: int, sequences: int, token: int, tokens: np.ndarray) -> Cursor:
    """The cursor of a new run's stream after so many sequences, found in the index without reading.

    `token`: the length of these sequences in all. `tokens`: `training_tokens` of the index.
    """
    if sequences == 0:
        return initial_cursor()
    [segments] = corpus.segments
    count, total = len(segments.cuts), segments.tokens
    assert total
    epoch, token = token // total * count, token % total  # as many epochs as there are segments read everything once
    while True:
        segment = (corpus.first_segments[stream] + epoch) % count
        size = (segment + 1) * total // count - segment * total // count
        if token < size:
            break
        epoch, token = epoch + 1, token - size
    seeds = (corpus.seed, 0, segment, epoch, _SLICES) if corpus.data.shuffle_documents > 1 else ()
    order = segments.epoch(segment, seeds)
    assert isinstance(order, Epoch)
    item, offset = order.find(token, tokens)
    return initial_cursor() | {"epoch": epoch, "item": item, "token": offset, "sequences": sequences}
