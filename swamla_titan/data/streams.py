"""The order of documents: the corpus dealt into logical streams, each shuffled by itself.

A stream knows nothing of ranks and loader workers. What it yields is a function of (data, seed, its own number), and
its cursor, a few numbers, is all that is needed to go on from the same place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from swamla_titan.data.corpus import Corpus
from swamla_titan.data.dealing import Share
from swamla_titan.data.document import Document, Position
from swamla_titan.data.faults import Fault
from swamla_titan.data.patience import Patience, read_on
from swamla_titan.data.skips import Moment, Skip, added, first_skipped, skips_of
from swamla_titan.errors import UserError

# A block of documents to be shuffled is closed early at this many characters, so that a thousand long documents do
# not fill the memory, times the streams of a worker. It decides the order of the data.
BLOCK_CHARS = 16 << 20

_UNITS, _BLOCK, _START = range(3)  # what a permutation is for; keeps the random numbers of the three apart


def data_changed() -> UserError:
    """The error for a cursor that points to nothing."""
    return UserError(
        "The checkpoint's place in the training data is not there any more: the data have changed since it was "
        "written. Restore them, or start a new run."
    )


@dataclass
class StreamDocument:
    """A document on its way to the tokenizer. `key` tells it from every other document of the source."""

    text: str
    key: tuple[int, int]  # (unit, ordinal)
    replaced: int


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A random order of `size` things that depends on the numbers `seeds` alone.

    Made of raw bits of a counter-based generator: unlike `Generator.permutation`, those are promised to stay the
    same in later releases of numpy.
    """
    return np.argsort(_random_bits(size, *seeds), kind="stable")


def _random_bits(size: int, *seeds: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(size)


class DocumentStream:
    """The endless sequence of a stream's documents, epoch after epoch, each in another order.

    Within an epoch the stream's units come in a shuffled order, and the documents of a unit in shuffled blocks of
    `data.shuffle_documents`; with 1 everything keeps the order of the files. A stream that owns no document at all
    borrows: it reads the whole corpus, in an order of its own.

    What cannot be read raises its Fault, or with data.on_error = "skip_file" is passed over, with what follows it in
    its file: from then on for ever, see skips.py. Each stream comes upon damage by itself, at a place in its own order,
    so that no stream needs to know of the others.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: int,
        cursor: dict[str, Any] | None = None,
        patience: Patience | None = None,
        skips: list[Skip] | None = None,
    ) -> None:
        """`skips`: those of a stream that begins; a cursor holds its own."""
        self._patience = patience or corpus.new_patience()
        self._skips = skips_of(stream, cursor) if cursor else list(skips or [])
        self._new_skips: list[Skip] = []
        # The document of the cursor could not be read any more: `next_document` gives what comes after its block.
        self.lost_its_place = False
        self._corpus = corpus
        self._stream = stream
        self._shuffle = corpus.data.shuffle_documents
        self._reader: Iterator[Document] | None = None
        self._block: list[StreamDocument | None] = []
        self._order: list[int] = []
        self._epoch_has_text = cursor is not None
        self.borrows: bool = cursor["borrows"] if cursor else False
        self._epoch: int = cursor["epoch"] if cursor else 0
        self._unit: int = cursor["unit"] if cursor else 0  # place in the epoch's order, not the source's number
        self._block_start: Position | None = cursor["position"] if cursor else None
        self._after_block: Position | None = self._block_start
        self._begin_epoch()
        self._next = 0  # place in the block of the document that `next_document` will give
        self._reloading = cursor is not None
        if cursor is not None:
            self._load_block()
            if not self.lost_its_place:
                self._next = cursor["document"]
                if self._block_start != cursor["position"] or self._next >= len(self._block):
                    raise data_changed()
        self._reloading = False

    def next_document(self) -> StreamDocument:
        """The next document. On a stream resumed from a cursor the first one is that of the cursor again."""
        if self._next == len(self._block):
            self._load_block()
            self._next = 0
        place = self._order[self._next]
        document = self._block[place]
        assert document is not None, "a document of a block is taken once"
        self._block[place] = None  # its text is not needed again: resuming re-reads the block
        self._next += 1
        return document

    def cursor(self) -> dict[str, Any]:
        """The place of the document that `next_document` gave last (JSON types)."""
        return {
            "epoch": self._epoch,
            "unit": self._unit,
            "position": self._block_start,
            "document": self._next - 1,
            "borrows": self.borrows,
        }

    @property
    def skips(self) -> list[Skip]:
        """All that is passed over; belongs into the cursor."""
        return self._skips

    def new_skips(self) -> list[Skip]:
        """Those added since the last call."""
        new, self._new_skips = self._new_skips, []
        return new

    def start_fraction(self) -> float:
        """How far into its first document a borrowing stream starts, in [0, 1); 0 for a stream of its own documents.

        Without it, the streams that borrow from a corpus of one long document would all read the same text in step.
        """
        if not self.borrows:
            return 0.0
        return int(_random_bits(1, self._corpus.seed, self._stream, _START)[0]) / 2**64

    def _begin_epoch(self) -> None:
        if self.borrows:
            own = [Share(unit, 1, 0) for unit in range(self._corpus.source.num_units)]
        else:
            own = self._corpus.dealing[self._stream]
        if self._shuffle > 1:
            own = [own[i] for i in permutation(len(own), *self._seeds(_UNITS, self._epoch))]
        self._shares = own

    def _seeds(self, *purpose: int) -> tuple[int, ...]:
        return (self._corpus.seed, self._stream, int(self.borrows), *purpose)

    def _load_block(self) -> None:
        """Reads the next block that holds a document of this stream."""
        while True:
            if self._unit >= len(self._shares):
                raise data_changed()
            share = self._shares[self._unit]
            if self._reader is None:
                self._reader = read_on(
                    self._corpus.source, share.unit, self._after_block, share.every, share.offset, self._patience
                )
            self._block_start = self._after_block
            if self._read_block(self._reader, share.unit):
                self._epoch_has_text = True
                size = len(self._block)
                if self._shuffle > 1:
                    first = self._block_start["ordinal"] if self._block_start else 0
                    self._order = permutation(size, *self._seeds(_BLOCK, self._epoch, share.unit, first)).tolist()
                else:
                    self._order = list(range(size))
                return
            self._next_unit()

    def _read_block(self, reader: Iterator[Document], unit: int) -> bool:
        """Fills the block; False if the unit has no further document for this stream."""
        self._block = []
        chars = 0
        file = self._corpus.source.file_of(unit)
        end = first_skipped(self._skips, file, unit, self._moment)
        try:
            # What is passed over is not touched: it may stop the reading for minutes, or be whole again by now.
            while end is None or _ordinal(self._after_block) < end:
                document = next(reader, None)
                if document is None:
                    break
                self._after_block = document.position
                if document.is_empty or document in self._corpus.held_out:
                    continue
                self._block.append(StreamDocument(document.text, (unit, document.ordinal), document.replaced))
                chars += len(document.text)
                if len(self._block) == self._shuffle or chars >= BLOCK_CHARS:
                    break
        except Fault as fault:
            self._pass_over(fault, file, unit)
        return bool(self._block)

    @property
    def _moment(self) -> Moment:
        return int(self.borrows), self._epoch, self._unit

    def _pass_over(self, fault: Fault, file: str, unit: int) -> None:
        """The rest of a file, from behind the last document that was read; or raise its fault."""
        if fault.of_machine:
            raise fault
        if not self._corpus.skips_files:
            skipping = 'data.on_error = "skip_file" passes over the rest of the file'
            fault.advice = f"{fault.advice}. {skipping}" if fault.advice else skipping
            raise fault
        if self._patience.is_lost:
            fault.advice = "Nothing else answers either, so it is not the file; start the same command again later"
            raise fault
        if self._reloading:
            # Their order is known only with all of a block's documents, so none of them has a place any more.
            self._block = []
            self.lost_its_place, self._reloading = True, False
            self._after_block = self._block_start
        reason = fault.reason + (f" ({fault.tried})" if fault.tried else "")
        skip = Skip(self._stream, file, unit, _ordinal(self._after_block), self._moment, fault.place, reason)
        self._skips = added(self._skips, skip)
        self._new_skips.append(skip)

    def _next_unit(self) -> None:
        self._reader = None
        self._after_block = None
        self._unit += 1
        if self._unit < len(self._shares):
            return
        if not self._epoch_has_text:
            if self.borrows:
                if self._skips:
                    last = self._skips[-1]
                    raise UserError(
                        "nothing is left of the training data: every file was passed over because it could not be "
                        f"read, the last one, {last.file}, because: {last.reason}"
                    )
                raise UserError(
                    "validation: every document of the training data is held out. "
                    "Lower validation.fraction, or give a validation.path with other text."
                )
            self.borrows = True
            self._epoch = -1
        self._epoch += 1
        self._unit = 0
        self._epoch_has_text = False
        self._begin_epoch()


def _ordinal(position: Position | None) -> int:
    return int(position["ordinal"]) if position else 0
