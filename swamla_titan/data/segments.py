"""The corpus as a ring of documents, cut into as many segments as there are streams.

Every stream reads at the same speed: one sequence in turn. So streams read a corpus evenly only if their segments hold
equally many tokens, whatever the files are; a segment may therefore begin and end inside a document. A stream reads a
segment an epoch and continues with the next one around the ring. So segments of unequal size, where tokens are not
counted, do not add up over epochs: after n epochs' worth of tokens every token was read n times, but for the seams,
which is where the streams stand.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

import numpy as np

from swamla_titan.system.bounded import Count, Within, fit

ORDER = 3  # in the fingerprint: a new number where cursors of older checkpoints would mean other places

# A unit that cannot be cut, because its documents are known only once it is read, is split into parts that may be this
# many segments long.
_LARGEST_PART = 1.5


@dataclass(frozen=True)
class Part:
    """Documents number `offset`, `offset + every`, ... of a unit."""

    unit: int
    every: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Cut:
    """A border between two segments: at the start of document `ordinal` of a part of the ring, or inside the document.

    `inside` counts the document's tokens before the border (int) or says what fraction of them lie there (float).
    """

    part: int
    ordinal: int = 0
    inside: int | float = 0


@dataclass(frozen=True)
class Slice:
    """Documents of a part with first <= ordinal < end (None: to its end).

    A slice that cuts a document holds that document alone: its tokens from `begin` to `finish`, as in `Cut.inside`.
    """

    part: Part
    first: int = 0
    end: int | None = None
    begin: int | float = 0
    finish: int | float | None = None


@dataclass(frozen=True)
class Segments:
    """The ring, and the border at which each segment begins.

    `tokens` is how many the ring holds where they were counted; None where segments are of equal size by estimate.
    """

    parts: list[Part]
    cuts: list[Cut]
    tokens: int | None = None

    def slices(self, segment: int) -> tuple[list[Slice], list[Slice], list[Slice]]:
        """What a segment holds, in ring order: the rest of a document that the segment before began, whole documents,
        and the beginning of one that the segment after ends."""
        start = self.cuts[segment]
        end = self.cuts[segment + 1] if segment + 1 < len(self.cuts) else Cut(len(self.parts))
        head: list[Slice] = []
        tail: list[Slice] = []
        first = start.ordinal
        if start.inside:
            same = (start.part, start.ordinal) == (end.part, end.ordinal)
            finish = end.inside if same else None
            head.append(Slice(self.parts[start.part], first, first + 1, start.inside, finish))
            if same:
                return head, [], []
            first += 1
        if end.inside:
            tail.append(Slice(self.parts[end.part], end.ordinal, end.ordinal + 1, 0, end.inside))
        whole = []
        for part in range(start.part, min(end.part + 1, len(self.parts))):
            since = first if part == start.part else 0
            until = end.ordinal if part == end.part else None
            if until is None or since < until:
                whole.append(Slice(self.parts[part], since, until))
        return head, whole, tail

    def to_json(self) -> dict[str, Any]:
        """All that cannot be found again without reading the data."""
        shared = {part.unit: part.every for part in self.parts if part.every > 1}
        return {
            "tokens": self.tokens,
            "cuts": [[cut.part, cut.ordinal, cut.inside] for cut in self.cuts],
            "shared": [[unit, every] for unit, every in shared.items()],
        }

    @classmethod
    def from_json(cls, order: Sequence[int], content: Any, streams: int) -> "Segments":
        """What `to_json` was given for so many streams, with the units in the same order. ValueError if it does not fit
        them."""
        record = fit(_Record, content, "segments")
        shared = dict(record.shared)
        if not all(0 <= unit < len(order) and every > 1 for unit, every in record.shared):
            raise ValueError("segments: a unit is shared that is not there")
        parts = ring(order, shared)
        cuts = [Cut(int(part), int(ordinal), inside) for part, ordinal, inside in record.cuts]
        places = [(cut.part, cut.ordinal, cut.inside) for cut in cuts]
        if (
            len(cuts) != streams
            or places != sorted(places)
            or not all(0 <= part <= len(parts) for part, _, _ in places)
        ):
            raise ValueError("segments: the borders are not those of the data's streams")
        if any(cut.inside and (cut.part == len(parts) or cut.inside < 0) for cut in cuts):
            raise ValueError("segments: a border lies outside of the data")
        return cls(parts, cuts, record.tokens)


@dataclass
class _Record:
    """What `Segments.to_json` gives."""

    tokens: Count | None
    cuts: list[Annotated[list[int | float], Within(3, 3)]]
    shared: list[Annotated[list[Annotated[int, Within(0, 2**31)]], Within(2, 2)]]


def ring(order: Iterable[int], shared: Mapping[int, int]) -> list[Part]:
    """The units in `order`, those in `shared` in so many parts."""
    return [Part(unit, every, offset) for unit in order for every in [shared.get(unit, 1)] for offset in range(every)]


def cut_counted(parts: list[Part], counts: Iterable[tuple[int, int, int]], streams: int) -> Segments:
    """Segments of equally many tokens, to the token.

    `counts` has (part of the ring, ordinal, tokens) of each document, in ring order; `tokens` >= 1.
    """
    table = np.array(list(counts), dtype=np.int64).reshape(-1, 3)  # [documents, 3]
    ends = np.cumsum(table[:, 2])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return Segments(parts, [Cut(0)] * streams, 0)
    cuts = [Cut(0)]
    for segment in range(1, streams):
        before = segment * total // streams  # tokens
        document = int(np.searchsorted(ends, before, side="right"))
        part, ordinal, tokens = table[document].tolist()
        cuts.append(Cut(part, ordinal, before - (int(ends[document]) - tokens)))
    return Segments(parts, cuts, total)


def cut_by_size(parts: list[Part], sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> Segments:
    """Segments of about equal size, from the size of each unit and the number of its documents.

    Where a unit's number of documents is not known (None), the border moves to the nearer end of its part.
    """
    every, ends = _laid_out(parts, sizes)
    total = ends[-1]
    uncut = all(documents[part.unit] is None for part in parts)
    cuts = [Cut(0)]
    for segment in range(1, streams):
        before = segment * total / streams
        part = min(bisect_right(ends, before) - 1, len(parts) - 1)
        inside = (before - ends[part]) / every[part]
        count = documents[parts[part].unit]
        if count:
            ordinal = min(int(inside * count), count - 1)
            cuts.append(Cut(part, ordinal, inside * count - ordinal))
        elif uncut:  # no segment is empty, as there are enough parts
            nearest = max(part + round(inside), cuts[-1].part + 1)
            cuts.append(Cut(min(nearest, len(parts) - streams + segment)))
        else:
            cuts.append(Cut(part + round(inside)))
    return Segments(parts, cuts)


def _laid_out(parts: list[Part], sizes: Sequence[float]) -> tuple[list[float], list[float]]:
    """The size of each part of the ring, and where each begins; the last number is where the ring ends."""
    every = [sizes[part.unit] / part.every for part in parts]
    return every, [0.0, *accumulate(every)]


def shared_units(sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> dict[int, int]:
    """Units that must be read by several streams, and in how many parts: those of an unknown number of documents that
    are larger than a segment, or where there are fewer units than streams, as they cannot be cut. Each part is read by
    skipping the others.
    """
    counts = [1] * len(sizes)
    largest = [(-sizes[unit], unit) for unit in range(len(sizes)) if documents[unit] is None]
    heapq.heapify(largest)
    limit = _LARGEST_PART * sum(sizes) / streams
    # Where others can be cut anywhere, parts need not be as many as the streams.
    missing = streams - len(sizes) if len(largest) == len(sizes) else 0
    while largest and (missing > 0 or -largest[0][0] > limit):
        _, unit = largest[0]
        counts[unit] += 1
        missing -= 1
        heapq.heapreplace(largest, (-sizes[unit] / counts[unit], unit))
    return {unit: count for unit, count in enumerate(counts) if count > 1}


def sizes_of(segments: Segments, sizes: Sequence[float], documents: Sequence[int | None]) -> list[float]:
    """The size of each segment by estimate, as a multiple of the mean."""
    every, ends = _laid_out(segments.parts, sizes)
    at = []
    for cut in segments.cuts:
        inside = 0.0
        if cut.ordinal or cut.inside:
            inside = (cut.ordinal + cut.inside) / (documents[segments.parts[cut.part].unit] or 1) * every[cut.part]
        at.append(ends[cut.part] + inside)
    return [(end - start) * len(at) / (ends[-1] or 1) for start, end in zip(at, [*at[1:], ends[-1]])]
