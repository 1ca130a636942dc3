"""The trainer's interface to optimizers: built from the configuration; learning rate, clipping, skipped steps."""

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
    """Build the optimizer of the float32 weights of a model or a pipeline stage.

    `group`: the ranks that hold shards of the same weights, which must all take each step; None: this process holds the
    full weights. `compiled`: fuse the update of a parameter into one kernel, unless torch's own is faster. Raises
    UserError if the GPU is too old for the optimizer.
    """
    validate_optimizer_device(config, local(next(model.parameters())).device)
    return GroupedOptimizer(model, config, group, compiled)


def validate_optimizer_device(config: Optimizer, device: torch.device) -> None:
    """Raise UserError if the optimizer needs float8 conversions and the GPU has none."""
    if config.name != "adamw_fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_CAPABILITY:
        raise UserError(
            f'optimizer.name = "adamw_fp8": this GPU (compute capability {capability[0]}.{capability[1]}) does not '
            'convert to float8, which needs 8.9; use "adamw8bit"'
        )


def state_bytes(model: nn.Module, config: Optimizer) -> int:
    """Bytes of the optimizer's state on this rank; the model's parameters may be on the meta device."""
    units = column_units(model)
    return sum(
        bytes_of_state(parameter, kind, units.get(parameter, 0))
        for kind, parameters in groups(model, config).items()
        for parameter in parameters
    )


def lr_factor(schedule: LRSchedule, step: int, steps: int) -> float:
    """The learning rate at a step as a share of its peak; a pure function, so that a checkpoint need not hold it.

    Linear warm-up over `warmup_steps` (the first step has 1/warmup_steps, not 0), then
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
    """Set each group's learning rate: `lr` times its multiplier (optimizer.lr_multipliers)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["kind"].lr_multiplier


def clip_gradients(optimizer: GroupedOptimizer, norm: Tensor, max_norm: float) -> None:
    """Make the optimizer's next step clip its gradients to a norm of at most `max_norm` (0: no clipping).

    `norm`: of all gradients of the model, a float32 scalar. The optimizer's kernels divide as they read (by the
    argument that torch's GradScaler uses), so that nothing reads all gradients once more. torch's kernel writes the
    quotients back.
    """
    optimizer.grad_scale = clip_divisor(norm, max_norm) if max_norm > 0 else None


def skip_where(optimizer: GroupedOptimizer, bad: Tensor | None) -> None:
    """Make the optimizer's next steps change nothing if `bad` is 1: a float32 scalar on the weights' device, 0 or 1.

    Weights, moments and step counts stay bit for bit, whatever the gradients hold, without a host sync: torch's fused
    kernels read the flag on the device and return (it is the argument that torch's GradScaler uses), ours choose by it
    between old and new values. None: no step is skipped.
    """
    optimizer.found_inf = bad
