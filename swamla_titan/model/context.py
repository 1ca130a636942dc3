"""What all blocks of one forward pass share: positions, rotations and masks, made once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import Mask
from swamla_titan.kernels.attention.document import TIMED_WIDTHS, document_kernel_takes
from swamla_titan.kernels.attention.masks import (
    DocumentRule,
    WindowRule,
    block_mask,
    block_mask_of_one_document,
    dense_mask,
    document_ends,
    document_starts,
)
from swamla_titan.kernels.attention.window import window_kernel_takes
from swamla_titan.kernels.device import is_tuned_for
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.rope import Rotation, rotation

# "auto": the fastest that device, dtype and shape allow; "triton": our kernels wherever they run, else as auto;
# "flex": FlexAttention for what is not plainly causal; "sdpa": boolean masks, for any length without compiling anew;
# "reference": boolean masks and explicit scores.
ATTENTION_BACKENDS = ("auto", "triton", "flex", "sdpa", "reference")


@dataclass(frozen=True)
class SequenceContext:
    """Passed to each block beside the activations. Masks are as kernels/attention/dispatch.py takes them."""

    positions: Tensor  # [B or 1, T] int64, tokens since the start of the document
    swa_rotation: Rotation
    mla_rotation: Rotation
    swa_mask: Mask
    mla_mask: Mask
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

        `dtype` is that of the activations, `backend` one of ATTENTION_BACKENDS (else ValueError).
        """
        if document_ids is None:
            starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
        else:
            starts = document_starts(document_ids)

        def mask(kind: str, window: int | None, sink: int) -> Mask:
            path = attention_path(kind, config, backend, device, dtype)
            if is_plainly_causal(kind, config, seq_len, document_ids is not None):
                return None  # which has kernels of its own
            if path == "triton":
                own = starts.to(torch.int32)
                if window is None:
                    return DocumentRule(own, document_ends(own))
                return WindowRule(None if document_ids is None else own, window, sink)
            if path != "flex":
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
            swa_mask=mask("swa", config.swa_window, config.swa_sink_size) if "swa" in kinds else None,
            mla_mask=mask("mla", None, 0) if "mla" in kinds else None,
            reference=backend == "reference",
        )


def is_plainly_causal(kind: str, config: ModelConfig, seq_len: int, documents: bool) -> bool:
    """Whether "swa" or "mla" blocks need no mask for rows of `seq_len` tokens, cut into documents or not.

    A row of one token never does: it sees itself, which is a shape less for the kernels with masks to take.
    """
    return seq_len == 1 or (not documents and (kind == "mla" or config.swa_window >= seq_len))


def attention_path(
    kind: str, config: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype, whole_rows: bool = True
) -> str:
    """What computes the attention of "swa" or "mla" blocks under a mask: "triton", "flex", "sdpa" or "reference".

    Whole rows that are plainly causal go to SDPA's own kernels under all but "reference". `whole_rows`: a process has
    all of a row. ValueError for an unknown backend.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend {backend!r}: expected one of {', '.join(ATTENTION_BACKENDS)}")
    if backend in ("sdpa", "reference"):
        return backend
    widths = config.head_dim, config.head_dim
    if kind == "mla":
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        takes = document_kernel_takes(device, dtype, *widths) and (backend == "triton" or widths == TIMED_WIDTHS)
    else:
        takes = window_kernel_takes(device, dtype, widths[0], config.swa_sink_size)
    if takes and whole_rows and (backend == "triton" or (backend == "auto" and is_tuned_for(device, dtype))):
        return "triton"
    return "flex" if device.type == "cuda" and flex_takes(dtype, *widths) else "sdpa"


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
