"""The residual stream where ranks share each sequence: which tokens a rank holds, and the tokens before them.

Context parallelism gives a rank two chunks of the sequence (sequence_layout.py), tensor parallelism cuts these, one
after the other, into equal shards. So a rank holds one or two stretches of consecutive tokens, or three. Annexes whose
result depends on some tokens before a token, as by a convolution, exchange these tokens' values: the halo of a stretch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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
    if context == 1:
        chunks = [range(seq_len)]
    else:
        layout = SequenceLayout(seq_len, context, rank)
        chunks = [range(start, start + layout.chunk) for start in layout.starts]
    size = seq_len // (context * tensor)
    first, found, before = shard * size, list[range](), 0
    for chunk in chunks:
        part = chunk[max(first - before, 0) : max(first + size - before, 0)]
        found += [part] if part else []
        before += len(chunk)
    return found


@lru_cache(maxsize=32)
def plan_halos(seq_len: int, context: int, tensor: int, index: int, halo: int) -> HaloExchange:
    """The exchange of rank `index`, for sequences of `seq_len` tokens, which all ranks have in equal shares."""
    held = [stretches(seq_len, context, tensor, rank) for rank in range(context * tensor)]

    def pieces(needed: range) -> Iterator[tuple[int, int, range]]:
        """(rank, start in its tokens, tokens) that make up `needed`, in sequence order."""
        found = []
        for rank, of_rank in enumerate(held):
            before = 0
            for each in of_rank:
                common = range(max(each.start, needed.start), min(each.stop, needed.stop))
                if common:
                    found.append((rank, before + common.start - each.start, common))
                before += len(each)
        return iter(sorted(found, key=lambda piece: piece[2].start))

    def halos_of(rank: int) -> list[list[tuple[int, int, range]]]:
        return [list(pieces(range(max(0, each.start - halo), each.start))) for each in held[rank]]

    sends = tuple(
        tuple(
            (start, len(tokens))
            for of_stretch in halos_of(to)
            for source, start, tokens in of_stretch
            if source == index
        )
        if to != index
        else ()
        for to in range(len(held))
    )
    mine = halos_of(index)
    receives = [
        sum(len(tokens) for of_stretch in mine for source, _, tokens in of_stretch if source == rank) * (rank != index)
        for rank in range(len(held))
    ]
    places = [sum(receives[:rank]) for rank in range(len(held))]  # of the next piece from each rank
    found, done = [], 0
    for of_stretch, stretch in zip(mine, held[index]):
        parts = []
        for source, start, tokens in of_stretch:
            parts.append(Piece(source == index, start if source == index else places[source], len(tokens)))
            places[source] += len(tokens)
        found.append((*parts, Piece(True, done, len(stretch))))
        done += len(stretch)
    return HaloExchange(halo, sends, tuple(receives), tuple(found))


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
