"""Communication of context-parallel ranks: all-gather of latents for MLA, exchange of window halos and sinks for SWA.

Collectives (distributed/collectives.py) are started before they are waited for. Tensors hold the tokens of one rank,
[B, 2 * chunk, ...], unless they are said to hold full sequences.
"""

import torch
from torch import Tensor

from swamla_titan.distributed.collectives import OPERATORS, waited
from swamla_titan.parallel.sequence_layout import SequenceLayout, SwaExchange, chunks_of


def local_chunks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The tokens of this rank's two chunks, [B, T, ...] -> [B, 2 * chunk, ...]."""
    return torch.cat([x[:, start : start + layout.chunk] for start in layout.starts], dim=1)


def all_gather_sequence(x: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """All ranks' tokens [B, 2 * chunk, N] -> the full sequences in order [B, T, N]. Backward: reduce-scatter."""
    size, chunk = layout.size, layout.chunk
    batch, _, width = x.shape
    gathered = waited(OPERATORS.all_gather_into_tensor(x.contiguous(), size, group))
    early, late = gathered.view(size, batch, 2, chunk, width).unbind(dim=2)  # chunks 0, 1, ... and ..., size + 1, size
    ordered = torch.cat([early, late.flip(0)])  # [2 size, B, chunk, N]
    return ordered.transpose(0, 1).reshape(batch, layout.seq_len, width)


def sink_sources(starts: Tensor, exchange: SwaExchange) -> tuple[Tensor, Tensor]:
    """Which of its own tokens a rank sends as sinks, for the document starts [B, T] of full sequences.

    For each rank's two chunks, rank by rank, and each sink slot: the token's index among this rank's tokens, and
    whether this rank has it at all, both [B, 2 * size * sinks].

    A chunk's sinks are the first tokens of the document that the chunk's first token belongs to, d. Where those would
    run into the halo, which begins at h, or d is in the halo or the chunk itself, the slots hold the tokens just
    before h instead. So a token has one slot, and the sinks of any document are adjacent (`swa_intervals`).
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
    key: Tensor, value: Tensor, exchange: SwaExchange, sink_index: Tensor, sink_owned: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """Keys [B, 2 * chunk, G, D] and values -> those that this rank's two chunks may see, [B, 2 * section, G, D].

    A section is [sinks | halo | the chunk itself]; slots that no token belongs to hold zeros. `sink_index` and
    `sink_owned` are from `sink_sources`, [B or 1, 2 * size * sinks]. The two collectives overlap.
    """
    received = _start_halos(key, value, exchange, group)
    sinks = _start_sinks(key, value, exchange, sink_index, sink_owned, group)
    width = key.shape[-1]
    # [received, B, G, 2 D] -> keys and values [B, received, G, D]; likewise sinks [2, sinks, B, G, 2 D].
    far = (None, None) if received is None else waited(received).transpose(0, 1).split(width, dim=-1)
    first = (None, None) if sinks is None else waited(sinks).permute(0, 2, 1, 3, 4).split(width, dim=-1)
    return _sections(key, far[0], first[0], exchange), _sections(value, far[1], first[1], exchange)


def _sections(own: Tensor, far: Tensor | None, sinks: Tensor | None, exchange: SwaExchange) -> Tensor:
    """[sinks | halo | chunk] for each of the chunks, [B, 2 * section, G, D].

    `own` is [B, 2 * chunk, G, D], `far` [B, received, G, D], `sinks` [2, B, sinks, G, D].
    """
    batch, _, heads, width = own.shape
    chunk = exchange.layout.chunk
    parts: list[Tensor] = []
    for j, pieces in enumerate(exchange.halos):
        if sinks is not None:
            parts.append(sinks[j])
        padding = exchange.halo - sum(piece.length for piece in pieces)  # halo before the beginning of the sequence
        if padding:
            parts.append(own.new_zeros(batch, padding, heads, width))
        for piece in pieces:
            source = own if piece.own else far
            assert source is not None
            parts.append(source[:, piece.start : piece.start + piece.length])
        parts.append(own[:, j * chunk : (j + 1) * chunk])
    return torch.cat(parts, dim=1)


def _start_halos(key: Tensor, value: Tensor, exchange: SwaExchange, group: str) -> Tensor | None:
    """Start to exchange the tokens of halos; gives those of this rank, [received, B, G, 2 D], or None without halos."""
    if exchange.window == 1:
        return None
    slices = [slice(start, start + length) for pieces in exchange.sends for start, length in pieces]
    sent = torch.cat([torch.cat([key[:, at], value[:, at]], dim=-1) for at in slices], dim=1)
    # Tokens first, because the collective splits the first axis.
    received: Tensor = OPERATORS.all_to_all_single(
        sent.transpose(0, 1).contiguous(), exchange.receive_splits, exchange.send_splits, group
    )
    return received


def _start_sinks(
    key: Tensor, value: Tensor, exchange: SwaExchange, index: Tensor, owned: Tensor, group: str
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
