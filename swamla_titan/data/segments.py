"""The corpus as a ring of documents, cut into as many segments as there are streams.

All streams read at the same speed, one sequence in turn. So they read a corpus evenly only if their segments hold
equally many tokens, whatever the sizes of files; a segment may therefore begin and end inside a document. A stream
reads a segment per epoch, then the next one around the ring. So where tokens are not counted and segments are unequal,
the differences do not add up over epochs: after n epochs' worth of tokens every token was read n times, except near the
streams' present positions.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

import numpy as np

from swamla_titan.data.order import Shuffle, permutation
from swamla_titan.system.bounded import Count, Within, fit

ORDER = 3  # in the fingerprint: a new number whenever cursors of older checkpoints would point elsewhere

# A unit whose documents are known only after reading cannot be cut; it is split into parts of at most this many
# segments.
_LARGEST_PART = 1.5
_BLOCK, _FOUND = 128, 1 << 14  # documents of a ring that are looked up together


@dataclass(frozen=True)
class Part:
    """The documents `offset`, `offset + every`, ... of a unit."""

    unit: int
    every: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Cut:
    """A border between two segments: at the start of document `ordinal` of a part of the ring, or inside the document.

    `inside`: the number (int) or fraction (float) of the document's tokens before the border.
    """

    part: int
    ordinal: int = 0
    inside: int | float = 0


@dataclass(frozen=True)
class Slice:
    """The documents of a part with first <= ordinal < end (None: to its end).

    A slice of one document's tokens, from `begin` to `finish` as in `Cut.inside`, holds no other document.
    """

    part: Part
    first: int = 0
    end: int | None = None
    begin: int | float = 0
    finish: int | float | None = None


@dataclass(frozen=True)
class Segments:
    """The ring, and the border at which each segment begins.

    `tokens`: the number in the ring, if they were counted; None if segments are of equal size by estimate.
    """

    parts: Sequence[Part]
    cuts: list[Cut]
    tokens: int | None = None

    def slices(self, segment: int) -> tuple[list[Slice], list[Slice], list[Slice]]:
        """The three parts of a segment, in ring order.

        These are the rest of a document that the segment before began, full documents, and the beginning of a document
        that the segment after ends.
        """
        start, end = self._borders(segment)
        head, tail = self._parts_of_documents(start, end)
        if head and head[0].finish is not None:
            return head, [], []
        first = start.ordinal + len(head)
        whole = []
        for part in range(start.part, min(end.part + 1, len(self.parts))):
            since = first if part == start.part else 0
            until = end.ordinal if part == end.part else None
            if until is None or since < until:
                whole.append(Slice(self.parts[part], since, until))
        return head, whole, tail

    def epoch(self, segment: int, seeds: tuple[int, ...]) -> Sequence[Slice]:
        """The slices of a segment in the order of an epoch: full documents shuffled by `seeds`, () in ring order."""
        head, whole, tail = self.slices(segment)
        if seeds:
            whole = [whole[i] for i in permutation(len(whole), *seeds)]
        return head + whole + tail

    def _borders(self, segment: int) -> tuple[Cut, Cut]:
        end = self.cuts[segment + 1] if segment + 1 < len(self.cuts) else Cut(len(self.parts))
        return self.cuts[segment], end

    def _parts_of_documents(self, start: Cut, end: Cut) -> tuple[list[Slice], list[Slice]]:
        """The parts of the documents that the borders cut; if both cut the same, it is the first alone."""
        head: list[Slice] = []
        tail: list[Slice] = []
        if start.inside:
            same = (start.part, start.ordinal) == (end.part, end.ordinal)
            finish = end.inside if same else None
            head.append(Slice(self.parts[start.part], start.ordinal, start.ordinal + 1, start.inside, finish))
            if same:
                return head, []
        if end.inside:
            tail.append(Slice(self.parts[end.part], end.ordinal, end.ordinal + 1, 0, end.inside))
        return head, tail

    def to_json(self) -> dict[str, Any]:
        """What cannot be computed again without reading the data, as JSON types."""
        return {
            "tokens": self.tokens,
            "cuts": [[cut.part, cut.ordinal, cut.inside] for cut in self.cuts],
            "shared": [[unit, every] for unit, every in self._shared().items()],
        }

    def _shared(self) -> dict[int, int]:
        """Units that are divided among several parts, and how many these are."""
        return {part.unit: part.every for part in self.parts if part.every > 1}

    @classmethod
    def from_json(cls, order: Sequence[int], content: Any, streams: int) -> "Segments":
        """The inverse of `to_json`, for units in the same order; ValueError if it does not fit them or the streams."""
        record = fit(_Record, content, "segments")
        shared = dict(record.shared)
        if not all(0 <= unit < len(order) and every > 1 for unit, every in record.shared):
            raise ValueError("segments: a unit is shared that is not there")
        return cls._restored(ring(order, shared), record, streams)

    @classmethod
    def _restored(cls, parts: Sequence[Part], record: "_Record", streams: int) -> "Segments":
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


@dataclass(frozen=True)
class DocumentRing(Sequence[Part]):
    """A ring whose parts are single documents of an index, looked up when they are asked for.

    `starts`: the number of each unit's first document, and behind the last one the number of all. `order`: of the
    documents in the ring; None: as they are.
    """

    starts: np.ndarray  # int64 [units + 1]
    order: Shuffle | None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, place: int) -> Part:  # type: ignore[override]
        return self.parts(np.array([place]))[0]

    def parts(self, places: np.ndarray) -> list[Part]:
        """The documents at `places`, int64 [n]."""
        units, ordinals = self.documents(places)
        sizes = np.diff(self.starts)[units]
        # Every n-th document of a unit of n is one document.
        return [Part(*part) for part in zip(units.tolist(), sizes.tolist(), ordinals.tolist())]

    def documents(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit and ordinal of the documents at `places`: int64 [n] each."""
        numbers = self.numbers(places)
        units = np.searchsorted(self.starts, numbers, side="right") - 1
        return units, numbers - self.starts[units]

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """The numbers in the index of the documents at `places`, int64 [n]."""
        return self.order.at(places) if self.order else places


class DocumentSegments(Segments):
    """Segments of a `DocumentRing`; in each epoch of a segment its full documents are in an order of their own."""

    parts: DocumentRing

    def epoch(self, segment: int, seeds: tuple[int, ...]) -> Sequence[Slice]:
        start, end = self._borders(segment)
        head, tail = self._parts_of_documents(start, end)
        first = start.part + len(head)
        return Epoch(self.parts, head, first, max(0, end.part - first), seeds, tail)

    def _shared(self) -> dict[int, int]:
        return {}

    @classmethod
    def restored(cls, parts: DocumentRing, content: Any, streams: int) -> "Segments":
        """The inverse of `to_json`; ValueError if it does not fit the ring or the streams."""
        return cls._restored(parts, fit(_Record, content, "segments"), streams)


class Epoch(Sequence[Slice]):
    """The slices of an epoch, looked up a block at a time: `count` documents of the ring from place `first` on."""

    def __init__(
        self, ring: DocumentRing, head: list[Slice], first: int, count: int, seeds: tuple[int, ...], tail: list[Slice]
    ) -> None:
        self._ring, self._head, self._first, self._count, self._tail = ring, head, first, count, tail
        self._order = Shuffle(count, *seeds) if seeds else None
        self._block, self._slices = -1, list[Slice]()

    def __len__(self) -> int:
        return len(self._head) + self._count + len(self._tail)

    def __getitem__(self, item: int) -> Slice:  # type: ignore[override]
        place = item - len(self._head)
        if place < 0:
            return self._head[item]
        if place >= self._count:
            return self._tail[place - self._count]
        block, within = divmod(place, _BLOCK)
        if block != self._block:
            places = self._places(block * _BLOCK, min(self._count, (block + 1) * _BLOCK))
            self._slices = [Slice(part) for part in self._ring.parts(places)]
            self._block = block
        return self._slices[within]

    def _places(self, first: int, end: int) -> np.ndarray:
        """The places in the ring of the full documents [first, end), int64 [n]."""
        places = np.arange(first, end)
        return self._first + (self._order.at(places) if self._order else places)

    def find(self, token: int, tokens: np.ndarray) -> tuple[int, int]:
        """The item with the epoch's `token`, counted from 0, and how many tokens are before it in that item.

        `tokens`: of each document, by its number. IndexError if the epoch has fewer.
        """
        before = 0
        for item, piece in enumerate(self._head):
            end = before + self._length(piece, tokens)
            if token < end:
                return item, token - before
            before = end
        for first in range(0, self._count, _FOUND):
            places = self._places(first, min(self._count, first + _FOUND))
            ends = before + np.cumsum(tokens[self._ring.numbers(places)].astype(np.int64))
            if token < ends[-1]:
                document = int(np.searchsorted(ends, token, side="right"))
                return len(self._head) + first + document, token - (int(ends[document - 1]) if document else before)
            before = int(ends[-1])
        if self._tail and token < before + self._length(self._tail[0], tokens):
            return len(self._head) + self._count, token - before
        raise IndexError(token)

    def _length(self, piece: Slice, tokens: np.ndarray) -> int:
        """Tokens of a part of a document."""
        number = self._ring.starts[piece.part.unit] + piece.part.offset
        return int(tokens[number] if piece.finish is None else piece.finish) - int(piece.begin)


def ring(order: Iterable[int], shared: Mapping[int, int]) -> list[Part]:
    """The units in `order`; those in `shared` are split into that many parts."""
    return [Part(unit, every, offset) for unit in order for every in [shared.get(unit, 1)] for offset in range(every)]


def cut_counted(parts: list[Part], counts: Iterable[tuple[int, int, int]], streams: int) -> Segments:
    """Cut the ring into segments of equally many tokens, exactly.

    `counts` has (part of the ring, ordinal, tokens) of each document, in ring order; `tokens` >= 1.
    """
    table = np.array(list(counts), dtype=np.int64).reshape(-1, 3)  # [documents, 3]
    total = int(table[:, 2].sum())
    return Segments(parts, cuts_by_tokens([table], total, streams), total)


def cuts_by_tokens(tables: Iterable[np.ndarray], total: int, streams: int) -> list[Cut]:
    """The borders between segments of equally many of the `total` tokens.

    `tables`: int64 [n, 3] each, (part of the ring, ordinal, tokens) of the ring's documents, one table after the other.
    """
    if not total:
        return [Cut(0)] * streams
    cuts = [Cut(0)]
    start = 0  # tokens before the table
    for table in filter(len, tables):
        ends = start + np.cumsum(table[:, 2])
        while len(cuts) < streams and (border := len(cuts) * total // streams) < ends[-1]:
            document = int(np.searchsorted(ends, border, side="right"))
            part, ordinal, tokens = table[document].tolist()
            cuts.append(Cut(part, ordinal, border - (int(ends[document]) - tokens)))
        start = int(ends[-1])
    return cuts


def cut_by_size(parts: list[Part], sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> Segments:
    """Cut the ring into segments of about equal size, by the size of each unit and the number of its documents.

    In a unit of an unknown number of documents (None) the border moves to the nearer end of its part.
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


def _laid_out(parts: Sequence[Part], sizes: Sequence[float]) -> tuple[list[float], list[float]]:
    """The size of each part of the ring, and where each begins; the last number is where the ring ends."""
    every = [sizes[part.unit] / part.every for part in parts]
    return every, [0.0, *accumulate(every)]


def shared_units(sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> dict[int, int]:
    """Units that several streams must share, and the number of parts of each.

    These are units of an unknown number of documents, which cannot be cut, if they are larger than a segment or there
    are fewer units than streams. A stream reads its part by skipping the documents of the others.
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
