"""Which tokens of a sequence each rank of a context group holds, and which of others' tokens sliding windows need.

Integers only, from (sequence length, ranks, window, sink), without torch.

A sequence of T tokens is split into 2 * size equal chunks, and rank r holds chunks r and 2 * size - 1 - r, in this
order. A late chunk has many keys before it and an early one few, so under a causal mask every rank computes the same
number of pairs of queries and keys.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A piece of a halo: `length` tokens from `start` on, of this rank's own tokens, or else of the received ones."""

    own: bool
    start: int
    length: int


def chunks_of(rank: Any, size: int) -> tuple[Any, Any]:
    """The indices of the two chunks that a rank holds, in sequence order; elementwise for a tensor of ranks."""
    return rank, 2 * size - 1 - rank


@dataclass(frozen=True)
class SequenceLayout:
    """Sequences of `seq_len` tokens shared by `size` ranks, seen from rank `rank`.

    config/parallel_rules.py has validated that the length divides.
    """

    seq_len: int
    size: int
    rank: int

    def __post_init__(self) -> None:
        chunks = 2 * self.size if self.size > 1 else 1
        assert self.seq_len % chunks == 0, f"{self.seq_len} tokens cannot be cut in {chunks} equal chunks"

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.seq_len // (2 * self.size)

    @property
    def starts(self) -> tuple[int, int]:
        """Where in the sequence this rank's two chunks begin."""
        first, second = chunks_of(self.rank, self.size)
        return first * self.chunk, second * self.chunk


@dataclass(frozen=True)
class WindowExchangePlan:
    """What one rank sends and receives so that its two chunks see their windows and sinks.

    The tokens before a chunk that its window reaches are its halo. A halo takes from each chunk before it a suffix, so
    what a rank needs of a chunk is the longest suffix that either of its own chunks needs, and it is sent once.

    `sends[d]` holds (start, length) in this rank's own 2 * chunk tokens for each piece that rank d receives, in
    sequence order; `receives[s]` is how many tokens come from rank s. Pieces from a rank to itself are not sent.
    `halos[j]` lists the pieces of the halo of this rank's chunk j. Both halos have `halo` slots; those that would lie
    before the sequence come first and are zeros.
    `sinks` is how many sink slots each chunk has: `sink`, but never more tokens than a halo can miss.
    """

    layout: SequenceLayout
    window: int
    sink: int
    halo: int
    sinks: int
    sends: tuple[tuple[tuple[int, int], ...], ...]
    receives: tuple[int, ...]
    halos: tuple[tuple[Piece, ...], tuple[Piece, ...]]

    @property
    def send_splits(self) -> list[int]:
        """Tokens sent to each rank."""
        return [sum(length for _, length in pieces) for pieces in self.sends]

    @property
    def receive_splits(self) -> list[int]:
        """Tokens received from each rank."""
        return list(self.receives)

    @property
    def section(self) -> int:
        """Keys of a chunk: sinks, halo, and the chunk itself."""
        return self.sinks + self.halo + self.layout.chunk


@lru_cache(maxsize=32)
def plan_window_exchange(layout: SequenceLayout, window: int, sink: int) -> WindowExchangePlan:
    """The exchange of a layer with this window (the query counted) and this many sink tokens."""
    size, rank, chunk = layout.size, layout.rank, layout.chunk

    def reach(k: int, m: int) -> int:
        """How many of the last tokens of chunk m the halo of chunk k holds."""
        oldest = max(0, k * chunk - (window - 1))
        return max(0, min(chunk, (m + 1) * chunk - oldest)) if m < k else 0

    def needed(by: int, m: int) -> int:
        return max(reach(k, m) for k in chunks_of(by, size))

    own = chunks_of(rank, size)
    sends = tuple(
        tuple(
            ((j + 1) * chunk - needed(other, m), needed(other, m))
            for j, m in enumerate(own)
            if other != rank and needed(other, m)
        )
        for other in range(size)
    )
    # Where the suffix of each of the others' chunks ends in what is received: rank by rank, in sequence order.
    ends, receives, total = {}, [], 0
    for other in range(size):
        before = total
        if other != rank:
            for m in chunks_of(other, size):
                total += needed(rank, m)
                ends[m] = total
        receives.append(total - before)

    def pieces(k: int) -> tuple[Piece, ...]:
        found = []
        for m in range(k):
            length = reach(k, m)
            if length:
                end = (own.index(m) + 1) * chunk if m in own else ends[m]
                found.append(Piece(m in own, end - length, length))
        return tuple(found)

    last = (2 * size - 1) * chunk  # where the last chunk begins, which looks back farthest
    return WindowExchangePlan(
        layout=layout,
        window=window,
        sink=sink,
        halo=min(window - 1, layout.starts[1]),
        sinks=max(0, min(sink, last - (window - 1))),
        sends=sends,
        receives=tuple(receives),
        halos=(pieces(own[0]), pieces(own[1])),
    )


class Traffic(NamedTuple):
    """Bytes that a rank sends to other ranks and receives from them."""

    sent: int
    received: int


def window_exchange_bytes(
    exchange: WindowExchangePlan, batch: int, kv_heads: int, head_dim: int, itemsize: int
) -> Traffic:
    """Bytes that the collectives of one layer send and receive on the exchange's rank, forward.

    A token is batch * kv_heads * 2 * head_dim elements (key and value) of `itemsize` bytes; the rank sends

        sum of the lengths of `sends` (halos)  +  2 * (size - 1) * sinks (its share of the others' sinks)

    tokens and receives the sum of `receives` + 2 * (size - 1) * sinks. Halos are at most 2 * (window - 1) tokens a
    rank, independent of the sequence length. The backward pass sends what the forward received, and vice versa.
    """
    token = batch * kv_heads * 2 * head_dim * itemsize
    sinks = 2 * (exchange.layout.size - 1) * exchange.sinks
    return Traffic((sum(exchange.send_splits) + sinks) * token, (sum(exchange.receive_splits) + sinks) * token)
