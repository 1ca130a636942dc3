"""What computes attention, and what lies between the linear layers, in a run."""

from collections.abc import Mapping

import torch

from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import IMPLEMENTATIONS, Choice
from swamla_titan.kernels.device import Limit
from swamla_titan.parallel.kernels import are_pointwise_ours, attention_choices, is_gpu_with_triton
from swamla_titan.parallel.parallelize import float8_coverage


def validate_attention(config: Config, world: World) -> None:
    """Raise UserError if this machine lacks kernels.attention; GPUs of another one are not asked.

    What does not depend on the machine is refused with the configuration.
    """
    asked = config.kernels.attention
    if world.is_elsewhere or asked not in ("triton", "flex"):
        return
    choices = attention_choices(config, world.device)
    if all(each.implementation.label != asked for each in choices.values()):
        why = _why_not(asked, choices)
        raise UserError(f'kernels.attention = "{asked}" {why}; with "auto" what fits is taken')


def validate_pointwise(config: Config, world: World) -> None:
    """Raise UserError if this machine lacks kernels.pointwise; GPUs of another one are not asked."""
    if world.is_elsewhere or not are_pointwise_ours(config, world.device):
        return
    if not is_gpu_with_triton(world.device):
        raise UserError('kernels.pointwise = "triton" needs a GPU, and the package triton; "auto" takes what fits')


def pointwise_of(config: Config, choices: Mapping[str, Choice], device: torch.device) -> str | None:
    """What our kernels compute between the linear layers, in words; None: nothing. `choices`: of attention."""
    if not are_pointwise_ours(config, device):
        return None
    float8 = {each.kind for each in float8_coverage(config) if each.why_not is None}
    native = config.float8.recipe == "native" and {"feed_forward.gate_up", "feed_forward.down"} <= float8
    swiglu = "SwiGLU with its cast to float8" if native else "SwiGLU by triton"
    words: list[str] = []
    for kind, choice in choices.items():
        why = choice.why_not_fused
        words.append(f"{kind.upper()} by {f'torch ({why})' if why else 'triton'}")
    return f"{swiglu}, rotation of {' and '.join(words)}" if words else swiglu


def _why_not(asked: str, choices: dict[str, Choice]) -> str:
    if not choices:
        return "has no block with attention to compute"
    names = [each.name for each in IMPLEMENTATIONS if each.label == asked]
    reasons = [choice.why_not[name] for choice in choices.values() for name in names if name in choice.why_not]
    # A kernel's limit tells more than that an implementation is for other masks.
    return next((why for why in reasons if isinstance(why, Limit)), reasons[0])
