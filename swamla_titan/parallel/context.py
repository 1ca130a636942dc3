"""Sequences that ranks share: context parallelism, for sequences that are longer than one GPU has memory for.

All ranks of a context group are given the same full sequences, and each computes its own chunks of them
(sequence_layout.py). Blocks work on single tokens but for attention, whose `key_exchange` is
- "gather": what decoding would keep is gathered, as MLA's latent and rotary key of each token, not keys and values:
  with the default sizes 320 values a token instead of 5120 for 16 heads. Each rank expands them for the full sequence.
  Sums over the queries before a chunk, as selective attention needs, come from a sum of each chunk for each key.
- "halo": the windows' halos and the sinks are exchanged (`exchange_windows`), however long the sequence is.
Annexes whose result depends on some tokens before a token, as by a convolution, exchange these tokens' values. The
collectives are in sequence_exchange.py. Gradients of parameters are then sums over the rank's own tokens; whoever
averages gradients adds them up over the group.

Tensors hold the tokens of one rank, [B, 2 * chunk, ...], unless they are said to hold full sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import choose
from swamla_titan.kernels.attention.masks import (
    Chunks,
    KeyIntervals,
    Mask,
    MaskForm,
    MaskSpec,
    Selection,
    SelectionRule,
    block_mask_of,
    dense_mask_of,
    document_ends,
    document_starts,
    intervals_in_sequence,
)
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import Block, attention_kinds
from swamla_titan.model.branch import Attention, AttentionContext, InnerAttention, KeyExchange, SequenceContext
from swamla_titan.model.context import FullSequences
from swamla_titan.parallel.sequence_exchange import (
    all_gather_sequence,
    exchange_windows,
    local_chunks,
    sink_sources,
    sums_before_chunks,
)
from swamla_titan.parallel.sequence_layout import (
    SequenceLayout,
    Traffic,
    WindowExchangePlan,
    plan_window_exchange,
    window_exchange_bytes,
)


@dataclass(frozen=True)
class WindowSlice(AttentionContext):
    """For this rank's tokens and "halo"; `mask` is over the sections that `exchange_windows` lays out."""

    group: str  # the context group's name, which is how operators in a graph know it
    exchange: WindowExchangePlan
    sink_index: Tensor  # [B or 1, 2 * ranks * sinks]
    sink_owned: Tensor


@dataclass(frozen=True)
class GatheredSlice(AttentionContext):
    """For this rank's tokens and "gather"; `mask` is over the keys of full sequences."""

    group: str
    layout: SequenceLayout


def apply_context_parallel(model: SWAMLAModel, group: dist.ProcessGroup) -> None:
    """Make `model` compute this rank's slice of each sequence, in place; `group` is the context group.

    Called before blocks are compiled and parameters sharded. The model (or a pipeline stage of one) then takes full
    sequences, whose length must be divisible by twice the group's size (config/parallel_rules.py). Decoding (`prefill`,
    `decode`) is not shared; it continues as on one process. A group of one changes nothing.

    Raises UserError for a kind of block that cannot share sequences.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    model.sequences = SharedSequences(size, rank, group.group_name)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        mixer = block.attention
        if not isinstance(mixer, Attention) or mixer.key_exchange not in _INNER:
            raise UserError(f"parallel.context = {size}: {block.kind} blocks cannot share sequences; use 1")
        mixer.inner_attention = _INNER[mixer.key_exchange]()


class WindowExchange(InnerAttention):
    """Attention of this rank's queries, keys and values, [B, 2 * chunk, ...], and the keys that windows add to them."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """As in InnerAttention."""
        assert isinstance(context, WindowSlice)
        assert selection is None, "the keys that windows do not reach are not exchanged"
        sinks = context.sink_index, context.sink_owned
        key, value = exchange_windows(key, value, context.exchange, *sinks, context.group)
        return context.attend(query, key, value, scale)


class LatentGather(InnerAttention):
    """Attention of this rank's queries to keys and values of full sequences, made from gathered latents."""

    def gather(self, latent: Tensor, rope_key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """As in InnerAttention, from latents [B, 2 * chunk, R] and rotated keys [B, 2 * chunk, 1, rope]."""
        assert isinstance(context, GatheredSlice)
        width = latent.shape[-1]
        gathered = all_gather_sequence(torch.cat([latent, rope_key.squeeze(2)], dim=-1), context.layout, context.group)
        return gathered[..., :width], gathered[..., width:].unsqueeze(2)

    def sums_before(self, sums: Callable[[], Tensor], context: AttentionContext) -> Tensor:
        """As in InnerAttention."""
        assert isinstance(context, GatheredSlice)
        return sums_before_chunks(sums(), context.layout, context.group)


_INNER: dict[KeyExchange, type[InnerAttention]] = {"halo": WindowExchange, "gather": LatentGather}


def window_intervals(starts: Tensor, exchange: WindowExchangePlan) -> KeyIntervals:
    """What this rank's queries see of the sections that `exchange_windows` lays out, for document starts [B, T].

    Within a section tokens are neighbours as in the sequence, so the intervals are those of it, moved, but for
    sinks that begin before what stands next to the halo: those are the section's first places (`sink_sources`).
    """
    layout = exchange.layout

    def for_each_chunk(values: list[int]) -> Tensor:
        return torch.cat([torch.full((layout.chunk,), value, device=starts.device) for value in values])  # [2 chunk]

    base = [j * exchange.section for j in range(2)]
    # From an index in the sequence to the one in the sections.
    move = for_each_chunk([b + exchange.sinks + exchange.halo - start for b, start in zip(base, layout.starts)])
    full = gathered_intervals(starts, layout, MaskSpec(exchange.window, exchange.sink))
    first, last = full.first + move, full.last + move
    if full.sink_first is None:
        return KeyIntervals(first, last)
    sink_first = torch.maximum(full.sink_first + move, for_each_chunk(base))
    return KeyIntervals(first, last, sink_first, torch.minimum(sink_first + exchange.sink - 1, last))


def gathered_intervals(starts: Tensor, layout: SequenceLayout, spec: MaskSpec) -> KeyIntervals:
    """What this rank's queries see of the full sequence, for document starts [B, T]."""
    queries = local_chunks(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    return intervals_in_sequence(local_chunks(starts, layout), queries, spec.window, spec.sink)


class SharedSequences(FullSequences):
    """This process, rank `rank` of `size` in `group`, computes two chunks of each sequence."""

    def __init__(self, size: int, rank: int, group: str) -> None:
        self.size, self.rank, self.group = size, rank, group

    def local(self, tokens: Tensor) -> Tensor:
        """As in FullSequences: [B, T] -> [B, T / size]."""
        return local_chunks(tokens, SequenceLayout(tokens.shape[1], self.size, self.rank))

    def context(
        self,
        config: ModelConfig,
        seq_len: int,
        document_ids: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        asked: AttentionBackend = "auto",
    ) -> SequenceContext:
        """As in FullSequences, of this rank's tokens."""
        layout = SequenceLayout(seq_len, self.size, self.rank)
        starts = None if document_ids is None else document_starts(document_ids)
        all_starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device) if starts is None else starts
        positions = local_chunks(torch.arange(seq_len, device=device) - all_starts, layout)

        def of_kind(attention: type[Attention]) -> AttentionContext:
            shape = config, seq_len, starts is not None
            request = attention.request(*shape, device, dtype, chunk=layout.chunk)
            choice, spec = choose(request, asked), request.mask
            rotation = attention.rotation(config, positions, dtype)
            if attention.key_exchange == "gather":
                mask = _mask(choice.form, layout, spec, starts, device)
                return GatheredSlice(positions, rotation, mask, choice.implementation, self.group, layout)
            exchange = _window_exchange(attention, spec, layout)
            mask = _mask(choice.form, exchange, spec, starts, device)
            sinks = sink_sources(all_starts, exchange)
            return WindowSlice(positions, rotation, mask, choice.implementation, self.group, exchange, *sinks)

        return SequenceContext({kind: of_kind(attention) for kind, attention in attention_kinds(config).items()})


def exchanged_bytes(
    attention: type[Attention], config: ModelConfig, layout: SequenceLayout, tensor: int, batch: int, dtype: torch.dtype
) -> Traffic:
    """Bytes that the collectives of one layer of this kind send and receive on the layout's rank, forward.

    `tensor`: the tensor-parallel ranks that share its heads. The backward pass sends what the forward received, and
    vice versa.
    """
    heads, spec = attention.heads(config), attention.mask(config)
    if attention.key_exchange == "gather":  # every tensor-parallel rank expands the full latents, to its own heads
        gathered, wide = attention.gathered(config), torch.promote_types(dtype, torch.float32)
        of_chunk = layout.chunk * gathered.local * dtype.itemsize + layout.seq_len * gathered.sums * wide.itemsize
        moved = (layout.size - 1) * batch * 2 * of_chunk
        return Traffic(moved, moved)
    exchange = _window_exchange(attention, spec, layout)
    return window_exchange_bytes(exchange, batch, heads.keys // tensor, heads.v_width, dtype.itemsize)


def _window_exchange(attention: type[Attention], spec: MaskSpec, layout: SequenceLayout) -> WindowExchangePlan:
    assert attention.key_exchange == "halo", f"{attention.__name__}: no exchange of keys is {attention.key_exchange!r}"
    return plan_window_exchange(layout, spec.window or layout.seq_len, spec.sink)


def _mask(
    form: MaskForm,
    over: WindowExchangePlan | SequenceLayout,
    spec: MaskSpec,
    starts: Tensor | None,
    device: torch.device,
) -> Mask:
    """The mask over the sections of an exchange, or full sequences; `starts` None: one document a sequence."""
    if form == "block" and starts is None:
        return _block_mask_of_one_document(over, spec, device)
    layout = over.layout if isinstance(over, WindowExchangePlan) else over
    if form == "chunks":
        return Chunks(tuple(layout.starts))
    if starts is None:
        starts = torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device)
    if form == "selection":
        own = starts.to(torch.int32)
        return SelectionRule(own, document_ends(own), layout.starts)
    assert form in ("block", "boolean")
    make = block_mask_of if form == "block" else dense_mask_of
    if isinstance(over, WindowExchangePlan):
        return make(window_intervals(starts, over), 2 * over.section)
    return make(gathered_intervals(starts, over, spec), layout.seq_len)


@lru_cache(maxsize=32)
def _block_mask_of_one_document(
    over: WindowExchangePlan | SequenceLayout, spec: MaskSpec, device: torch.device
) -> BlockMask:
    # A validation pass in inference mode may come first, and its tensors could not be kept for a backward later.
    with torch.inference_mode(False):
        layout = over.layout if isinstance(over, WindowExchangePlan) else over
        mask = _mask("block", over, spec, torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device), device)
    assert isinstance(mask, BlockMask)
    return mask
