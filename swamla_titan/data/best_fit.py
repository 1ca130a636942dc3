"""Packing by best fit: whole documents share sequences, and what they leave of a sequence is padding.

    waiting, the oldest first:  [aaaaaaaaaaaa|bb|cccccc|dddd|eee ...          cut in sequences of T + 1 = 10 tokens:
    [aaaaaaaaaa] [aaa|cccccc.] [bb|dddd|eee.]                                 a is longer, so it is cut; . is padding

A window of the stream's next documents waits. Each sequence begins with the oldest of them, so none waits for long, and
takes the longest that still fits, until none does. A document is cut only if it is longer than a sequence: its pieces
overlap by one token, so that each token but its first is a target once. A piece without an end of text (of such a
document, or of one that a border of segments cuts) is the last of its sequence, because nothing could follow it.
"""

from dataclasses import dataclass

import numpy as np

from swamla_titan.data.batches import IGNORED
from swamla_titan.data.document import Cursor
from swamla_titan.data.streams import Packed, PackedStream, data_changed

# The size of a window; both are part of the order of the data.
WINDOW_DOCUMENTS = 128
WINDOW_TOKENS = 1 << 18


@dataclass(eq=False)
class _Waiting:
    """A document of the window: its place among the documents that were read, its tokens from `offset` on."""

    number: int
    cursor: Cursor
    tokens: np.ndarray
    replaced: int
    offset: int = 0

    @property
    def left(self) -> int:
        """Tokens that are left of it."""
        return len(self.tokens) - self.offset


class BestFitStream(PackedStream):
    """A stream's documents, packed whole into sequences of T + 1 tokens; padding is IGNORED.

    The cursor is that of the oldest document that waits, and `taken` says which of those behind it are used: bit k - 1
    of the number in hexadecimal digits for the k-th.
    """

    _window: list[_Waiting]

    def _begin(self, cursor: Cursor | None) -> None:
        self._window, self._numbers = [], 0  # of the documents that were read
        self._taken = (
            int(cursor.get("taken", "0"), 16) if cursor else 0
        )  # of documents that are not read yet: bit k of number k
        self._taken <<= 1
        if cursor is None:
            return
        self._read_document()
        [oldest] = self._window
        oldest.offset = cursor["token"]
        oldest.replaced = oldest.replaced if oldest.offset == 0 else 0  # counted where its beginning was placed
        if oldest.left < 1:
            raise data_changed()

    def next(self, seq_len: int) -> Packed:
        """As in PackedStream."""
        while not self._window or (
            len(self._window) < WINDOW_DOCUMENTS and sum(each.left for each in self._window) < WINDOW_TOKENS
        ):
            self._read_document()
        sequence = np.full(seq_len + 1, IGNORED, dtype=np.int32)
        filled = replaced = 0
        chosen: _Waiting | None = self._window[0]
        while chosen:
            size = min(chosen.left, seq_len + 1 - filled)
            sequence[filled : filled + size] = chosen.tokens[chosen.offset : chosen.offset + size]
            filled, replaced, chosen.replaced = filled + size, replaced + chosen.replaced, 0
            if size < chosen.left:
                chosen.offset += size - 1  # of a document that is longer than a sequence, which is full now
                break
            self._window.remove(chosen)
            closes = sequence[filled - 1] != self._eot
            fitting = [each for each in self._window if each.left <= seq_len + 1 - filled]
            chosen = None if closes else max(fitting, key=lambda each: each.left, default=None)
        if not self._window:
            self._read_document()  # for the cursor
        oldest = self._window[0]
        left = sum(1 << each.number - oldest.number for each in self._window)
        taken = ((1 << self._numbers - oldest.number) - 1 & ~left) >> 1
        return self._packed(sequence, oldest.cursor | {"token": oldest.offset}, replaced, {"taken": f"{taken:x}"})

    def _read_document(self) -> None:
        """Add the next document to the window that was not used before the cursor."""
        while True:
            document, cursor = next(self._documents)
            number, self._numbers = self._numbers, self._numbers + 1
            if not self._taken >> number & 1:
                break
        tokens = self._cache.tokens(document)
        self._window.append(_Waiting(number, cursor, tokens, 0 if document.begin else document.replaced))


PACKINGS: dict[str, type[PackedStream]] = {"concatenate": PackedStream, "best_fit": BestFitStream}
