"""The optimizers of a run: built from the configuration, and the one call by which they take a step.

Also what a step is given: the gradients' norm and the divisor that clips them, both without a host sync, and the
learning rate.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swamla_titan.config.sections import LRSchedule, Optimizer
from swamla_titan.config.stability import warmup_steps
from swamla_titan.distributed.dtensor import local
from swamla_titan.errors import UserError
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY
from swamla_titan.model.row_table import row_tables
from swamla_titan.optim.groups import column_units, groups
from swamla_titan.optim.rules import RULES, Given, Step


class GroupedOptimizer(torch.optim.Optimizer):
    """Parameter groups with different update rules.

    States exist from the start, as plain tensors or as DTensors sharded as their parameters.
    """

    def __init__(
        self, model: nn.Module, config: Optimizer, ranks: dist.ProcessGroup | None = None, compiled: bool = False
    ) -> None:
        """`ranks`, `compiled`: as in `build_optimizer`."""
        of_kind = groups(model, config)
        of_groups = [
            {"params": parameters, "weight_decay": kind.weight_decay, "kind": kind}
            for kind, parameters in of_kind.items()
        ]
        super().__init__(of_groups, {"lr": config.lr})
        self.tables = row_tables(model)
        units = column_units(model)
        for kind, parameters in of_kind.items():
            for parameter in parameters:
                new_state, table = RULES[kind.rule].new_state, self.tables.get(parameter)
                self.state[parameter] = new_state(parameter, kind, units.get(parameter, 0), table)
        self.rules = {
            name: rule(Given(found, self, config, model, ranks, compiled))
            for name, rule in RULES.items()
            if (found := {kind: parameters for kind, parameters in of_kind.items() if kind.rule == name})
        }

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor | None = None, bad: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter at the learning rate `lr` times its group's multiplier (optimizer.lr_multipliers).

        `divisor`: of all gradients, which clips them; a float32 scalar, None: 1. Rules divide as they read, so that
        nothing reads all gradients once more; torch's kernel writes the quotients back.

        `bad`: a float32 scalar on the weights' device, 0 or 1. If it is 1, weights, moments and step counts stay bit
        for bit, whatever the gradients hold, without a host sync: torch's fused kernels read the flag on the device and
        return (it is the argument that torch's GradScaler uses), ours choose by it between old and new values.
        """
        for group in self.param_groups:
            group["lr"] = lr * group["kind"].lr_multiplier
        for rule in self.rules.values():
            rule(Step(float(lr), divisor, bad))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; those of tables too."""
        super().zero_grad(set_to_none)
        for table in self.tables.values():
            table.gradient.clear()


class Optimizers(list[GroupedOptimizer]):
    """The optimizers of a rank's pipeline stages, which take each step together."""

    def step(self, lr: float, grad_norm: Tensor, max_norm: float, bad: Tensor | None) -> None:
        """Apply all gradients, and drop them.

        `grad_norm`: of all gradients of the full model, a float32 scalar; they are clipped to a norm of at most
        `max_norm`, 0: not at all. `lr`, `bad`: as in GroupedOptimizer.step.
        """
        divisor = clip_divisor(grad_norm, max_norm) if max_norm > 0 else None
        for optimizer in self:
            optimizer.step(lr, divisor, bad)
            optimizer.zero_grad()


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
        RULES[kind.rule].state_bytes(parameter, kind, units.get(parameter, 0))
        for kind, parameters in groups(model, config).items()
        for parameter in parameters
    )


def gradient_norm(
    gradients: Iterable[tuple[Tensor, float]], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The global L2 norm of all gradients, a scalar of their dtype on their device.

    `gradients` are (local shard of a parameter's gradient, share): the shares of an element of the full model must add
    up to 1 over all ranks that hold a copy of it, so that it counts once. `sum_over_ranks` all-reduces a scalar; None:
    a single process.
    """
    shards, shares = zip(*gradients)
    norms = torch.stack(torch._foreach_norm(shards))
    if sum_over_ranks is None:
        return torch.linalg.vector_norm(norms)
    shares_on_device = _on_device(shares, norms.dtype, norms.device)
    return sum_over_ranks((norms.square() * shares_on_device).sum()).sqrt()


@lru_cache(maxsize=8)
def _on_device(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The shares as a tensor, made once for all steps, because a copy from the host may wait for the device."""
    return torch.tensor(shares, dtype=dtype, device=device)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """The divisor, at least 1, that brings gradients of this norm to at most `max_norm`: a scalar like `norm`."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)


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
