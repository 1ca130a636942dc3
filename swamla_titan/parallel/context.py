"""Context parallelism: several ranks share each row, so that rows may be longer than one GPU has memory for.

All ranks of a context group are given the same whole rows, and each computes its own chunks of them
(sequence_layout.py). Blocks work on single tokens but for attention, where
- MLA gathers what decoding would keep, the latent and the rotary key of each token, and not keys and values: with the
  default sizes 320 numbers a token instead of 5120 for 16 heads. Each rank expands them for the whole row.
- SWA exchanges the windows' halos and the sinks (sequence_exchange.py), however long the row is.
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

from swamla_titan.kernels.attention.causal import cudnn_takes
from swamla_titan.kernels.attention.chunked import chunked_causal_attention
from swamla_titan.kernels.attention.dispatch import attention
from swamla_titan.kernels.attention.masks import (
    KeyIntervals,
    block_mask_of,
    dense_mask_of,
    document_starts,
    intervals_in_the_row,
)
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.context import SequenceContext, attention_path, rotations
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.swa import SlidingWindowAttention
from swamla_titan.parallel.sequence_exchange import exchange_windows, gather_rows, own_columns, sink_sources
from swamla_titan.parallel.sequence_layout import SequenceLayout, SwaExchange, plan_swa_exchange


@dataclass(frozen=True)
class SharedContext(SequenceContext):
    """The context of this rank's part of each row.

    Positions and rotations are those of the rank's own tokens. `swa_mask` is over the sections that `exchange_windows`
    lays out, `mla_mask` over the keys of the whole row; with `mla_kernel` that is None, and the kernel of
    kernels/attention/causal.py of that name needs no mask.
    """

    layout: SequenceLayout
    group: str  # the context group's name, which is how operators in a graph know it
    mla_kernel: str | None
    swa_exchange: SwaExchange
    sink_index: Tensor  # [B or 1, 2 * ranks * sinks]
    sink_owned: Tensor


def apply_context_parallel(model: SWAMLAModel, group: dist.ProcessGroup | DeviceMesh) -> None:
    """Make `model` compute this rank's part of each row, in place; `group` is the context group or its mesh.

    Called before blocks are compiled and parameters sharded. The model (or a pipeline stage of one) then takes whole
    rows, whose length must be divisible by twice the group's size (config/parallel_rules.py). Decoding (`prefill`,
    `decode`) is not shared; it goes on as on one process. A group of one changes nothing.
    """
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    model.local_tokens = _LocalTokens(size, rank)
    model.build_context = _ContextBuilder(size, rank, group.group_name)
    for block in model.blocks.values():
        kind = block.attention
        if isinstance(kind, SlidingWindowAttention):
            kind.attend = attend_shared_window
        else:
            assert isinstance(kind, LatentAttention)
            kind.gather = gather_latents
            kind.attend = attend_chunks


def attend_shared_window(query: Tensor, key: Tensor, value: Tensor, context: SequenceContext, scale: float) -> Tensor:
    """`attend_window` with queries, keys and values of this rank's tokens, [B, 2 * chunk, ...]."""
    assert isinstance(context, SharedContext)
    key, value = exchange_windows(
        key, value, context.swa_exchange, context.sink_index, context.sink_owned, context.group
    )
    return attention(query, key, value, context.swa_mask, scale, reference=context.reference)


def gather_latents(latent: Tensor, rope_key: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
    """`whole_rows` from this rank's latents [B, 2 * chunk, R] and rotated keys [B, 2 * chunk, 1, rope]."""
    assert isinstance(context, SharedContext)
    width = latent.shape[-1]
    rows = gather_rows(torch.cat([latent, rope_key.squeeze(2)], dim=-1), context.layout, context.group)
    return rows[..., :width], rows[..., width:].unsqueeze(2)


def attend_chunks(query: Tensor, key: Tensor, value: Tensor, context: SequenceContext, scale: float) -> Tensor:
    """`attend_causally` with this rank's queries [B, 2 * chunk, H, D] and keys and values of whole rows [B, T, ...]."""
    assert isinstance(context, SharedContext)
    if context.mla_kernel is not None:
        return chunked_causal_attention(query, key, value, context.layout.starts, scale, context.mla_kernel)
    return attention(query, key, value, context.mla_mask, scale, reference=context.reference)


def swa_intervals(starts: Tensor, exchange: SwaExchange) -> KeyIntervals:
    """What this rank's queries see of the sections that `exchange_windows` lays out, for document starts [B, T].

    Within a section tokens are neighbours as they are in the row, so the intervals are those of the row, moved; but for
    sinks that begin before what stands next to the halo: those are the section's first places (`sink_sources`).
    """
    layout = exchange.layout

    def for_each_chunk(values: list[int]) -> Tensor:
        return torch.cat([torch.full((layout.chunk,), value, device=starts.device) for value in values])  # [2 chunk]

    base = [j * exchange.section for j in range(2)]
    # From an index in the row to the one in the sections.
    move = for_each_chunk([b + exchange.sinks + exchange.halo - start for b, start in zip(base, layout.starts)])
    queries = own_columns(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    row = intervals_in_the_row(own_columns(starts, layout), queries, exchange.window, exchange.sink)
    first, last = row.first + move, row.last + move
    if row.sink_first is None:
        return KeyIntervals(first, last)
    sink_first = torch.maximum(row.sink_first + move, for_each_chunk(base))
    return KeyIntervals(first, last, sink_first, torch.minimum(sink_first + exchange.sink - 1, last))


def mla_intervals(starts: Tensor, layout: SequenceLayout) -> KeyIntervals:
    """What this rank's queries see of the whole row, for document starts [B, T]."""
    queries = own_columns(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    return intervals_in_the_row(own_columns(starts, layout), queries, None, 0)


@dataclass(frozen=True)
class _LocalTokens:
    """SWAMLAModel.local_tokens: [B, T] -> this rank's [B, T / size]."""

    size: int
    rank: int

    def __call__(self, rows: Tensor) -> Tensor:
        return own_columns(rows, SequenceLayout(rows.shape[1], self.size, self.rank))


@dataclass(frozen=True)
class _ContextBuilder:
    """SWAMLAModel.build_context: a SharedContext from what SequenceContext.build takes."""

    size: int
    rank: int
    group: str

    def __call__(
        self,
        config: ModelConfig,
        seq_len: int,
        document_ids: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "auto",
    ) -> SharedContext:
        def flex(kind: str) -> bool:
            return attention_path(kind, config, backend, device, dtype, whole_rows=False) == "flex"

        layout = SequenceLayout(seq_len, self.size, self.rank)
        exchange = plan_swa_exchange(layout, config.swa_window, config.swa_sink_size)
        starts = None if document_ids is None else document_starts(document_ids)
        rows = torch.zeros(1, seq_len, dtype=torch.int64, device=device) if starts is None else starts
        sink_index, sink_owned = sink_sources(rows, exchange)
        positions = own_columns(torch.arange(seq_len, device=device) - rows, layout)
        swa_rotation, mla_rotation = rotations(config, positions, dtype)

        kinds = set(config.block_kinds)
        swa_mask = mla_mask = mla_kernel = None
        if "swa" in kinds:
            swa_mask = _mask(exchange, starts, device, flex("swa"))
        if "mla" in kinds:
            widths = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
            if backend not in ("sdpa", "reference") and starts is None:
                mla_kernel = kernel_without_mask(device, dtype, layout, *widths)
            if mla_kernel is None:
                mla_mask = _mask(layout, starts, device, flex("mla"))
        return SharedContext(
            positions=positions,
            swa_rotation=swa_rotation,
            mla_rotation=mla_rotation,
            swa_mask=swa_mask,
            mla_mask=mla_mask,
            reference=backend == "reference",
            layout=layout,
            group=self.group,
            mla_kernel=mla_kernel,
            swa_exchange=exchange,
            sink_index=sink_index,
            sink_owned=sink_owned,
        )


def kernel_without_mask(
    device: torch.device, dtype: torch.dtype, layout: SequenceLayout, qk_width: int, v_width: int
) -> str | None:
    """The kernel (kernels/attention/causal.py) for MLA over rows of one document; None: attention under a mask."""
    return "cudnn" if cudnn_takes(device, dtype, layout.seq_len, layout.chunk, qk_width, v_width) else None


def _mask(
    over: SwaExchange | SequenceLayout, starts: Tensor | None, device: torch.device, flex: bool
) -> Tensor | BlockMask:
    """The mask over the sections of an exchange (SWA) or whole rows (MLA); `starts` None: one document a row."""
    if flex and starts is None:
        return _block_mask_of_one_document(over, device)
    layout = over.layout if isinstance(over, SwaExchange) else over
    if starts is None:
        starts = torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device)
    make = block_mask_of if flex else dense_mask_of
    if isinstance(over, SwaExchange):
        return make(swa_intervals(starts, over), 2 * over.section)
    return make(mla_intervals(starts, over), layout.seq_len)


@lru_cache(maxsize=32)
def _block_mask_of_one_document(over: SwaExchange | SequenceLayout, device: torch.device) -> BlockMask:
    # A validation pass in inference mode may come first, and its tensors could not be kept for a backward later.
    with torch.inference_mode(False):
        layout = over.layout if isinstance(over, SwaExchange) else over
        mask = _mask(over, torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device), device, True)
    assert isinstance(mask, BlockMask)
    return mask
