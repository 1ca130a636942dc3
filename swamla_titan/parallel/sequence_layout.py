"""Which tokens of a sequence each rank holds, and which of others' tokens it needs.

Integers only, from (sequence length, ranks, halo or window, sink), without torch.

A sequence of T tokens is split into 2 * size equal chunks, and rank r of a context group holds chunks r and
2 * size - 1 - r, in this order. A late chunk has many keys before it and an early one few, so under a causal mask every
rank computes the same number of pairs of queries and keys. Of the residual stream, tensor parallelism cuts a rank's
chunks, one after the other, into equal shards. So a rank holds one or two stretches of consecutive tokens. The tokens
before a stretch that it depends on are its halo.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
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


def stretches(seq_len: int, context: int, tensor: int, index: int) -> list[range]:
    """The indices in the sequence of the tokens that rank `index` of context x tensor holds."""
    rank, shard = divmod(index, tensor)
    chunks = [range(seq_len)]
    if context > 1:
        layout = SequenceLayout(seq_len, context, rank)
        chunks = [range(start, start + layout.chunk) for start in layout.starts]
    size = seq_len // (context * tensor)
    first, found = shard * size, []
    for chunk in chunks:
        found.append(chunk[max(first, 0) : max(first + size, 0)])
        first -= len(chunk)
    return [part for part in found if part]


@dataclass(frozen=True)
class HaloExchange:
    """What one rank sends and receives so that each of its stretches has the `halo` tokens before it.

    A halo takes from each stretch before it a suffix, so what a rank needs of a stretch is the longest suffix that
    either of its own stretches needs, and it is sent once.

    `sends[r]` holds (start, length) in this rank's own tokens for each piece that rank r receives, in sequence order;
    `receives[r]` is how many tokens come from rank r. Pieces from a rank to itself are not sent. `sections[j]` are the
    pieces of the halo of this rank's stretch j, in sequence order, and the stretch itself, the last of them. What of a
    halo would lie before the sequence has no piece.
    """

    halo: int
    sends: tuple[tuple[tuple[int, int], ...], ...]
    receives: tuple[int, ...]
    sections: tuple[tuple[Piece, ...], ...]

    @property
    def send_splits(self) -> list[int]:
        """Tokens sent to each rank."""
        return [sum(length for _, length in pieces) for pieces in self.sends]


@lru_cache(maxsize=64)
def plan_halos(seq_len: int, context: int, tensor: int, index: int, halo: int) -> HaloExchange:
    """The exchange of rank `index` of context x tensor ranks, for sequences of `seq_len` tokens."""
    held = [stretches(seq_len, context, tensor, rank) for rank in range(context * tensor)]
    own, in_order = held[index], sorted(chain(*held), key=lambda stretch: stretch.start)

    def reach(begin: int, stretch: range) -> int:
        """How many of the last tokens of `stretch` the halo before `begin` holds."""
        return max(0, min(len(stretch), stretch.stop - max(0, begin - halo))) if stretch.start < begin else 0

    def needed(by: int, stretch: range) -> int:
        return max(reach(each.start, stretch) for each in held[by]) if stretch not in held[by] else 0

    received = [[needed(index, stretch) for stretch in of_rank] for of_rank in held]
    # Where the suffix of each stretch ends: of one's own among one's own tokens, of others' in what is received, which
    # comes rank by rank, in sequence order.
    ends = dict(zip(chain(*held), accumulate(chain(*received)))) | dict(zip(own, accumulate(map(len, own))))

    def sent(to: int) -> tuple[tuple[int, int], ...]:
        lengths = ((ends[stretch], needed(to, stretch)) for stretch in own)
        return tuple((end - length, length) for end, length in lengths if length)

    def section(of: range) -> tuple[Piece, ...]:
        lengths = [*((stretch, reach(of.start, stretch)) for stretch in in_order), (of, len(of))]
        return tuple(Piece(stretch in own, ends[stretch] - n, n) for stretch, n in lengths if n)

    sends = tuple(map(sent, range(len(held))))
    return HaloExchange(halo, sends, tuple(map(sum, received)), tuple(map(section, own)))


@dataclass(frozen=True)
class WindowExchangePlan:
    """What one rank sends and receives so that its two chunks see their windows and sinks.

    Both halos have `halo` slots; those that would lie before the sequence come first and are zeros. `sinks` is how many
    sink slots each chunk has: `sink`, but never more tokens than a halo can miss.
    """

    layout: SequenceLayout
    window: int
    sink: int
    halo: int
    sinks: int
    halos: HaloExchange

    @property
    def section(self) -> int:
        """Keys of a chunk: sinks, halo, and the chunk itself."""
        return self.sinks + self.halo + self.layout.chunk


@lru_cache(maxsize=32)
def plan_window_exchange(layout: SequenceLayout, window: int, sink: int) -> WindowExchangePlan:
    """The exchange of a layer with this window (the query counted) and this many sink tokens."""
    last = (2 * layout.size - 1) * layout.chunk  # where the last chunk begins, which looks back farthest
    return WindowExchangePlan(
        layout=layout,
        window=window,
        sink=sink,
        halo=min(window - 1, layout.starts[1]),
        sinks=max(0, min(sink, last - (window - 1))),
        halos=plan_halos(layout.seq_len, layout.size, 1, layout.rank, window - 1),
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

        sum of the lengths of `halos.sends`  +  2 * (size - 1) * sinks (its share of the others' sinks)

    tokens and receives the sum of `halos.receives` + 2 * (size - 1) * sinks. Halos are at most 2 * (window - 1) tokens
    a rank, independent of the sequence length. The backward pass sends what the forward received, and vice versa.
    """
    token = batch * kv_heads * 2 * head_dim * itemsize
    sinks = 2 * (exchange.layout.size - 1) * exchange.sinks
    return Traffic((sum(exchange.halos.send_splits) + sinks) * token, (sum(exchange.halos.receives) + sinks) * token)
