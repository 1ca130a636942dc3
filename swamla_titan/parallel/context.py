"""Context parallelism: several ranks share each sequence, which may be longer than one GPU has memory for.

All ranks of a context group are given the same full sequences, and each computes its own chunks of them
(sequence_layout.py). Blocks work on single tokens but for attention, where
- MLA gathers what decoding would keep, the latent and the rotary key of each token, and not keys and values: with the
  default sizes 320 values a token instead of 5120 for 16 heads. Each rank expands them for the full sequence.
- SWA exchanges the windows' halos and the sinks (sequence_exchange.py), however long the sequence is.
Gradients of parameters are then sums over the rank's own tokens; whoever averages gradients adds them up over the
group.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import choose
from swamla_titan.kernels.attention.masks import (
    Chunks,
    KeyIntervals,
    Mask,
    block_mask_of,
    dense_mask_of,
    document_starts,
    intervals_in_sequence,
)
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import Block, attention_kinds
from swamla_titan.model.branch import Attention
from swamla_titan.model.context import AttentionContext, SequenceContext, rotation_at
from swamla_titan.model.inner_attention import InnerAttention
from swamla_titan.model.sequences import FullSequences, attention_request
from swamla_titan.parallel.sequence_exchange import all_gather_sequence, exchange_windows, local_chunks, sink_sources
from swamla_titan.parallel.sequence_layout import SequenceLayout, SwaExchange, plan_swa_exchange


@dataclass(frozen=True)
class WindowSlice(AttentionContext):
    """For this rank's tokens under a window; `mask` is over the sections that `exchange_windows` lays out."""

    group: str  # the context group's name, which is how operators in a graph know it
    exchange: SwaExchange
    sink_index: Tensor  # [B or 1, 2 * ranks * sinks]
    sink_owned: Tensor


@dataclass(frozen=True)
class CausalSlice(AttentionContext):
    """For this rank's tokens without a window; `mask` is over the keys of full sequences."""

    group: str
    layout: SequenceLayout


def apply_context_parallel(model: SWAMLAModel, group: dist.ProcessGroup | DeviceMesh) -> None:
    """Make `model` compute this rank's slice of each sequence, in place; `group` is the context group or its mesh.

    Called before blocks are compiled and parameters sharded. The model (or a pipeline stage of one) then takes full
    sequences, whose length must be divisible by twice the group's size (config/parallel_rules.py). Decoding (`prefill`,
    `decode`) is not shared; it continues as on one process. A group of one changes nothing.

    Raises UserError for a kind of block that cannot share sequences.
    """
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    model.sequences = SharedSequences(size, rank, group.group_name)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        mixer = block.attention
        if not isinstance(mixer, Attention) or mixer.projections not in _INNER:
            raise UserError(f"parallel.context = {size}: {block.kind} blocks cannot share sequences; use 1")
        mixer.inner_attention = _INNER[mixer.projections]()


class WindowExchange(InnerAttention):
    """Attention of this rank's queries, keys and values, [B, 2 * chunk, ...], and the keys that windows add to them."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
        """As in InnerAttention."""
        assert isinstance(context, WindowSlice)
        sinks = context.sink_index, context.sink_owned
        key, value = exchange_windows(key, value, context.exchange, *sinks, context.group)
        return context.attend(query, key, value, scale)


class LatentGather(InnerAttention):
    """Attention of this rank's queries to keys and values of full sequences, made from gathered latents."""

    def gather(self, latent: Tensor, rope_key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """As in InnerAttention, from latents [B, 2 * chunk, R] and rotated keys [B, 2 * chunk, 1, rope]."""
        assert isinstance(context, CausalSlice)
        width = latent.shape[-1]
        gathered = all_gather_sequence(torch.cat([latent, rope_key.squeeze(2)], dim=-1), context.layout, context.group)
        return gathered[..., :width], gathered[..., width:].unsqueeze(2)


_INNER = {"qkv": WindowExchange, "latent": LatentGather}  # by what the linear layers before attention give


def swa_intervals(starts: Tensor, exchange: SwaExchange) -> KeyIntervals:
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
    queries = local_chunks(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    full = intervals_in_sequence(local_chunks(starts, layout), queries, exchange.window, exchange.sink)
    first, last = full.first + move, full.last + move
    if full.sink_first is None:
        return KeyIntervals(first, last)
    sink_first = torch.maximum(full.sink_first + move, for_each_chunk(base))
    return KeyIntervals(first, last, sink_first, torch.minimum(sink_first + exchange.sink - 1, last))


def mla_intervals(starts: Tensor, layout: SequenceLayout) -> KeyIntervals:
    """What this rank's queries see of the full sequence, for document starts [B, T]."""
    queries = local_chunks(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    return intervals_in_sequence(local_chunks(starts, layout), queries, None, 0)


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
        asked: str = "auto",
    ) -> SequenceContext:
        """As in FullSequences, of this rank's tokens."""
        layout = SequenceLayout(seq_len, self.size, self.rank)
        starts = None if document_ids is None else document_starts(document_ids)
        all_starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device) if starts is None else starts
        positions = local_chunks(torch.arange(seq_len, device=device) - all_starts, layout)

        def of_kind(attention: type[Attention]) -> AttentionContext:
            shape = config, seq_len, starts is not None
            request = attention_request(attention, *shape, device, dtype, chunk=layout.chunk)
            taken = choose(request, asked).implementation
            rotation = rotation_at(positions, attention.rotary(config), config, dtype)
            if request.mask.window is None:
                mask = _mask(taken.form, layout, starts, device)
                return CausalSlice(positions, rotation, mask, taken, self.group, layout)
            exchange = plan_swa_exchange(layout, request.mask.window, request.mask.sink)
            mask = _mask(taken.form, exchange, starts, device)
            sinks = sink_sources(all_starts, exchange)
            return WindowSlice(positions, rotation, mask, taken, self.group, exchange, *sinks)

        return SequenceContext({kind: of_kind(attention) for kind, attention in attention_kinds(config).items()})


def _mask(form: str, over: SwaExchange | SequenceLayout, starts: Tensor | None, device: torch.device) -> Mask:
    """The mask over the sections of an exchange, or full sequences; `starts` None: one document a sequence."""
    if form == "block" and starts is None:
        return _block_mask_of_one_document(over, device)
    layout = over.layout if isinstance(over, SwaExchange) else over
    if form == "chunks":
        return Chunks(tuple(layout.starts))
    if starts is None:
        starts = torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device)
    assert form in ("block", "boolean")
    make = block_mask_of if form == "block" else dense_mask_of
    if isinstance(over, SwaExchange):
        return make(swa_intervals(starts, over), 2 * over.section)
    return make(mla_intervals(starts, over), layout.seq_len)


@lru_cache(maxsize=32)
def _block_mask_of_one_document(over: SwaExchange | SequenceLayout, device: torch.device) -> BlockMask:
    # A validation pass in inference mode may come first, and its tensors could not be kept for a backward later.
    with torch.inference_mode(False):
        layout = over.layout if isinstance(over, SwaExchange) else over
        mask = _mask("block", over, torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device), device)
    assert isinstance(mask, BlockMask)
    return mask
