"""What all blocks of one forward pass share: positions, rotations and masks, made once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from swamla_titan.kernels.masks import block_mask, block_mask_of_one_document, dense_mask, document_starts
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.rope import Rotation, rotation

ATTENTION_BACKENDS = ("auto", "masked", "reference")


@dataclass(frozen=True)
class SequenceContext:
    """Passed to each block beside the activations. Masks are as kernels/attention.py takes them."""

    positions: Tensor  # [B or 1, T] int64, tokens since the start of the document
    swa_rotation: Rotation
    mla_rotation: Rotation
    swa_mask: Tensor | BlockMask | None
    mla_mask: Tensor | BlockMask | None
    reference: bool  # attention by the plain reference

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        seq_len: int,
        document_ids: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "auto",
    ) -> "SequenceContext":
        """The context of rows of `seq_len` tokens; `document_ids` [B, T] cut them into documents, None: one each.

        `dtype` is that of the activations. `backend`: "auto" takes the fastest form that the device has, "masked"
        boolean masks and SDPA (any length without compiling anew), "reference" boolean masks and explicit scores.
        """
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention_backend {backend!r}: expected one of {', '.join(ATTENTION_BACKENDS)}")
        fast = backend == "auto" and device.type == "cuda"
        if document_ids is None:
            starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
        else:
            starts = document_starts(document_ids)

        def mask(window: int | None, sink: int) -> Tensor | BlockMask | None:
            if document_ids is None and (window is None or window >= seq_len):
                return None  # plain causal, which has kernels of its own
            if window is None:
                widths = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
            else:
                widths = config.head_dim, config.head_dim
            if not fast or not flex_takes(dtype, *widths):
                return dense_mask(starts, window, sink)
            if document_ids is None:
                return block_mask_of_one_document(seq_len, window, sink, device)
            return block_mask(starts, window, sink)

        kinds = set(config.block_kinds)
        positions = torch.arange(seq_len, device=device) - starts
        swa_rotation, mla_rotation = rotations(config, positions, dtype)
        return cls(
            positions=positions,
            swa_rotation=swa_rotation,
            mla_rotation=mla_rotation,
            swa_mask=mask(config.swa_window, config.swa_sink_size) if "swa" in kinds else None,
            mla_mask=mask(None, 0) if "mla" in kinds else None,
            reference=backend == "reference",
        )


def flex_takes(dtype: torch.dtype, qk_width: int, v_width: int) -> bool:
    """Whether FlexAttention's CUDA kernels take heads of these widths in this dtype.

    They have no float64 and no heads narrower than 16, and in float32 heads wider than 128 (MLA's of 192) want more
    shared memory than a GPU has.
    """
    if min(qk_width, v_width) < 16:
        return False
    return dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and max(qk_width, v_width) <= 128)


def rotations(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Rotation, Rotation]:
    """The rotations of SWA heads and of MLA's rotary part at `positions` [B or 1, T], in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    swa_theta = config.swa_rope_theta or config.rope_theta
    mla_theta = config.mla_rope_theta or config.rope_theta
    return (
        rotation(positions, config.head_dim, swa_theta, config.rope_scaling, wide),
        rotation(positions, config.qk_rope_head_dim, mla_theta, config.rope_scaling, wide),
    )
