"""Which of our kernels a model computes with, by `[kernels]` of the configuration."""

from collections.abc import Mapping

import torch
from torch import Tensor

from swamla_titan.config import Config
from swamla_titan.config.loss import wants_fused_loss
from swamla_titan.kernels.attention.dispatch import Choice, FusedImplementation, Implementation, choose
from swamla_titan.kernels.device import has_triton, is_tuned_for
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block, attention_kinds
from swamla_titan.model.branch import Attention
from swamla_titan.model.feed_forward import SwiGLU
from swamla_titan.model.inner_attention import FusedAttention
from swamla_titan.model.loss_head import FusedLossHead
from swamla_titan.model.sequences import attention_request
from swamla_titan.parallel.activation_checkpoint import keeps_operators


def choose_kernels(model: SWAMLAModel, config: Config, device: torch.device) -> None:
    """Set them in place, before the model is split or compiled; train/kernels.py refuses what a machine cannot run.

    `device` is where it will run. "auto" takes the loss on any GPU, for its memory; the others where they were timed
    and found faster than what torch.compile makes, on H100 and H200.
    """
    model.attention_backend = config.kernels.attention
    if is_loss_fused(config, device):
        model.loss_head = FusedLossHead(model.config)
    if are_pointwise_ours(config, device):
        choices = attention_choices(config, device)
        use_pointwise_kernels(model, {kind: choice.fused for kind, choice in choices.items() if choice.fused})


def attention_choices(config: Config, device: torch.device) -> dict[str, Choice]:
    """What computes attention in a run on `device`, for each kind of block, and why not each other implementation."""
    length, degree, checkpointing = config.training.seq_len, config.parallel.context, config.activation_checkpoint
    keeps = keeps_operators(checkpointing) and checkpointing.modules != "feed_forward"

    def of_kind(attention: type[Attention]) -> Choice:
        projections = attention.projections(config.model)
        if projections and keeps:  # which would keep rotated queries and keys beside those of the linear layer
            projections = projections._replace(why_apart="activation_checkpoint")
        request = attention_request(
            attention,
            config.model,
            length,
            config.data.document_mask,
            device,
            getattr(torch, config.training.compute_dtype),
            chunk=length // (2 * degree) if degree > 1 else None,
            projections=projections,
        )
        return choose(request, config.kernels.attention)

    return {kind: of_kind(attention) for kind, attention in attention_kinds(config.model).items()}


def attention_summary(choices: Mapping[str, Choice]) -> str:
    """What computes the attention of each kind of block, in words."""

    def by(implementation: Implementation) -> str:
        return f"{implementation.label}, selective" if implementation.selects else implementation.label

    return ", ".join(f"{kind.upper()} by {by(choice.implementation)}" for kind, choice in choices.items())


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


def use_pointwise_kernels(model: SWAMLAModel, fused: Mapping[str, FusedImplementation]) -> None:
    """SwiGLU by our kernels, and what lies between the linear layers of attention in one operator.

    The latter by kind of block, where its projections are as the implementation takes them.
    """
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.feed_forward.activation = TritonSwiGLU(block.feed_forward.group)
        mixer, taken = block.attention, fused.get(block.kind)
        if taken and isinstance(mixer, Attention) and taken.takes(mixer.projections(model.config)):
            mixer.fused_attention = FusedAttention(taken)


class TritonSwiGLU(SwiGLU):
    """SwiGLU by our kernel (kernels/swiglu.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """As in SwiGLU."""
        return triton_swiglu(x, self.group)
