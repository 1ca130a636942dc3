"""Which of our kernels a model computes with, by `[kernels]` of the configuration."""

from collections.abc import Collection

import torch
from torch import nn

from swamla_titan.config import Config
from swamla_titan.config.loss import wants_fused_loss
from swamla_titan.kernels.attention.dispatch import Choice, choose
from swamla_titan.kernels.attention.latent import latent_attention
from swamla_titan.kernels.attention.rotary_window import rotary_window_attention
from swamla_titan.kernels.device import has_triton, is_tuned_for
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.sequences import attention_request
from swamla_titan.model.swa import SlidingWindowAttention


def choose_kernels(model: SWAMLAModel, config: Config, device: torch.device) -> None:
    """Set them in place, before the model is split or compiled; train/kernels.py refuses what a machine cannot run.

    `device` is where it will run. "auto" takes the loss on any GPU, for its memory; the others where they were timed
    and found faster than what torch.compile makes, on H100 and H200.
    """
    model.attention_backend = config.kernels.attention
    model.linear_loss = linear_cross_entropy if is_loss_fused(config, device) else None
    if are_pointwise_ours(config, device):
        choices = attention_choices(config, device)
        use_pointwise_kernels(model, {kind for kind, choice in choices.items() if choice.fused})


def attention_choices(config: Config, device: torch.device) -> dict[str, Choice]:
    """What computes attention in a run on `device`, for each kind of block, and why not each other implementation."""
    length, degree, checkpointing = config.training.seq_len, config.parallel.context, config.activation_checkpoint
    keeps_operators = checkpointing.mode == "selective" and checkpointing.selective == "operators"

    def of_kind(kind: str) -> Choice:
        request = attention_request(
            kind,
            config.model,
            length,
            config.data.document_mask,
            device,
            getattr(torch, config.training.compute_dtype),
            chunk=length // (2 * degree) if degree > 1 else None,
            projections=BLOCKS[kind].projections,
            keeps_operators=keeps_operators and checkpointing.modules != "feed_forward",
        )
        return choose(request, config.kernels.attention)

    return {kind: of_kind(kind) for kind in BLOCKS if kind in config.model.block_kinds}


def is_loss_fused(config: Config, device: torch.device) -> bool:
    """Whether head and loss are one operation on this device."""
    return wants_fused_loss(config) and (config.kernels.loss == "fused" or is_gpu_with_triton(device))


def are_pointwise_ours(config: Config, device: torch.device) -> bool:
    """Whether kernels of ours compute what lies between the linear layers, as far as they can.

    By "auto" on H100 and H200.
    """
    if config.kernels.pointwise != "auto":
        return config.kernels.pointwise == "triton"
    dtype = getattr(torch, config.training.compute_dtype)
    return is_gpu_with_triton(device) and is_tuned_for(device, dtype)


def is_gpu_with_triton(device: torch.device) -> bool:
    """Whether our kernels run there at all."""
    return device.type == "cuda" and has_triton()


def use_pointwise_kernels(model: SWAMLAModel, kinds: Collection[str] = ("swa", "mla")) -> None:
    """SwiGLU by our kernels, and in blocks of `kinds` what lies between the linear layers of attention in one operator.

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
