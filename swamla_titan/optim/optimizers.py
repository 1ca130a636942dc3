"""Optimizers as the trainer uses them: built from the configuration, with learning rate, clipping and skipped steps."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swamla_titan.config.sections import LRSchedule, Optimizer
from swamla_titan.config.stability import warmup_steps
from swamla_titan.distributed.dtensor import local
from swamla_titan.errors import UserError
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY
from swamla_titan.optim.gradients import clip_divisor
from swamla_titan.optim.grouped import GroupedOptimizer
from swamla_titan.optim.groups import groups
from swamla_titan.optim.matrices import column_units
from swamla_titan.optim.moments import bytes_of_state


def build_optimizer(
    model: nn.Module, config: Optimizer, group: dist.ProcessGroup | None = None, compiled: bool = False
) -> GroupedOptimizer:
    """The optimizer of a model's float32 weights, or of those of a pipeline stage.

    `group`: the ranks that hold parts of the same weights, which must all take each step; None: this process has them
    whole. `compiled`: fuse what is done to a parameter into one kernel, unless torch's own does it faster. Raises
    UserError where the GPU is too old for the optimizer.
    """
    validate_optimizer_device(config, local(next(model.parameters())).device)
    return GroupedOptimizer(model, config, group, compiled)


def validate_optimizer_device(config: Optimizer, device: torch.device) -> None:
    """Raise UserError where the GPU lacks what the optimizer needs."""
    if config.name != "adamw_fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_CAPABILITY:
        raise UserError(
            f'optimizer.name = "adamw_fp8": this GPU (compute capability {capability[0]}.{capability[1]}) does not '
            'convert to float8, which needs 8.9; use "adamw8bit"'
        )


def state_bytes(model: nn.Module, config: Optimizer) -> int:
    """Bytes of an optimizer's state on this rank; the model's parameters may be on the meta device."""
    units = column_units(model)
    return sum(
        bytes_of_state(parameter, kind, units.get(parameter, 0))
        for kind, parameters in groups(model, config).items()
        for parameter in parameters
    )


def lr_factor(schedule: LRSchedule, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step; a pure function, so that a checkpoint need not hold it.

    Linear warm-up over `warmup_steps` (the first step already moves: it has 1/warmup_steps), then
    cosine: half a cosine from 1 to `min_lr_ratio` at the last step;
    linear: a straight line likewise;
    wsd: 1 until the last `decay_steps`, then a straight line to `min_lr_ratio`
    (warmup-stable-decay, arXiv 2404.06395).

    `step` counts from 0; `steps` is the length of the run.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "wsd":
        decay = schedule.decay_steps or max(1, steps // 10)
        start = max(steps - decay, warmup)
    else:
        start = warmup
    # The step before `start` still has the full peak, the last one has min_lr_ratio.
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, steps - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape


def set_learning_rate(optimizer: GroupedOptimizer, lr: float) -> None:
    """The learning rate, times each group's own factor (optimizer.lr_multipliers)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["kind"].lr_multiplier


def clip_gradients(optimizer: GroupedOptimizer, norm: Tensor, max_norm: float) -> None:
    """Make the optimizer's next step divide its gradients so that they have a norm of at most `max_norm` (0: of any).

    `norm`: of all gradients of the model, a float32 scalar. Kernels divide as they read (as torch's GradScaler has them
    do): a pass over all gradients less than to scale them before. torch's kernel leaves the quotients in their place.
    """
    optimizer.grad_scale = clip_divisor(norm, max_norm) if max_norm > 0 else None


def skip_where(optimizer: GroupedOptimizer, bad: Tensor | None) -> None:
    """Make the optimizer's next steps change nothing where `bad` is 1: float32 scalar on the weights' device, 0 or 1.

    Weights, moments, step counts and weight decay all stay, bit for bit, whatever the gradients hold, and the host
    learns nothing of it: fused kernels read the flag on the device and return (it is the one that torch's GradScaler
    gives them), the others choose by it between the old and the new. None: every step counts.
    """
    optimizer.found_inf = bad
