"""Packing by best fit: whole documents share sequences, and what they leave of a sequence is padding.

    waiting, the oldest first:  [aaaaaaaaaaaa|bb|cccccc|dddd|eee ...          cut in sequences of T + 1 = 10 tokens:
    [aaaaaaaaaa] [aaa|cccccc.] [bb|dddd|eee.]                                 a is longer, so it is cut; . is padding

A window of the stream's next documents waits. Each sequence begins with the oldest of them, so none waits for long, and
takes the longest that still fits, until none does. A document is cut only if it is longer than a sequence: its pieces
overlap by one token, so that each token but its first is a target once. A piece without an end of text (of such a
document, or of one that a border of segments cuts) is the last of its sequence, because nothing could follow it.
"""

from bisect import bisect_left, bisect_right, insort
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

    def _begin(self, cursor: Cursor | None) -> None:
        self._window: dict[int, _Waiting] = {}  # by number, the oldest first
        self._sizes: list[tuple[int, int]] = []  # (tokens left, -number) of each, ascending
        self._waiting_tokens = self._numbers = 0  # tokens in the window; documents that were read
        self._taken = int(cursor.get("taken", "0"), 16) << 1 if cursor else 0  # before the cursor: bit k of number k
        if cursor is not None:
            self._read_document(cursor["token"])

    def next(self, seq_len: int) -> Packed:
        """As in PackedStream."""
        while not self._window or (len(self._window) < WINDOW_DOCUMENTS and self._waiting_tokens < WINDOW_TOKENS):
            self._read_document()
        sequence = np.full(seq_len + 1, IGNORED, dtype=np.int32)
        filled = replaced = 0
        chosen: _Waiting | None = self._oldest
        while chosen:
            self._remove(chosen)
            size = min(chosen.left, seq_len + 1 - filled)
            sequence[filled : filled + size] = chosen.tokens[chosen.offset : chosen.offset + size]
            filled, replaced, chosen.replaced = filled + size, replaced + chosen.replaced, 0
            if size < chosen.left:  # it is longer than a sequence, which is full now
                chosen.offset += size - 1
                self._window = {chosen.number: chosen} | self._window
                self._count(chosen)
                break
            chosen = self._longest_within(seq_len + 1 - filled) if sequence[filled - 1] == self._eot else None
        if not self._window:
            self._read_document()  # for the cursor
        oldest = self._oldest
        left = sum(1 << number - oldest.number for number in self._window)
        taken = ((1 << self._numbers - oldest.number) - 1 & ~left) >> 1
        return self._packed(sequence, oldest.cursor | {"token": oldest.offset}, replaced, {"taken": f"{taken:x}"})

    @property
    def _oldest(self) -> _Waiting:
        return next(iter(self._window.values()))

    def _longest_within(self, room: int) -> _Waiting | None:
        """The longest document of at most `room` tokens, of several the oldest."""
        at = bisect_right(self._sizes, (room, 1))
        return self._window[-self._sizes[at - 1][1]] if at else None

    def _read_document(self, offset: int = 0) -> None:
        """Add the next document to the window that was not used before the cursor, from its token `offset` on."""
        while True:
            document, cursor = next(self._documents)
            number, self._numbers = self._numbers, self._numbers + 1
            if not self._taken >> number & 1:
                break
        tokens = self._cache.tokens(document)
        if offset >= len(tokens):
            raise data_changed()
        # Replaced bytes count where the beginning of a document is placed.
        replaced = 0 if document.begin or offset else document.replaced
        waiting = self._window[number] = _Waiting(number, cursor, tokens, replaced, offset)
        self._count(waiting)

    def _count(self, waiting: _Waiting) -> None:
        insort(self._sizes, (waiting.left, -waiting.number))
        self._waiting_tokens += waiting.left

    def _remove(self, waiting: _Waiting) -> None:
        del self._window[waiting.number]
        del self._sizes[bisect_left(self._sizes, (waiting.left, -waiting.number))]
        self._waiting_tokens -= waiting.left


PACKINGS: dict[str, type[PackedStream]] = {"concatenate": PackedStream, "best_fit": BestFitStream}
