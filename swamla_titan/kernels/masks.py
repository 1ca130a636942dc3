"""Which keys a query sees: the rule, once, and the two forms in which attention takes it.

Documents are maximal runs of equal ids along a row. Everything about them follows from one tensor, the index at which
each token's own document starts: the mask, the positions and the sink all read it, so they cannot disagree.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # side of FlexAttention's mask tiles, its own default


def sees(query: Any, key: Any, start: Any, window: int | None, sink: int) -> Any:
    """Whether the query at index `query` sees the key at index `key`; elementwise over tensors that broadcast.

    `start` is the index at which the query's document begins. Causal inside the document; with a `window` (the query
    itself counts in it) only the newest `window` keys and the first `sink` keys of the document.
    """
    causal = (key <= query) & (key >= start)
    if window is None:
        return causal
    return causal & ((query - key < window) | (key - start < sink))


def document_starts(document_ids: Tensor) -> Tensor:
    """[B, T] ids -> [B, T] int64 index of the first token of each token's document.

    A document ends where the id changes; an id that comes back later in the row is a new document.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def dense_mask(starts: Tensor, window: int | None, sink: int) -> Tensor:
    """[B, T] document starts -> boolean [B, 1, T, T], True where the query (third axis) sees the key (last)."""
    index = torch.arange(starts.shape[1], device=starts.device)
    mask: Tensor = sees(index[:, None], index[None, :], starts[:, :, None], window, sink)  # [B, T, T]
    return mask[:, None]


def block_mask(starts: Tensor, window: int | None, sink: int) -> BlockMask:
    """[B, T] document starts -> the same mask for FlexAttention, without ever making T x T entries."""
    starts = starts.to(torch.int32)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = sees(query, key, starts[batch, query], window, sink)
        return seen

    return _tiles(starts, window, sink, mask_mod)


@lru_cache(maxsize=32)
def block_mask_of_one_document(seq_len: int, window: int | None, sink: int, device: torch.device) -> BlockMask:
    """`block_mask` for rows that are one document each; made once per shape, broadcast over the batch."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = sees(query, key, 0, window, sink)
        return seen

    # A validation pass in inference mode may come first, and its tensors could not be kept for a backward later.
    with torch.inference_mode(False):
        starts = torch.zeros(1, seq_len, dtype=torch.int32, device=device)
        return _tiles(starts, window, sink, mask_mod)


def _tiles(starts: Tensor, window: int | None, sink: int, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """The BlockMask of `mask_mod`, from the interval of keys that each query sees.

    torch's create_block_mask evaluates all T x T pairs at each call (a new batch has new documents). Here a row's keys
    are two intervals, window and sink, so [B, T, T/128] comparisons are enough. A tile is "full" (needs no mask inside)
    if all its queries see all its keys through the window; that misses full tiles made by a huge sink, which only costs
    speed.
    """
    seq_len = starts.shape[1]
    device = starts.device
    query = torch.arange(seq_len, device=device, dtype=torch.int32)[:, None]  # [T, 1]
    start = starts[:, :, None]  # [B, T, 1]
    first = torch.arange(0, seq_len, BLOCK, device=device, dtype=torch.int32)  # [N] first key of each tile
    last = (first + BLOCK - 1).clamp(max=seq_len - 1)

    oldest = start if window is None else torch.maximum(start, query - window + 1)  # [B, T, 1]
    some = (last >= oldest) & (first <= query)  # [B, T, N]
    if window is not None and sink > 0:
        some |= (last >= start) & (first <= torch.minimum(start + sink - 1, query))
    # A tile that sticks out over the end of the sequence is never full: the kernel has to mask the rest of it.
    every = (first >= oldest) & (first + BLOCK - 1 <= query)

    padding = (0, 0, 0, -seq_len % BLOCK)
    some = torch.nn.functional.pad(some, padding).unflatten(1, (-1, BLOCK)).any(dim=2)  # [B, N, N]
    full = torch.nn.functional.pad(every, padding).unflatten(1, (-1, BLOCK)).all(dim=2)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(seq_len, seq_len)
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean [B, N, N] -> how many key tiles each query tile has [B, 1, N], and their numbers first [B, 1, N, N]."""
    count = tiles.sum(dim=-1, dtype=torch.int32)
    order = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None].contiguous(), order[:, None].contiguous()
