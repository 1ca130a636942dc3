"""Dynamic loss scaling (Micikevicius et al., arXiv:1710.03740), with float8.loss_scaling.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards. A
step whose gradient norm is then not finite halves the scale, and is skipped as bad; 2,000 consecutive finite steps
double it (the constants of torch.amp.GradScaler). The scale is on the device, and the host never waits for it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from swamla_titan.checkpoint.state import StateGroup
from swamla_titan.parallel.model_parts import LossScaling
from swamla_titan.train.policy import Policy, StepOutcome, Values

_FIRST = 2.0**16
_INTERVAL = 2000  # finite steps before the scale is doubled
_LEAST, _MOST = 2.0**-60, 2.0**60


class LossScale(LossScaling, StateGroup, Policy):
    """The scale, a power of two, which follows from the norm of the global gradient: all ranks have the same."""

    group = "loss_scale"

    def __init__(self, device: torch.device) -> None:
        """`device`: where the gradient norm is."""
        self.value = torch.full((), _FIRST, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def scaled(self, loss_denominator: Tensor | float, device: torch.device) -> Tensor:
        """As in LossScaling."""
        return loss_denominator / self.value.to(device, non_blocking=True)

    def unscaled(self, loss: Tensor, gradients: Iterable[Tensor]) -> Tensor:
        """As in LossScaling."""
        torch._foreach_mul_(list(gradients), self.value.reciprocal())
        return loss / self.value.to(loss.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors."""
        return {"value": self.value, "good_steps": self._good}

    @torch.no_grad()
    def after_step(self, step: int, outcome: StepOutcome) -> None:
        """Adapt the scale; the gradient norm is that of the gradients divided by `value`."""
        finite = outcome.grad_norm.detach().to(self.value.device).isfinite()
        self._good.add_(1).mul_(finite)
        grown = self._good >= _INTERVAL
        self._good.mul_(~grown)
        factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
        self.value.mul_(factor).clamp_(_LEAST, _MOST)

    def metrics(self) -> Values:
        """The scale; waits for the device."""
        return {"loss_scale": self.value.item()}

    @staticmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        """See StateGroup."""
        value, good = state.get("value"), state.get("good_steps")
        if value is not None and not ((value >= _LEAST) & (value <= _MOST)).all():
            return "value is not a scale"
        return "good_steps is not a number of steps" if good is not None and not (good >= 0).all() else None
