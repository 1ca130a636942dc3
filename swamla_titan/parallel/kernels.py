"""Which of our kernels a model computes with, by `[kernels]` of the configuration."""

from collections.abc import Mapping

import torch
from torch import Tensor

from swamla_titan.config import Config
from swamla_titan.config.rules import wants_fused_loss
from swamla_titan.config.schedule import configs_of_stages
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import HOPPER, IMPLEMENTATIONS, Choice, Implementation, choose
from swamla_titan.kernels.device import Limit, has_triton, is_tuned_for
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block, SwiGLU, attention_kinds
from swamla_titan.model.branch import Attention, FusedAttention
from swamla_titan.model.loss_head import FusedLossHead
from swamla_titan.parallel.activation_checkpoint import keeps_operators


def choose_kernels(model: SWAMLAModel, config: Config, device: torch.device) -> None:
    """Set the model's kernels in place, before it is split or compiled; `device` is where it will run.

    "auto" takes the fused loss on any GPU, for its memory; the others where they were timed and found faster than what
    torch.compile makes, on H100 and H200. What a machine cannot run is refused earlier, by the validations below.
    """
    model.attention_backend = config.kernels.attention
    if is_loss_fused(config, device):
        model.loss_head = FusedLossHead(model.config)
    if are_elementwise_ours(config, device):
        for block in model.blocks.values():
            assert isinstance(block, Block)
            block.feed_forward.activation = TritonSwiGLU(block.feed_forward.group)
    choose_fused_attention(model, config, device)


def choose_fused_attention(model: SWAMLAModel, config: Config, device: torch.device) -> None:
    """Set what computes rotation and attention as one in the blocks, where sequences of this length allow it."""
    choices = attention_choices(config, device)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        if isinstance(block.attention, Attention):
            fused = choices[block.kind].fused
            block.attention.fused_attention = FusedAttention(fused) if fused else None


def attention_choices(config: Config, device: torch.device) -> dict[str, Choice]:
    """What computes attention in a run on `device`, for each kind of block, and why not each other implementation."""
    length, degree, why_apart = config.training.seq_len, config.parallel.context, _why_apart(config, device)

    def of_kind(attention: type[Attention]) -> Choice:
        projections = attention.projections(config.model)
        if projections and why_apart:
            projections = projections._replace(why_apart=why_apart)
        request = attention.request(
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


def _why_apart(config: Config, device: torch.device) -> str | None:
    """The section or key that keeps the rotation apart from attention in blocks of every kind, or None."""
    if not are_elementwise_ours(config, device):
        return "kernels.elementwise"
    checkpointing = config.activation_checkpoint
    # It would keep rotated queries and keys beside those of the linear layer.
    keeps = keeps_operators(checkpointing) and checkpointing.modules != "feed_forward"
    return "activation_checkpoint" if keeps else None


def attention_summary(choices: Mapping[str, Choice]) -> str:
    """What computes the attention of each kind of block, in words."""

    def by(implementation: Implementation) -> str:
        return f"{implementation.label}, selective" if "selects" in implementation.knows else implementation.label

    return ", ".join(f"{kind.upper()} by {by(choice.implementation)}" for kind, choice in choices.items())


def is_loss_fused(config: Config, device: torch.device) -> bool:
    """Whether head and loss are one operation on this device."""
    return wants_fused_loss(config) and (config.kernels.loss == "fused" or is_gpu_with_triton(device))


def are_elementwise_ours(config: Config, device: torch.device) -> bool:
    """Whether kernels of ours compute what lies between the linear layers, as far as they can.

    By "auto" on H100 and H200.
    """
    if config.kernels.elementwise != "auto":
        return config.kernels.elementwise == "triton"
    dtype = getattr(torch, config.training.compute_dtype)
    return is_gpu_with_triton(device) and is_tuned_for(device, dtype)


def is_gpu_with_triton(device: torch.device) -> bool:
    """Whether our kernels run there at all."""
    return device.type == "cuda" and has_triton()


class TritonSwiGLU(SwiGLU):
    """SwiGLU by our kernel (kernels/swiglu.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """As in SwiGLU."""
        return triton_swiglu(x, self.group)


def validate_attention(config: Config, world: World) -> None:
    """Raise UserError if this machine cannot compute by kernels.attention; GPUs of another one are not checked.

    What no machine could compute by it is refused with the configuration (config/rules.py).
    """
    asked = config.kernels.attention
    if world.is_elsewhere or asked not in ("triton", "flex"):
        return
    for each in configs_of_stages(config):
        _validate_choices(asked, attention_choices(each, world.device))


def _validate_choices(asked: str, choices: dict[str, Choice]) -> None:
    # HOPPER is ours too; it takes nothing if "flex" is asked for.
    if all(each.implementation.label not in (asked, HOPPER.label) for each in choices.values()):
        why = _why_not(asked, choices)
        raise UserError(f'kernels.attention = "{asked}" {why}; with "auto" what fits is taken')


def validate_elementwise(config: Config, world: World) -> None:
    """Raise UserError if this machine cannot run kernels.elementwise; GPUs of another one are not checked."""
    if world.is_elsewhere or not are_elementwise_ours(config, world.device):
        return
    if not is_gpu_with_triton(world.device):
        raise UserError('kernels.elementwise = "triton" needs a GPU, and the package triton; "auto" takes what fits')


def _why_not(asked: str, choices: dict[str, Choice]) -> str:
    if not choices:
        return "has no block with attention to compute"
    names = [each.name for each in IMPLEMENTATIONS if each.label == asked]
    reasons = [choice.why_not[name] for choice in choices.values() for name in names if name in choice.why_not]
    # A kernel's limit tells more than that an implementation is for other masks.
    return next((why for why in reasons if isinstance(why, Limit)), reasons[0])
