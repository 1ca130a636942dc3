"""Which keys a query sees: one rule, how many they are, and the forms of mask that implementations of attention take.

Documents are maximal runs of equal ids along a sequence. One tensor describes them, the index at which each token's
document starts: mask, positions and sink all derive from it, so they cannot disagree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Size, Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # side of FlexAttention's mask tiles, its own default


def sees(query: Any, key: Any, start: Any, window: int | None, sink: int) -> Any:
    """Whether the query at index `query` sees the key at index `key`; elementwise over tensors that broadcast.

    `start` is the index at which the query's document begins. Causal within the document; with a `window`, which counts
    the query itself, only the latest `window` keys and the first `sink` keys of the document.
    """
    causal = (key <= query) & (key >= start)
    if window is None:
        return causal
    return causal & ((query - key < window) | (key - start < sink))


def document_starts(document_ids: Tensor) -> Tensor:
    """[B, T] ids -> [B, T] int64 index of the first token of each token's document.

    A document ends where the id changes; the same id later in the sequence is a new document.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def document_ends(starts: Tensor) -> Tensor:
    """[B, T] document starts -> [B, T], in their dtype, the index after the last token of each token's document."""
    length = starts.shape[1]
    index = torch.arange(length, device=starts.device, dtype=starts.dtype)
    begins_next = torch.full_like(starts, length)
    begins_next[:, :-1] = torch.where(starts[:, 1:] == index[1:], index[1:], length)
    return begins_next.flip(1).cummin(dim=1).values.flip(1)


def dense_mask(starts: Tensor, window: int | None, sink: int) -> Tensor:
    """[B, T] document starts -> boolean [B, 1, T, T], True where the query (third axis) sees the key (last)."""
    index = torch.arange(starts.shape[1], device=starts.device)
    mask: Tensor = sees(index[:, None], index[None, :], starts[:, :, None], window, sink)  # [B, T, T]
    return mask[:, None]


def block_mask(starts: Tensor, window: int | None, sink: int) -> BlockMask:
    """[B, T] document starts -> the same mask for FlexAttention, without a T x T tensor."""
    starts = starts.to(torch.int32)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = sees(query, key, starts[batch, query], window, sink)
        return seen

    return _sequence_block_mask(starts, window, sink, mask_mod)


@lru_cache(maxsize=32)
def block_mask_of_one_document(seq_len: int, window: int | None, sink: int, device: torch.device) -> BlockMask:
    """`block_mask` for sequences of one document each, cached by shape and broadcast over the batch."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = sees(query, key, 0, window, sink)
        return seen

    # Not in inference mode, even if validation comes first: autograd could not save its tensors for training later.
    with torch.inference_mode(False):
        starts = torch.zeros(1, seq_len, dtype=torch.int32, device=device)
        return _sequence_block_mask(starts, window, sink, mask_mod)


def causal_pairs(seq_len: int) -> int:
    """Visible (query, key) pairs of a sequence under a causal mask."""
    return seq_len * (seq_len + 1) // 2


def chunk_pairs(queries: int, starts: Sequence[int]) -> int:
    """Visible (query, key) pairs of a sequence's chunks of equal length, `queries` in all, that begin at `starts`."""
    length = queries // len(starts)
    return sum(start * length + causal_pairs(length) for start in starts)


def window_pairs(seq_len: int, window: int, sink: int) -> int:
    """Visible (query, key) pairs of a sequence under a window with sinks; a key in both counts once."""
    window = min(window, seq_len)
    in_window = causal_pairs(window) + (seq_len - window) * window
    late = seq_len - window  # queries whose window no longer reaches the first key: they miss 1, 2, ..., `late` keys
    sink = min(sink, late)
    return in_window + causal_pairs(sink) + (late - sink) * sink


def attention_flops(query: Size, value_dim: int, pairs: int) -> int:
    """Operations of a forward pass, with queries [B, T, H, D] and `pairs` per sequence: scores, and sums of values."""
    batch, _, heads, width = query
    return 2 * batch * heads * pairs * (width + value_dim)


class MaskSpec(NamedTuple):
    """Which keys of its document a query sees: the latest `window` (None: all) and the first `sink`."""

    window: int | None = None
    sink: int = 0


@dataclass(frozen=True)
class WindowRule:
    """The mask for our window kernels, which evaluate `sees` themselves."""

    starts: Tensor | None  # [B, T] int32, contiguous; None: one document per sequence
    window: int
    sink: int


@dataclass(frozen=True)
class DocumentRule:
    """The mask for our document kernels: each token's document starts and ends, [B, T] int32, contiguous."""

    starts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Chunks:
    """The mask for queries that are chunks of a sequence: causal, where `starts` are the chunks' first tokens."""

    starts: tuple[int, ...]


@dataclass(frozen=True)
class SelectionRule:
    """Causal inside documents, for selective attention of queries that are chunks of a sequence.

    Where each token's document begins and has ended, [B or 1, T] contiguous int32 of full sequences, and where each
    chunk begins: (0,), if the queries are all there.
    """

    starts: Tensor
    ends: Tensor
    chunks: tuple[int, ...] = (0,)


class Selection(NamedTuple):
    """That, and what selects (selective.py): queries [B, Q, D] and keys [B, S, D], or None: those of the head `head`.

    `before` [B, chunks, S] is the sum of what the queries of other chunks, before each chunk, select of each key; None:
    nothing.
    """

    rule: SelectionRule
    head: int
    query: Tensor | None = None
    key: Tensor | None = None
    before: Tensor | None = None


Mask = Tensor | BlockMask | WindowRule | DocumentRule | Chunks | SelectionRule | Selection | None
# Of these, in this order.
MaskForm = Literal["boolean", "block", "window", "documents", "chunks", "selection", "none"]


def mask_of_sequences(form: MaskForm, starts: Tensor, has_documents: bool, spec: MaskSpec) -> Mask:
    """The mask of full sequences in the form that an implementation of attention takes.

    `starts` [B or 1, T] int64 are where each token's document begins.
    """
    if form == "none":
        return None
    if form == "window":
        assert spec.window is not None
        return WindowRule(starts.to(torch.int32) if has_documents else None, spec.window, spec.sink)
    if form == "documents":
        own = starts.to(torch.int32)
        return DocumentRule(own, document_ends(own))
    if form == "selection":
        own = starts.to(torch.int32)
        return SelectionRule(own, document_ends(own))
    if form == "boolean":
        return dense_mask(starts, spec.window, spec.sink)
    assert form == "block"
    if has_documents:
        return block_mask(starts, spec.window, spec.sink)
    return block_mask_of_one_document(starts.shape[1], spec.window, spec.sink, starts.device)


class KeyIntervals(NamedTuple):
    """The keys that each query sees, as two closed intervals of indices into the keys: [B, Q] integers each.

    The first interval is never empty. The second (the sink) may overlap it, and is empty if its end is before its
    start; None: no query has one. For queries that are a slice of a sequence, or keys in another order.
    """

    first: Tensor
    last: Tensor
    sink_first: Tensor | None = None
    sink_last: Tensor | None = None


def intervals_in_sequence(starts: Tensor, queries: Tensor, window: int | None, sink: int) -> KeyIntervals:
    """The rule of `sees` as intervals, for the queries at indices `queries` [Q] and all keys of a sequence in order.

    `starts` [B, Q] is where each query's document begins.
    """
    queries = queries.expand_as(starts)
    first = starts if window is None else torch.maximum(starts, queries - window + 1)
    if window is None or sink == 0:
        return KeyIntervals(first, queries)
    return KeyIntervals(first, queries, starts, torch.minimum(starts + sink - 1, queries))


def dense_mask_of(intervals: KeyIntervals, keys: int) -> Tensor:
    """Boolean [B, 1, Q, keys], True where the query (third axis) sees the key (last)."""
    key = torch.arange(keys, device=intervals.first.device)
    mask: Tensor = (key >= intervals.first[..., None]) & (key <= intervals.last[..., None])  # [B, Q, keys]
    if intervals.sink_first is not None and intervals.sink_last is not None:
        mask = mask | (key >= intervals.sink_first[..., None]) & (key <= intervals.sink_last[..., None])
    return mask[:, None]


def block_mask_of(intervals: KeyIntervals, keys: int) -> BlockMask:
    """`dense_mask_of` for FlexAttention, without a Q x keys tensor. B = 1 serves a batch of any size."""
    intervals = KeyIntervals(*(None if bound is None else bound.to(torch.int32) for bound in intervals))  # type: ignore[arg-type]
    # A mask made for one sequence ignores the batch index, so that it serves all.
    one = intervals.first.shape[0] == 1
    first, last, sink_first, sink_last = (
        None if bound is None else bound[0].contiguous() if one else bound.contiguous() for bound in intervals
    )
    assert first is not None
    assert last is not None

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if one else (batch, query)
        seen = (key >= first[at]) & (key <= last[at])
        if sink_first is not None and sink_last is not None:
            seen = seen | (key >= sink_first[at]) & (key <= sink_last[at])
        return seen

    return _block_mask(intervals, keys, mask_mod)


def _sequence_block_mask(starts: Tensor, window: int | None, sink: int, mask_mod: Callable[..., Tensor]) -> BlockMask:
    index = torch.arange(starts.shape[1], device=starts.device, dtype=torch.int32)
    return _block_mask(intervals_in_sequence(starts, index, window, sink), starts.shape[1], mask_mod)


def _block_mask(intervals: KeyIntervals, keys: int, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """The BlockMask of `mask_mod`, whose tiles follow from the intervals of keys that each query sees.

    torch's create_block_mask evaluates all Q x keys pairs at each call, and each batch has new documents. With two
    intervals per query, window and sink, [B, Q, keys/128] comparisons suffice. A tile is "full" (needs no mask inside)
    if all its queries see all its keys through the window. Tiles that are full only thanks to a large sink are missed,
    which costs speed alone.
    """
    queries = intervals.first.shape[1]
    first, last = intervals.first[..., None], intervals.last[..., None]  # [B, Q, 1]
    tile_first = torch.arange(0, keys, BLOCK, device=first.device, dtype=torch.int32)  # [N] the first key of each tile
    tile_last = (tile_first + BLOCK - 1).clamp(max=keys - 1)

    some = (tile_last >= first) & (tile_first <= last)  # [B, Q, N]
    if intervals.sink_first is not None and intervals.sink_last is not None:
        sink_first, sink_last = intervals.sink_first[..., None], intervals.sink_last[..., None]
        some |= (tile_last >= sink_first) & (tile_first <= sink_last) & (sink_first <= sink_last)
    # A tile that extends beyond the last key is never full, because the kernel has to mask the rest of it.
    every = (tile_first >= first) & (tile_first + BLOCK - 1 <= last)

    padding = (0, 0, 0, -queries % BLOCK)
    some = torch.nn.functional.pad(some, padding).unflatten(1, (-1, BLOCK)).any(dim=2)  # [B, M, N]
    full = torch.nn.functional.pad(every, padding).unflatten(1, (-1, BLOCK)).all(dim=2)
    return BlockMask.from_kv_blocks(
        *_indices(some & ~full), *_indices(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(queries, keys)
    )


def _indices(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean [B, M, N] -> how many key tiles each query tile has, [B, 1, M], and their indices first, [B, 1, M, N]."""
    count = tiles.sum(dim=-1, dtype=torch.int32)
    order = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None].contiguous(), order[:, None].contiguous()
