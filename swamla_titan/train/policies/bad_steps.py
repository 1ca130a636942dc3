"""Bad steps: which they are, that they change nothing, and when there are too many of them.

A step is bad if its loss or its gradient norm, both of the global batch, is not finite, or if the norm is a spike:

    norm > mean + spike_sigma * std    of the norms of the last `spike_window` good steps,

std that of the window itself (divided by its size). Until so many good steps are known nothing is a spike, and a bad
step's norm never enters the window.

A bad step is computed like any other and then not applied: the optimizer's kernels find the flag on the device and
leave weights, moments, their step counts and weight decay alone. The run's step number goes on, and with it what is a
function of it: the batch is used up, the learning rate is the next step's. So the order of the data and the schedule
stay functions of the step alone, whatever was skipped.

All of it lives in tensors on the device. The host does not wait for them but where it logs or saves.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swamla_titan.checkpoint.state import StateGroup
from swamla_titan.config.sections import Config, FaultTolerance
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World

_SKIPPED, _IN_ROW, _TRAINED, _REWINDS = range(4)  # places among the counts
_EMPTY = -1.0  # a place of the window that holds no norm yet: none is negative
_REMEMBERED = 64  # bad steps whose numbers are kept; more if a row may be longer
_NAMED = 8  # in a warning


class BadStep(NamedTuple):
    """A step that was skipped. `limit` is what a norm had to exceed to be a spike; infinite: there was no limit."""

    step: int
    loss: float
    grad_norm: float
    limit: float

    def __str__(self) -> str:
        is_spike = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        beyond = f" > {self.limit:.4g}" if is_spike and self.grad_norm > self.limit else ""
        return f"{self.step} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{beyond})"


class BadSteps(StateGroup):
    """The judge of a run's steps, with its memory: one on every rank, alike on all.

    The host's, as of the last `read`: `skipped` in all, `in_row` at the end of the run so far, `rewinds` made (see
    rewinding.py), and `trained`, the step that made the weights what they are: the last good one, of the checkpoint's
    run after a rewind. No two states of a run's weights have one in common.
    """

    group = "bad_steps"

    def __init__(self, config: FaultTolerance, device: torch.device, world: World | None = None) -> None:
        """`device`: where the weights are, and the gradient norm."""
        self.config = config
        self.device = device
        self.world = world or World.alone(device)
        self.skipped = self.in_row = self.trained = self.rewinds = 0
        self.trained_before_row = 0  # `trained` as of the row that `too_many` found
        # Oldest first: what is measured must not depend on where in a ring a run was resumed.
        self._norms = torch.full((config.spike_window,), _EMPTY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        # Rows of BadStep's numbers, the newest last; step 0 where there are none.
        remembered = max(_REMEMBERED, config.max_bad_steps)
        self._recent = torch.zeros(remembered, len(BadStep._fields), dtype=torch.float64, device=device)
        self._look_at = config.max_bad_steps  # the first step at whose end there can be too many
        self._copy = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, the same on every rank."""
        return {"norms": self._norms, "counts": self._counts, "recent": self._recent}

    def loaded(self, state: dict[str, Tensor], step: int) -> None:
        """Continue after `step`; `state` are the live tensors.

        A streak is noticed at the same step as without the restart: a rewind must not depend on where a run was cut.
        """
        self._counts[_TRAINED].fill_(self.trained_of(state, step))
        self._tell()
        self._copy.copy_(self._counts)
        self._copied = None
        self._look_at = step + max(0, self.config.max_bad_steps - self.in_row)

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1 if the step is bad, else 0: float32 scalar on the device, the same on every rank; and remembers it.

        `step` counts from 1; `loss` and `grad_norm` are scalars of the global batch. Where the weights are offloaded to
        the host, which then takes the optimizer's step itself, it waits for the loss; nowhere else.
        """
        loss, norm = (value.detach().to(self.device, torch.float64) for value in (loss, grad_norm))
        limit = self._limit()
        flag = (~(loss.isfinite() & norm.isfinite()) | (norm > limit)).float()
        if self.world.size > 1:
            # A loss may have gone wrong on some ranks only (those of a tensor rank, say): skipped by one, by all.
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        bad = flag > 0
        self._norms.copy_(torch.where(bad, self._norms, torch.cat((self._norms[1:], norm[None]))))
        # Filled on the device: a tensor made of a Python number is copied there, and the copy waits.
        number = torch.full((), step, dtype=torch.float64, device=self.device)
        self._counts[_SKIPPED].add_(bad)
        self._counts[_IN_ROW].add_(1).mul_(bad)
        self._counts[_TRAINED].copy_(torch.where(bad, self._counts[_TRAINED], number))
        row = torch.stack((number, loss, norm, limit))
        self._recent.copy_(torch.where(bad, torch.cat((self._recent[1:], row[None])), self._recent))
        return flag

    def _limit(self) -> Tensor:
        """The norm beyond which the coming step is a spike."""
        never = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        if not self.config.spike_sigma:
            return never
        limit = self._norms.mean() + self.config.spike_sigma * self._norms.std(correction=0)
        return torch.where(self._norms[0] == _EMPTY, never, limit)

    def too_many(self, step: int) -> bool:
        """Whether there were `max_bad_steps` in a row at the end of the step before `step`, which has been submitted.

        Called after every step; one step late, so that the device has a whole step to compute and never runs dry.
        It looks only when a row can have become long enough: mostly once in `max_bad_steps`. The same on every rank.
        """
        if step > self._look_at:
            if self._copied:
                self._copied.synchronize()
            _, in_row, trained, _ = self._copy.tolist()
            if in_row >= self.config.max_bad_steps:
                self.trained_before_row = trained  # a good step may have come since
                return True
            self._look_at += self.config.max_bad_steps - in_row
        if step == self._look_at:
            self._copy.copy_(self._counts, non_blocking=True)
            if self.device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record()
        return False

    def read(self) -> list[BadStep]:
        """Wait for the device and bring the host's numbers up to date.

        Returns the steps skipped since the last call, the newest of them if they are more than are remembered.
        """
        before = self.skipped
        self._tell()
        return self._remembered()[-(self.skipped - before) :] if self.skipped > before else []

    def row(self) -> list[BadStep]:
        """The newest bad steps of one row, as far as remembered; waits. Complete where there were too many."""
        newest: list[BadStep] = []
        for bad in reversed(self._remembered()):
            if newest and bad.step != newest[0].step - 1:
                break
            newest.insert(0, bad)
        # Those before a rewind or a stop are of another row, even if no good step came between.
        return newest[-max(self.in_row, self.config.max_bad_steps) :]

    def forgive(self) -> None:
        """Begin to count a row anew: for the checkpoint of a run that stops for one, to be started again by a user."""
        self._counts[_IN_ROW].zero_()

    def empty_window(self) -> dict[str, Tensor]:
        """Of `state_dict`, what depends on the weights, as of a run that begins: to load into, for `rewound`."""
        return {"norms": torch.full_like(self._norms, _EMPTY)}

    def rewound(self, step: int, trained: int, window: dict[str, Tensor]) -> None:
        """At the end of `step` the weights became those that step `trained` made, with the window of that time.

        What was counted stays counted.
        """
        self._norms.copy_(window["norms"])
        self._counts[_REWINDS].add_(1)
        self._counts[_TRAINED].fill_(trained)
        self.forgive()
        self.loaded(self.state_dict(), step)

    @staticmethod
    def empty_counts() -> dict[str, Tensor]:
        """Of `state_dict`, the counts, on the host: to load another checkpoint's into, for `trained_of`."""
        return {"counts": torch.zeros(4, dtype=torch.int64)}

    @staticmethod
    def trained_of(state: dict[str, Tensor], step: int) -> int:
        """The step that made the weights of a checkpoint of `step`."""
        # Not in it: every step either counts as skipped or has trained the weights.
        return int(state["counts"][_TRAINED]) if state["counts"].any() else step

    @staticmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        """See StateGroup; the history may be shorter or longer than this run's."""
        counts, recent, norms = (state.get(name) for name in ("counts", "recent", "norms"))
        if counts is not None and not (
            counts.shape == (4,) and counts.dtype == torch.int64 and ((counts >= 0) & (counts <= step)).all()
        ):
            return f"counts are not those of {step} steps"
        if recent is not None:
            steps = recent[:, 0] if recent.shape[1:] == (len(BadStep._fields),) else torch.full((1,), math.nan)
            if not ((steps >= 0) & (steps <= step) & (steps == steps.floor())).all():
                return "recent has no steps"
        if norms is not None and not ((norms == _EMPTY) | ((norms >= 0) & norms.isfinite())).all():
            return "norms are no norms"
        return None

    def _tell(self) -> None:
        self.skipped, self.in_row, self.trained, self.rewinds = self._counts.tolist()

    def _remembered(self) -> list[BadStep]:
        return [BadStep(int(step), *numbers) for step, *numbers in self._recent.tolist() if step]


def warning(news: Sequence[BadStep], in_all: int) -> str:
    """What a log says of the steps skipped since the last one."""
    shown = ", ".join(map(str, news[:_NAMED]))
    more = f" and {len(news) - _NAMED} more" if len(news) > _NAMED else ""
    return f"skipped as bad, changing nothing: step{'s' * (len(news) > 1)} {shown}{more}; {in_all} in all"


def remedies(config: Config) -> str:
    """What to try where losses or gradients are no finite numbers, or spikes: a sentence, by what the run does now."""
    clip, float8 = config.training.max_grad_norm, config.float8
    tries = ["lower optimizer.lr or lengthen lr_schedule.warmup_steps"]
    if clip == 0:
        tries.append("clip gradients (training.max_grad_norm is 0: 1.0 is usual)")
    else:
        tries.append(f"clip gradients more (training.max_grad_norm is {clip:g})")
    if float8.recipe != "off":
        less_exact = [f"float8.{key}" for key in ("fast_accumulation", "output_head") if getattr(float8, key)]
        first = f", or {' and '.join(less_exact)} = false," if less_exact else ""
        tries.append(
            f'go on with float8.recipe = "off"{first} to see whether "{float8.recipe}" is at fault (any checkpoint '
            "goes on under any recipe)"
        )
    return f"If this goes on: {'; '.join(tries)}"


def are_finite(parts: Iterable[nn.Module], world: World) -> bool:
    """Whether every weight on every rank is a finite number; all ranks must ask, and wait for their devices."""
    weights = [local(weight.detach()) for part in parts for weight in part.parameters()]
    mine = torch.stack([weight.isfinite().all() for weight in weights]).all().item()
    return world.all_reduce_max(float(not mine)) == 0
