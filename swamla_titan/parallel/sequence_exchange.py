"""Exchanges of tokens between ranks that share sequences, by the plans of sequence_layout.py.

Of context parallelism all-gathered tokens and chunks' sums, and keys and values of windows' halos and sinks; of the
residual stream the halos that annexes ask for, also where tensor parallelism cuts it (`share_stream`).

Collectives (distributed/collectives.py) are started before they are waited for. Tensors hold the tokens of one rank,
[B, 2 * chunk, ...], unless they are said to hold full sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla_titan.distributed.collectives import OPERATORS, waited
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annex import StreamContext, StreamLayout
from swamla_titan.parallel.sequence_layout import (
    HaloExchange,
    SequenceLayout,
    WindowExchangePlan,
    chunks_of,
    plan_halos,
    stretches,
)


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
class StreamSlice(StreamContext):
    """The context of this rank's tokens; `exchanges` for each halo that an annex asks for."""

    exchanges: tuple[HaloExchange, ...]
    group: str

    def with_halos(self, x: Tensor, halo: int) -> Iterator[Tensor]:
        """As in StreamContext. Collective over the group."""
        exchange = next(each for each in self.exchanges if each.halo == halo)
        received = self._received(x, exchange) if halo else x
        for with_halo in _with_halos(x, received, exchange, halo):
            # None of what was received, so that it is used on a rank that receives nothing too: else its backward pass
            # would skip the collective for which the other ranks wait.
            yield torch.cat([received[:, :0], *with_halo], dim=1)

    def _received(self, x: Tensor, exchange: HaloExchange) -> Tensor:
        """What the other ranks send, [B, tokens, N]."""
        return waited(_start_halos([x], exchange, self.group)).transpose(0, 1)


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


def local_chunks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The tokens of this rank's two chunks, [B, T, ...] -> [B, 2 * chunk, ...]."""
    return torch.cat([x[:, start : start + layout.chunk] for start in layout.starts], dim=1)


def all_gather_sequence(x: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """All ranks' tokens [B, 2 * chunk, N] -> the full sequences in order [B, T, N]. Backward: reduce-scatter."""
    of_chunks = _all_gather_chunks(x.unflatten(1, (2, layout.chunk)), layout, group)  # [2 size, B, chunk, N]
    return of_chunks.transpose(0, 1).reshape(len(x), layout.seq_len, x.shape[-1])


def sums_before_chunks(sums: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """Each rank's sums over the queries of its chunks, [B, 2, T] -> over those of all chunks before, for its own."""
    of_chunks = _all_gather_chunks(sums, layout, group)  # [2 size, B, T]
    own = chunks_of(layout.rank, layout.size)
    return torch.stack([of_chunks[:chunk].sum(dim=0) for chunk in own], dim=1)


def _all_gather_chunks(x: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """What all ranks have of their two chunks, [B, 2, ...] -> of all chunks in order, [2 * size, B, ...]."""
    gathered = waited(OPERATORS.all_gather_into_tensor(x.contiguous(), layout.size, group))
    early, late = gathered.unflatten(0, (layout.size, -1)).unbind(dim=2)  # chunks 0, 1, ... and ..., size + 1, size
    return torch.cat([early, late.flip(0)])


def sink_sources(starts: Tensor, exchange: WindowExchangePlan) -> tuple[Tensor, Tensor]:
    """Which of its own tokens a rank sends as sinks, for the document starts [B, T] of full sequences.

    For each rank's two chunks, rank by rank, and each sink slot: the token's index among this rank's tokens, and
    whether this rank has it at all, both [B, 2 * size * sinks].

    A chunk's sinks are the first tokens of the document that the chunk's first token belongs to, d. Where those would
    run into the halo, which begins at h, or d is in the halo or the chunk itself, the slots hold the tokens just
    before h instead. So a token has one slot, and the sinks of any document are adjacent (`window_intervals`).
    """
    layout, device = exchange.layout, starts.device
    # Computed on the device, because a Python list would be copied there, and the host would wait.
    early, late = chunks_of(torch.arange(layout.size, device=device), layout.size)
    firsts = torch.stack([early, late], dim=1).flatten() * layout.chunk  # [2 size]
    # Where the beginning of the sequence cuts the halo short it holds all keys, and it does not matter what is here.
    halos = firsts - (exchange.window - 1)
    begin = torch.minimum(starts[:, firsts], halos - exchange.sinks)  # [B, 2 size]
    slots = begin[..., None] + torch.arange(exchange.sinks, device=device)  # [B, 2 size, sinks], sequence indices
    index, owned = torch.zeros_like(slots), torch.zeros_like(slots, dtype=torch.bool)
    for j, start in enumerate(layout.starts):
        here = (slots >= start) & (slots < start + layout.chunk)
        index = torch.where(here, slots - start + j * layout.chunk, index)
        owned = owned | here
    return index.flatten(1), owned.flatten(1)


def exchange_windows(
    key: Tensor, value: Tensor, exchange: WindowExchangePlan, sink_index: Tensor, sink_owned: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """Keys [B, 2 * chunk, G, D] and values -> those that this rank's two chunks may see, [B, 2 * section, G, D].

    A section is [sinks | halo | the chunk itself]; slots that no token belongs to hold zeros. `sink_index` and
    `sink_owned` are from `sink_sources`, [B or 1, 2 * size * sinks]. The two collectives overlap.
    """
    received = _start_halos((key, value), exchange.halos, group) if exchange.window > 1 else None
    sinks = _start_sinks(key, value, exchange, sink_index, sink_owned, group)
    width = key.shape[-1]
    # [received, B, G, 2 D] -> keys and values [B, received, G, D]; likewise sinks [2, sinks, B, G, 2 D].
    far = (key, value) if received is None else waited(received).transpose(0, 1).split(width, dim=-1)
    first = (None, None) if sinks is None else waited(sinks).permute(0, 2, 1, 3, 4).split(width, dim=-1)
    return _sections(key, far[0], first[0], exchange), _sections(value, far[1], first[1], exchange)


def _sections(own: Tensor, far: Tensor, sinks: Tensor | None, exchange: WindowExchangePlan) -> Tensor:
    """[sinks | halo | chunk] for each of the chunks, [B, 2 * section, G, D].

    `own` is [B, 2 * chunk, G, D], `far` [B, received, G, D], `sinks` [2, B, sinks, G, D].
    """
    parts: list[Tensor] = []
    for j, with_halo in enumerate(_with_halos(own, far, exchange.halos, exchange.halo)):
        if sinks is not None:
            parts.append(sinks[j])
        parts += with_halo
    return torch.cat(parts, dim=1)


def _with_halos(own: Tensor, received: Tensor, exchange: HaloExchange, halo: int) -> list[list[Tensor]]:
    """Each stretch of tokens [B, n, ...] behind the pieces of its halo, zeros where that lies before the sequence."""
    sections = []
    for pieces in exchange.sections:
        missing = halo - sum([piece.length for piece in pieces[:-1]])
        zeros = [own.new_zeros(len(own), missing, *own.shape[2:])] if missing else []
        sources = [(own if piece.own else received, piece) for piece in pieces]
        sections.append(zeros + [source[:, piece.start : piece.start + piece.length] for source, piece in sources])
    return sections


def _start_halos(tensors: Sequence[Tensor], exchange: HaloExchange, group: str) -> Tensor:
    """Start to exchange the tokens of halos; gives those of this rank, [received, B, ..., N].

    `tensors` are [B, tokens, ..., n], and N is their widths together.
    """
    slices = [slice(start, start + length) for pieces in exchange.sends for start, length in pieces] or [slice(0)]
    sent = torch.cat([torch.cat([tensor[:, at] for tensor in tensors], dim=-1) for at in slices], dim=1)
    # Tokens first, because the collective splits the first axis.
    received: Tensor = OPERATORS.all_to_all_single(
        sent.transpose(0, 1).contiguous(), list(exchange.receives), exchange.send_splits, group
    )
    return received


def _start_sinks(
    key: Tensor, value: Tensor, exchange: WindowExchangePlan, index: Tensor, owned: Tensor, group: str
) -> Tensor | None:
    """Start to collect the sinks of this rank's chunks, [2, sinks, B, G, 2 D]; None: halos reach all keys.

    Every rank writes the sinks it owns among zeros, and a reduce-scatter combines them: shapes do not depend on where
    documents begin, so the host need not wait for the device. Each sink has one owner, and x + 0 is exact.
    """
    if exchange.sinks == 0:
        return None
    at = index[..., None, None].expand(key.shape[0], -1, *key.shape[2:])
    given = torch.cat([key.gather(1, at), value.gather(1, at)], dim=-1)  # [B, 2 size sinks, G, 2 D]
    given = torch.where(owned[..., None, None], given, 0.0)
    summed = OPERATORS.reduce_scatter_tensor(given.transpose(0, 1).contiguous(), "sum", exchange.layout.size, group)
    sinks: Tensor = summed.unflatten(0, (2, exchange.sinks))
    return sinks
