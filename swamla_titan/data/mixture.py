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
_NEVER = 1 << 62
_COUNTED = 1 << 20  # sequences at a time
_CHOSEN_FOR = 1 << 20  # sequences at most, so that thousands of streams do not take long


class Piece(NamedTuple):
    """Weights by source that hold from global sequence `first` on; they add up to 1 as decimal numbers."""

    first: int
    weights: Mapping[str, float]


class SequenceOrder:
    """Assigns global sequences to sources of a mixture and to `streams` slots; slot k reads stream k of each source.

    After any number of sequences each source has had its exact share to within one sequence, also where weights change
    (`_Quotas`). Each `streams` sequences are a round, in which each slot has one. Ranks own slots; where the number of
    ranks divides both the streams and the global batch, each has equally many sequences of it. In each round the slots
    are shifted, so that every slot meets every source, and the streams of a source advance equally.
    """

    def __init__(self, streams: int, names: Sequence[str] = ("",), pieces: Sequence[Piece] = ()) -> None:
        """`names` of the sources, which numbers stand for; `pieces` in order, of which the first begins the order.

        Without pieces there is one source, and its streams take turns.
        """
        self.streams, self.names = streams, tuple(names)
        self.pieces = tuple(pieces) or (Piece(0, {self.names[0]: 1.0}),)
        self._firsts = np.array([piece.first for piece in self.pieces], dtype=np.int64)
        shares = [tuple(exact(piece.weights.get(name, 0.0)) for name in self.names) for piece in self.pieces]
        self._parts = _parts(tuple(zip(self._firsts.tolist(), shares)))
        self._shifts = [_shifts(each, streams) for each in shares]

    @property
    def has_one_source(self) -> bool:
        """Whether all sequences come from one source."""
        return len(self.names) == 1

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the source of each sequence, int64 [n] -> [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        for piece, chosen, inside in self._by_piece(numbers):
            found[chosen] = self._parts[piece].sources(inside)
        return found

    def slots(self, numbers: np.ndarray) -> np.ndarray:
        """The slot of each sequence, int64 [n] -> [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        for piece, chosen, inside in self._by_piece(numbers):
            found[chosen] = (numbers[chosen] + self._shifts[piece].shift(inside // self.streams)) % self.streams
        return found

    def cursor_keys(self, numbers: np.ndarray) -> np.ndarray:
        """The stream of each sequence, as cursors are kept by it: source * streams + slot, int64 [n] -> [n]."""
        return self.sources(numbers) * self.streams + self.slots(numbers)

    def counts(self, number: int) -> np.ndarray:
        """How many of the sequences from the first piece on and before `number` each source has, int64 [sources]."""
        total = np.zeros(len(self.names), dtype=np.int64)
        for first, end, part in zip(self._firsts.tolist(), [*self._firsts[1:].tolist(), number], self._parts):
            total += part.counts(max(0, min(end, number) - first), len(self.names))
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

    def _by_piece(self, numbers: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Each piece that has some of the sequences, with which of them, and their numbers within it."""
        pieces = np.maximum(np.searchsorted(self._firsts, numbers, side="right") - 1, 0)
        chosen = [(piece, np.flatnonzero(pieces == piece)) for piece in np.unique(pieces).tolist()]
        return [(piece, which, numbers[which] - self._firsts[piece]) for piece, which in chosen]


def sequence_order(data: Data) -> SequenceOrder:
    """The order of a new run with this [data] section."""
    weights = weights_of(data)
    return SequenceOrder(data.streams, tuple(weights), [Piece(0, weights)])


class _Shifts(NamedTuple):
    """By how much slots are shifted in the rounds of a piece.

    `first` are the shifts of the first rounds and repeat; after each `repeats` rounds, when the assignment of sources
    to slots would repeat, there is one more shift. So after `repeats` rounds for each slot, all of them have had the
    same.
    """

    first: np.ndarray
    repeats: int

    def shift(self, rounds: np.ndarray) -> np.ndarray:
        """By how much the slots are shifted in each round."""
        return self.first[rounds % len(self.first)] + rounds // self.repeats


@lru_cache(maxsize=64)
def _shifts(shares: tuple[Fraction, ...], streams: int) -> _Shifts:
    """The shifts for sources of these shares.

    Each round is shifted such that its sequences go to the slots that have had the fewest of their sources. Without
    shifts a source of a quarter, for example, would always be in the same quarter of 64 slots.
    """
    table = quota_table(shares)
    if len(table) == 1:
        return _Shifts(np.zeros(1, dtype=np.int64), 1 << 62)  # one source: its streams take turns
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
    return _Shifts(shifts, math.lcm(period, rounds))


class _Part(NamedTuple):
    """The sources of a piece: `head`, then `table` again and again, and `tail` from `end` on."""

    head: np.ndarray
    table: np.ndarray
    end: int
    tail: np.ndarray

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """Of sequences by their numbers within the piece, int64 [n] -> [n]."""
        found = self.table[(numbers - len(self.head)) % len(self.table)]
        for part, first in ((self.head, 0), (self.tail, self.end)):
            own = (first <= numbers) & (numbers < first + len(part))
            found[own] = part[numbers[own] - first]
        return found

    def counts(self, length: int, sources: int) -> np.ndarray:
        """How many of the first `length` sequences each source has, int64 [sources]."""
        periods, rest = divmod(max(0, min(length, self.end) - len(self.head)), len(self.table))
        parts = (self.head[:length], 1), (self.table, periods), (self.table[:rest], 1)
        found: np.ndarray = sum(
            (times * np.bincount(part, minlength=sources) for part, times in parts), np.zeros(sources, dtype=np.int64)
        )
        return found + np.bincount(self.tail[: max(0, length - self.end)], minlength=sources)


@lru_cache(maxsize=64)
def quota_table(shares: tuple[Fraction, ...]) -> np.ndarray:
    """A period of an endless sequence of sources, int64 [period], by their exact shares, which add up to 1."""
    [part] = _parts(((0, shares),))
    return part.table


@lru_cache(maxsize=64)
def _parts(pieces: tuple[tuple[int, tuple[Fraction, ...]], ...]) -> list[_Part]:
    """The sources of each piece, of which (first sequence, shares) are given."""
    quotas, taken, found = _Quotas(pieces), [0] * len(pieces[0][1]), []
    for piece, length in enumerate(quotas.lengths):
        period, counts = quotas.period(piece)
        begun, head = list(taken), np.empty(0, dtype=np.int64)
        table = quotas.simulate(piece, 0, min(period, length), taken)
        # What was owed where the piece began may disturb the first periods; until then they are all of them different.
        while length > len(head) + 3 * period and [now - was for was, now in zip(begun, taken)] != counts:
            head, begun = np.concatenate([head, table]), list(taken)
            table = quotas.simulate(piece, len(head), len(head) + period, taken)
        if piece == len(pieces) - 1:
            found.append(_Part(head, table, _NEVER, head[:0]))
            break
        # In the last period deadlines depend on the next weights too.
        repeats = [now - was for was, now in zip(begun, taken)] == counts
        periods = max(0, length - len(head) - period) // period if repeats else 0
        end, taken = len(head) + periods * period, [was + periods * count for was, count in zip(begun, counts)]
        found.append(_Part(head, table, end, quotas.simulate(piece, end, length, taken)))
    return found


class _Quotas:
    """The exact shares of sources after any number of sequences, and a sequence of sources that keeps to them.

    Of the first n sequences, for every n, a source has its exact share, rounded down or up (R. Tijdeman, "The chairman
    assignment problem", Discrete Mathematics 32, 1980). The j-th sequence of a source therefore has an earliest
    position, and a deadline, by which the share comes to j. Of those that may come next, the one with the earliest
    deadline does; that keeps all deadlines wherever they can be kept.
    """

    def __init__(self, pieces: Sequence[tuple[int, tuple[Fraction, ...]]]) -> None:
        firsts = [first - pieces[0][0] for first, _ in pieces]
        assert all(sum(shares) == 1 for _, shares in pieces)
        self._unit = math.lcm(*(share.denominator for _, shares in pieces for share in shares))
        self._shares = [[int(share * self._unit) for share in shares] for _, shares in pieces]
        self.lengths = [end - first for first, end in zip(firsts, [*firsts[1:], 1 << 62])]
        self._owed = [[0] * len(self._shares[0])]  # where each piece begins: shares in units
        for shares, length in zip(self._shares, self.lengths[:-1]):
            self._owed.append([owed + length * share for owed, share in zip(self._owed[-1], shares)])

    def period(self, piece: int) -> tuple[int, list[int]]:
        """After how many sequences the shares are whole numbers, and these numbers."""
        divisor = math.gcd(self._unit, *self._shares[piece])
        return self._unit // divisor, [share // divisor for share in self._shares[piece]]

    def simulate(self, piece: int, start: int, end: int, taken: list[int]) -> np.ndarray:
        """The sources of sequences `start` to `end` of a piece, int64 [end - start].

        `taken` has how many each source has had before, in all, and is advanced.
        """
        waiting: list[tuple[int, int]] = []  # (earliest position, source)
        ready: list[tuple[int, int]] = []  # (deadline, source)
        for source, count in enumerate(taken):
            heapq.heappush(waiting, (self._reached(piece, source, count, passed=True), source))
        found = np.empty(end - start, dtype=np.int64)
        for position in range(start, end):
            while waiting and waiting[0][0] <= position:
                source = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._reached(piece, source, taken[source] + 1), source))
            deadline, source = heapq.heappop(ready)
            assert position < deadline
            found[position - start] = source
            taken[source] += 1
            heapq.heappush(waiting, (self._reached(piece, source, taken[source], passed=True), source))
        return found

    def _reached(self, piece: int, source: int, count: int, passed: bool = False) -> int:
        """The number of sequences since a piece began after which the share of a source comes to `count`.

        `passed`: the last number after which it is not more than `count`.
        """
        before = 0
        for of_piece in range(piece, len(self.lengths)):
            share, missing = self._shares[of_piece][source], count * self._unit - self._owed[of_piece][source]
            if share:
                after = missing // share if passed else -(-missing // share)
            else:
                after = 0 if missing < 0 else _NEVER
            if after < self.lengths[of_piece] + (not passed):
                return before + max(after, 0)
            before += self.lengths[of_piece]
        return _NEVER
