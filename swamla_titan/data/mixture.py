"""The order of a mixture: which source, and which of its streams, each global sequence comes from.

Both are functions of the sequence's number alone, so the global batch of a step does not depend on ranks, workers or
restarts.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from swamla_titan.config.mixture import exact, weights_of
from swamla_titan.config.sections import Data

_SHIFTS = 64  # that are compared for a round
_MOST_ROUNDS = 1024  # whose shifts are chosen; then they repeat
_COUNTED = 1 << 20  # sequences at a time
_CHOSEN_FOR = 1 << 20  # sequences at most, so that thousands of streams do not take long


class Piece(NamedTuple):
    """Weights by source that hold from global sequence `first` on; they add up to 1 as decimal numbers."""

    first: int
    weights: Mapping[str, float]


class SequenceOrder:
    """Deals global sequences to the sources of a mixture and to `streams` slots; slot k reads stream k of each source.

    After any number of sequences since the weights were last set, each source has had its exact share to within one
    sequence (`quota_table`). Each `streams` sequences are a round, in which each slot has one. Ranks own slots; where
    the number of ranks divides both the streams and the global batch, each has equally many sequences of it. In each
    round the slots are shifted, so that every slot meets every source, and the streams of a source advance equally.
    """

    def __init__(self, streams: int, names: Sequence[str] = ("",), pieces: Sequence[Piece] = ()) -> None:
        """`names` of the sources, which numbers stand for; `pieces` in order, of which the first begins the order.

        Without pieces there is one source, and its streams take turns.
        """
        self.streams, self.names = streams, tuple(names)
        self.pieces = tuple(pieces) or (Piece(0, {self.names[0]: 1.0}),)
        self._firsts = np.array([piece.first for piece in self.pieces], dtype=np.int64)
        shares = [tuple(exact(piece.weights.get(name, 0.0)) for name in self.names) for piece in self.pieces]
        self._deals = [_dealt(each, streams) for each in shares]

    @property
    def has_one_source(self) -> bool:
        """Whether all sequences come from one source."""
        return len(self.names) == 1

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the source of each sequence, int64 [n] -> [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        for chosen, deal, inside in self._by_piece(numbers):
            found[chosen] = deal.table[inside % len(deal.table)]
        return found

    def slots(self, numbers: np.ndarray) -> np.ndarray:
        """The slot of each sequence, int64 [n] -> [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        for chosen, deal, inside in self._by_piece(numbers):
            found[chosen] = (numbers[chosen] + deal.shift(inside // self.streams)) % self.streams
        return found

    def cursor_keys(self, numbers: np.ndarray) -> np.ndarray:
        """The stream of each sequence, as cursors are kept by it: source * streams + slot, int64 [n] -> [n]."""
        return self.sources(numbers) * self.streams + self.slots(numbers)

    def counts(self, number: int) -> np.ndarray:
        """How many of the sequences from the first piece on and before `number` each source has, int64 [sources]."""
        total = np.zeros(len(self.names), dtype=np.int64)
        for piece, end, deal in zip(self.pieces, [*self._firsts[1:].tolist(), number], self._deals):
            periods, rest = divmod(max(0, min(end, number) - piece.first), len(deal.table))
            for part, times in ((deal.table, periods), (deal.table[:rest], 1)):
                total += times * np.bincount(part, minlength=len(self.names))
        return total

    def counts_by_stream(self, number: int) -> np.ndarray:
        """The same of each stream, by the key of its cursor; of several sources it takes longer the more there are."""
        if self.has_one_source:
            return np.array([len(range(stream, number, self.streams)) for stream in range(self.streams)])
        total = np.zeros(len(self.names) * self.streams, dtype=np.int64)
        for first in range(self.pieces[0].first, number, _COUNTED):
            keys = self.cursor_keys(np.arange(first, min(first + _COUNTED, number)))
            total += np.bincount(keys, minlength=len(total))
        return total

    def _by_piece(self, numbers: np.ndarray) -> list[tuple[np.ndarray, "_Deal", np.ndarray]]:
        """For each piece that has some of the sequences: which of them, how it deals, and their numbers within it."""
        pieces = np.maximum(np.searchsorted(self._firsts, numbers, side="right") - 1, 0)
        chosen = [(piece, np.flatnonzero(pieces == piece)) for piece in np.unique(pieces).tolist()]
        return [(which, self._deals[piece], numbers[which] - self._firsts[piece]) for piece, which in chosen]


def sequence_order(data: Data) -> SequenceOrder:
    """The order of a new run with this [data] section."""
    weights = weights_of(data)
    return SequenceOrder(data.streams, tuple(weights), [Piece(0, weights)])


class _Deal(NamedTuple):
    """How sequences with the same weights are dealt: `table` [period] of sources, and by how much slots are shifted.

    `shifts` are those of the first rounds and repeat; after each `repeats` rounds, when the assignment of sources to
    slots would repeat, there is one more shift. So after `repeats` rounds for each slot, all of them have had the same.
    """

    table: np.ndarray
    shifts: np.ndarray
    repeats: int

    def shift(self, rounds: np.ndarray) -> np.ndarray:
        """By how much the slots are shifted in each round."""
        return self.shifts[rounds % len(self.shifts)] + rounds // self.repeats


@lru_cache(maxsize=64)
def _dealt(shares: tuple[Fraction, ...], streams: int) -> _Deal:
    """How sources of these shares are dealt.

    Each round is shifted such that its sequences go to the slots that have had the fewest of their sources. Without
    shifts a source of a quarter, for example, would always be in the same quarter of 64 slots.
    """
    table = quota_table(shares)
    if len(table) == 1:
        return _Deal(table, np.zeros(1, dtype=np.int64), 1 << 62)  # one source: its streams take turns
    period = len(table) // math.gcd(len(table), streams)  # rounds
    rounds = min(period, _MOST_ROUNDS, max(16, _CHOSEN_FOR // streams))
    places = np.arange(streams)
    # Far apart and prime to the period of most patterns, as multiples of the golden ratio are.
    tried = np.unique((np.arange(min(_SHIFTS, streams)) * 0.6180339887 * streams).astype(np.int64) % streams)
    slots = (places + tried[:, None]) % streams  # [shifts, streams]
    taken = np.zeros((len(shares), streams), dtype=np.int64)
    shifts = np.zeros(rounds, dtype=np.int64)
    for number in range(rounds):
        sources = table[(number * streams + places) % len(table)]
        best = int(taken[sources, slots].sum(axis=1).argmin())
        taken[sources, slots[best]] += 1
        shifts[number] = tried[best]
    return _Deal(table, shifts, math.lcm(period, rounds))


def quota_table(shares: tuple[Fraction, ...]) -> np.ndarray:
    """A period of an endless sequence of sources, int64 [period], by their exact shares, which add up to 1.

    Of the first n entries, for every n, a source with share w has w n, rounded down or up (Tijdeman, "The chairman
    assignment problem", Discrete Mathematics 32, 1980). The j-th entry of a source therefore has an earliest position
    and a latest one. Of the entries that may come next, the one with the earliest deadline does; that keeps all
    deadlines wherever they can be kept.
    """
    assert sum(shares) == 1
    period = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * period) for share in shares]
    waiting = [(0, source, 1) for source, count in enumerate(counts) if count]  # (earliest position, source, j)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    table = np.empty(period, dtype=np.int64)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, source, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-period * j // counts[source]), source, j))
        deadline, source, j = heapq.heappop(ready)
        assert position < deadline
        table[position] = source
        heapq.heappush(waiting, (period * j // counts[source], source, j + 1))
    return table
