"""Which of our kernels a model computes with, by `[kernels]` of the configuration."""

from collections.abc import Collection

import torch
from torch import nn

from swamla_titan.config import Config
from swamla_titan.config.loss import wants_fused_loss
from swamla_titan.kernels.attention.causal import cudnn_takes
from swamla_titan.kernels.attention.latent import latent_attention
from swamla_titan.kernels.attention.rotary_window import rotary_window_attention
from swamla_titan.kernels.device import has_triton, is_tuned_for
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.context import attention_path
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.swa import SlidingWindowAttention

_ALIGNED = 8  # numbers of 16 bits: cuDNN reads values where they lie, behind the heads' parts of the keys


def choose_kernels(model: SWAMLAModel, config: Config, device: torch.device) -> None:
    """Set them in place, before the model is split or compiled; train/kernels.py refuses what a machine cannot run.

    `device` is where it will run. "auto" takes the loss on any GPU, for its memory; the others where they were timed
    and found faster than what torch.compile makes, on H100 and H200.
    """
    model.attention_backend = config.kernels.attention
    model.linear_loss = linear_cross_entropy if is_loss_fused(config, device) else None
    if are_pointwise_ours(config, device):
        use_pointwise_kernels(
            model, {kind for kind in ("swa", "mla") if why_rotation_is_plain(kind, config, device) is None}
        )


def is_loss_fused(config: Config, device: torch.device) -> bool:
    """Whether head and loss are one operation on this device."""
    return wants_fused_loss(config) and (config.kernels.loss == "fused" or is_gpu_with_triton(device))


def are_pointwise_ours(config: Config, device: torch.device) -> bool:
    """Whether kernels of ours compute what lies between the products, as far as they can; "auto": on H100 and H200."""
    if config.kernels.pointwise != "auto":
        return config.kernels.pointwise == "triton"
    dtype = getattr(torch, config.training.compute_dtype)
    return is_gpu_with_triton(device) and is_tuned_for(device, dtype)


def is_gpu_with_triton(device: torch.device) -> bool:
    """Whether our kernels run there at all."""
    return device.type == "cuda" and has_triton()


def use_pointwise_kernels(model: SWAMLAModel, kinds: Collection[str] = ("swa", "mla")) -> None:
    """SwiGLU by our kernels, and in blocks of `kinds` what lies between the products of attention in one operator.

    Not in SWA blocks with norms of queries and keys, which come before the rotation.
    """
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.activate = triton_swiglu
        elif isinstance(module, SlidingWindowAttention) and "swa" in kinds:
            if isinstance(module.q_norm, nn.Identity):
                module.rotate_and_attend = rotary_window_attention
        elif isinstance(module, LatentAttention) and "mla" in kinds:
            module.rotate_and_attend = latent_attention


def why_rotation_is_plain(kind: str, config: Config, device: torch.device) -> str | None:
    """What keeps rotation and attention apart in blocks of "swa" or "mla", or None.

    In SWA blocks it stays apart also where kernels/attention/window.py does not compute the attention.
    """
    model, checkpointing = config.model, config.activation_checkpoint
    operators = checkpointing.mode == "selective" and checkpointing.selective == "operators"
    if operators and checkpointing.modules != "feed_forward":
        return "activation_checkpoint"  # which would keep rotated queries and keys beside those of the projection
    if kind == "swa":
        return "model.qk_norm" if model.qk_norm else None  # which lies between projection and rotation
    if config.kernels.attention in ("sdpa", "reference"):
        return f"attention by {config.kernels.attention}"
    if config.parallel.context > 1:
        return "parallel.context"
    widths = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    if model.qk_nope_head_dim % _ALIGNED:
        return f"model.qk_nope_head_dim is no multiple of {_ALIGNED}"
    length, dtype = config.training.seq_len, getattr(torch, config.training.compute_dtype)
    if config.data.document_mask:
        ours = attention_path("mla", model, config.kernels.attention, device, dtype) == "triton"
        return None if ours else "data.document_mask"
    return None if cudnn_takes(device, dtype, length, length, *widths) else "not by cuDNN"
