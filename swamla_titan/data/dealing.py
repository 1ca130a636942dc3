"""Which stream reads what: the units of a source dealt out by size.

Every stream gives equally many sequences, so what a stream owns should be a stream's part of the whole; dealt by
count, one small file beside one large one would be half of the training. The result is a function of the sizes and
the number of streams alone.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

ORDER = 2  # in the fingerprint: a new number where cursors of older checkpoints would mean other places


@dataclass(frozen=True)
class Share:
    """The part of a unit that a stream reads: its documents number `offset`, `offset + every`, ..."""

    unit: int
    every: int
    offset: int


def deal(sizes: Sequence[int], streams: int) -> list[list[Share]]:
    """What each stream owns; each document of each unit belongs to exactly one stream.

    A unit as large as a stream's part or larger is shared by streams of its own, which take every k-th document of
    it. The small units are packed into streams of theirs, or where together they are less than half a stream's part,
    beside the first share of large ones: a stream of their own would repeat them too often.
    """
    sizes = [max(1, size) for size in sizes]
    total = sum(sizes)
    large = [unit for unit, size in enumerate(sizes) if size * streams >= total]
    small = [unit for unit, size in enumerate(sizes) if size * streams < total]
    rest = sum(sizes[unit] for unit in small)
    apart = 2 * rest * streams >= total
    # There are streams enough: were there as many large units as streams, nothing would be left for a small one.
    counts = _apportion([sizes[unit] for unit in large] + [rest] * apart, streams, len(small) if apart else streams)

    dealt: list[tuple[float, list[Share]]] = []  # with a place in [0, 1), which spreads a unit's streams out evenly
    firsts: list[tuple[float, list[Share]]] = []  # (load, shares): a unit of few documents has them in its first share
    for unit, count in zip(large, counts):
        parts = [[Share(unit, count, offset)] for offset in range(count)]
        dealt += [((offset + 0.5) / count, part) for offset, part in enumerate(parts)]
        firsts.append((sizes[unit] / count, parts[0]))
    if apart:
        packed: list[list[Share]] = [[] for _ in range(counts[-1])]
        dealt += [((place + 0.5) / len(packed), part) for place, part in enumerate(packed)]
        firsts = [(0.0, part) for part in packed]
    _pack(small, sizes, firsts)
    for _, part in dealt:
        part.sort(key=lambda share: share.unit)
    return [part for _, part in sorted(dealt, key=lambda entry: (entry[0], entry[1][0].unit))]


def _apportion(sizes: list[int], streams: int, most_of_last: int) -> list[int]:
    """How many streams each gets, at least one: the next goes where it mends the relative error most (as seats do by
    the method of Huntington and Hill)."""
    counts = [1] * len(sizes)
    heap = [(-size / math.sqrt(2), index) for index, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(streams - len(sizes)):
        _, index = heapq.heappop(heap)
        counts[index] += 1
        if index < len(sizes) - 1 or counts[index] < most_of_last:
            heapq.heappush(heap, (-sizes[index] / math.sqrt(counts[index] * (counts[index] + 1)), index))
    return counts


def _pack(units: list[int], sizes: list[int], bins: list[tuple[float, list[Share]]]) -> None:
    """Adds whole units to the bins, (load, shares) each: the largest first, each into the lightest."""
    heap = [(load, index) for index, (load, _) in enumerate(bins)]
    heapq.heapify(heap)
    for unit in sorted(units, key=lambda unit: (-sizes[unit], unit)):
        load, index = heap[0]
        bins[index][1].append(Share(unit, 1, 0))
        heapq.heapreplace(heap, (load + sizes[unit], index))
