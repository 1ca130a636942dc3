"""The residual stream where ranks share each sequence: which tokens a rank holds, and the tokens before them.

Context parallelism gives a rank two chunks of the sequence (sequence_layout.py), tensor parallelism cuts these, one
after the other, into equal shards. So a rank holds one or two stretches of consecutive tokens. Annexes whose result
depends on some tokens before a token, as by a convolution, exchange these tokens' values: the halo of a stretch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.distributed.collectives import OPERATORS, waited
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annex import StreamContext, StreamLayout
from swamla_titan.parallel.sequence_layout import Piece, SequenceLayout


def share_stream(model: SWAMLAModel, world: World) -> None:
    """Tell the model's annexes which tokens of the residual stream this rank holds; nothing where it has no annexes."""
    degrees = world.degrees
    if not len(model.annexes) or degrees.context * degrees.tensor == 1:
        return
    assert world.activations is not None
    if degrees.context > 1 and degrees.tensor > 1:
        group = world.activations["context", "tensor"]._flatten("sequence").get_group()
    else:
        group = world.group("context" if degrees.context > 1 else "tensor")
    halos = frozenset(annex.halo(model.config) for _, annex in model.annexes.each())
    index = world.coordinate("context") * degrees.tensor + world.coordinate("tensor")
    model.annexes.layout = SharedStream(degrees.context, degrees.tensor, index, group.group_name, halos)


@dataclass(frozen=True)
class HaloExchange:
    """What one rank sends and receives so that its stretches have their halos.

    `sends[r]` holds (start, length) in this rank's own tokens for each piece that rank r receives; `receives[r]` is how
    many tokens come from rank r. `stretches[j]` are the pieces of stretch j's halo, in sequence order, and the stretch
    itself, the last of them. What of a halo would lie before the sequence has no piece.
    """

    halo: int
    sends: tuple[tuple[tuple[int, int], ...], ...]
    receives: tuple[int, ...]
    stretches: tuple[tuple[Piece, ...], ...]


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


class _Source(NamedTuple):
    """`length` tokens of those that a rank holds, from `start` on."""

    rank: int
    start: int
    length: int


def _sources(tokens: range, held: list[list[range]]) -> list[_Source]:
    """Where `tokens` are, in sequence order, if each rank holds these stretches."""
    found = []
    for rank, of_rank in enumerate(held):
        before = 0
        for stretch in of_rank:
            common = range(max(stretch.start, tokens.start), min(stretch.stop, tokens.stop))
            if common:
                found.append((common.start, _Source(rank, before + common.start - stretch.start, len(common))))
            before += len(stretch)
    return [source for _, source in sorted(found)]


@lru_cache(maxsize=32)
def plan_halos(seq_len: int, context: int, tensor: int, index: int, halo: int) -> HaloExchange:
    """The exchange of rank `index`, for sequences of `seq_len` tokens, which all ranks have in equal shares."""
    ranks = range(context * tensor)
    held = [stretches(seq_len, context, tensor, rank) for rank in ranks]
    # Of each rank, for each of its stretches.
    needed = [[_sources(range(max(0, own.start - halo), own.start), held) for own in of_rank] for of_rank in held]

    def sent(source: int, to: int) -> tuple[tuple[int, int], ...]:
        found = (each for each in chain(*needed[to]) if each.rank == source != to)
        return tuple((start, length) for _, start, length in found)

    receives = tuple(sum(length for _, length in sent(rank, index)) for rank in ranks)
    following = [*accumulate(receives, initial=0)]  # of each rank's tokens among those received, the next

    def piece(source: _Source) -> Piece:
        if source.rank == index:
            return Piece(True, source.start, source.length)
        following[source.rank] += source.length
        return Piece(False, following[source.rank] - source.length, source.length)

    starts = accumulate(map(len, held[index]), initial=0)
    found = (
        (*map(piece, halo_of), Piece(True, start, len(own)))
        for halo_of, start, own in zip(needed[index], starts, held[index])
    )
    return HaloExchange(halo, tuple(sent(index, to) for to in ranks), receives, tuple(found))


@dataclass(frozen=True)
class StreamSlice(StreamContext):
    """The context of this rank's tokens; `exchanges` for each halo that an annex asks for."""

    exchanges: tuple[HaloExchange, ...]
    group: str

    def with_halos(self, x: Tensor, halo: int) -> Iterator[Tensor]:
        """As in StreamContext. Collective over the group."""
        exchange = next(each for each in self.exchanges if each.halo == halo)
        received = self._received(x, exchange) if halo else x
        for pieces in exchange.stretches:
            # None of what was received, so that it is used on a rank that receives nothing too: else its backward pass
            # would skip the collective for which the other ranks wait.
            sources = [received[:, :0]]
            sources += [(x if piece.own else received)[:, piece.start : piece.start + piece.length] for piece in pieces]
            missing = halo - sum(piece.length for piece in pieces[:-1])
            yield F.pad(torch.cat(sources, dim=1), (0, 0, missing, 0))

    def _received(self, x: Tensor, exchange: HaloExchange) -> Tensor:
        """What the other ranks send, [B, tokens, N]."""
        sent = [x[:, start : start + length] for pieces in exchange.sends for start, length in pieces]
        given = torch.cat(sent, dim=1) if sent else x[:, :0]
        splits = [sum(length for _, length in pieces) for pieces in exchange.sends]
        # Tokens first, because the collective splits the first axis.
        tokens = given.transpose(0, 1).contiguous()
        return waited(OPERATORS.all_to_all_single(tokens, list(exchange.receives), splits, self.group)).transpose(0, 1)


@dataclass(frozen=True)
class SharedStream(StreamLayout):
    """This rank is `index` of context x tensor ranks in `group`, which share each sequence."""

    degree_of_context: int
    degree_of_tensor: int
    index: int
    group: str
    halos: frozenset[int]

    def local(self, x: Tensor) -> Tensor:
        """As in StreamLayout."""
        parts = stretches(x.shape[1], self.degree_of_context, self.degree_of_tensor, self.index)
        return torch.cat([x[:, part.start : part.stop] for part in parts], dim=1)

    def context(self, positions: Tensor) -> StreamContext:
        """As in StreamLayout."""
        shape = positions.shape[1], self.degree_of_context, self.degree_of_tensor, self.index
        exchanges = tuple(plan_halos(*shape, halo) for halo in sorted(self.halos))
        return StreamSlice(self.local(positions), exchanges, self.group)
