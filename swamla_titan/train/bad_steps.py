"""Judges steps: which are bad, so that they change nothing, and when a streak of bad steps is too long.

A step is bad if its loss or its gradient norm, both of the global batch, is not finite, or if the norm is a spike:

    norm > mean + spike_sigma * std    of the norms of the last `spike_window` good steps,

where std is that of the window as a population (divided by its size). Until the window is full nothing is a spike, and
a bad step's norm never enters the window. A stage of training.stages begins with an empty one.

A bad step is computed like any other but not applied: the optimizer's kernels read the flag on the device and leave
weights, moments and step counts unchanged, and apply no weight decay. The run's step number advances, so that the order
of the data and the learning rate remain functions of the step alone, whatever was skipped.

All of this is in tensors on the device; the host waits for them only when it logs or saves.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.checkpoint.state import StateGroup
from swamla_titan.config.schedule import TrainingStage
from swamla_titan.config.sections import FaultTolerance
from swamla_titan.distributed.mesh import World

_SKIPPED, _STREAK, _TRAINED, _REWINDS = range(4)  # indices of the counts
_EMPTY = -1.0  # marks entries of the window without a norm; norms are not negative
_REMEMBERED = 64  # bad steps whose loss and norm are kept, or as many as a streak may have


class BadStep(NamedTuple):
    """A step that was skipped; its norm was a spike if above `limit`, which is infinite if there was none."""

    step: int
    loss: float
    grad_norm: float
    limit: float

    def __str__(self) -> str:
        is_spike = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        beyond = f" > {self.limit:.4g}" if is_spike and self.grad_norm > self.limit else ""
        return f"{self.step} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{beyond})"


class BadSteps(StateGroup):
    """Judges the steps of a run and remembers bad ones; the same on every rank.

    On the host, as of the last `read`: `skipped` steps in all, the length of the current `streak`, the `rewinds` made,
    and `trained`, the step that made the current weights: the last good one, or after a rewind that of the checkpoint.
    `trained` identifies the weights of a run. policies/streaks.py acts on what is found here.
    """

    group = "bad_steps"

    def __init__(self, config: FaultTolerance, device: torch.device, world: World | None = None) -> None:
        """`device`: where the weights are, and the gradient norm."""
        self.config = config
        self.device = device
        self.world = world or World.alone(device)
        self.skipped = self.streak = self.trained = self.rewinds = 0
        self.trained_before_streak = 0  # `trained` as of the streak that `too_many` found
        # Oldest first and not a ring buffer, because mean and std must not depend on where a run was resumed.
        self._norms = torch.full((config.spike_window,), _EMPTY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        # [remembered, fields of BadStep], the newest last; step 0 where there is none.
        remembered = max(_REMEMBERED, config.max_bad_steps)
        self._recent = torch.zeros(remembered, len(BadStep._fields), dtype=torch.float64, device=device)
        self._check_at = config.max_bad_steps  # the first step at whose end the streak can be too long
        self._copy = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, which are the same on every rank."""
        return {"norms": self._norms, "counts": self._counts, "recent": self._recent}

    def loaded(self, state: dict[str, Tensor], step: int) -> None:
        """Continue after `step`; `state` are the live tensors.

        A streak is noticed at the same step as without the restart, because a rewind must not depend on where a run was
        interrupted.
        """
        self._counts[_TRAINED].fill_(self.trained_of(state, step))
        self._read_counts()
        self._copy.copy_(self._counts)
        self._copied = None
        self._check_at = step + max(0, self.config.max_bad_steps - self.streak)

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Judge `step` (from 1): 1 if it is bad, else 0, a float32 scalar on the device, the same on every rank.

        `loss` and `grad_norm` are scalars of the global batch. The host waits for the loss only where weights are
        offloaded to it, because it then updates them itself.
        """
        loss, norm = (value.detach().to(self.device, torch.float64) for value in (loss, grad_norm))
        limit = self._limit()
        flag = (~(loss.isfinite() & norm.isfinite()) | (norm > limit)).float()
        if self.world.size > 1:
            # A loss may be wrong on some ranks only (of one tensor coordinate, say), but all must skip the step.
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        bad = flag > 0
        self._norms.copy_(torch.where(bad, self._norms, torch.cat((self._norms[1:], norm[None]))))
        # torch.full fills on the device; torch.tensor would copy the number there, and the copy waits.
        number = torch.full((), step, dtype=torch.float64, device=self.device)
        self._counts[_SKIPPED].add_(bad)
        self._counts[_STREAK].add_(1).mul_(bad)
        self._counts[_TRAINED].copy_(torch.where(bad, self._counts[_TRAINED], number))
        newest = torch.stack((number, loss, norm, limit))
        self._recent.copy_(torch.where(bad, torch.cat((self._recent[1:], newest[None])), self._recent))
        return flag

    def _limit(self) -> Tensor:
        """The norm above which the next step is a spike."""
        never = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        if not self.config.spike_sigma:
            return never
        limit = self._norms.mean() + self.config.spike_sigma * self._norms.std(correction=0)
        return torch.where(self._norms[0] == _EMPTY, never, limit)

    def too_many(self, step: int) -> bool:
        """Whether there was a streak of `max_bad_steps` at the end of the step before `step`, which was submitted.

        Called after every step, the same on every rank. It answers one step late, so that the device always has a full
        step to compute, and waits only when a streak can have become long enough: mostly once in `max_bad_steps`.
        """
        if step > self._check_at:
            if self._copied:
                self._copied.synchronize()
            _, streak, trained, _ = self._copy.tolist()
            if streak >= self.config.max_bad_steps:
                self.trained_before_streak = trained  # a good step may have followed
                return True
            self._check_at += self.config.max_bad_steps - streak
        if step == self._check_at:
            self._copy.copy_(self._counts, non_blocking=True)
            if self.device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record()
        return False

    def read(self) -> list[BadStep]:
        """Wait for the device and update the host's counts.

        Returns the steps skipped since the last call; of more than are remembered, the newest.
        """
        before = self.skipped
        self._read_counts()
        return self._remembered()[-(self.skipped - before) :] if self.skipped > before else []

    def newest_streak(self) -> list[BadStep]:
        """The newest streak, as far as remembered, which is all of one that was too long; waits for the device."""
        newest: list[BadStep] = []
        for bad in reversed(self._remembered()):
            if newest and bad.step != newest[0].step - 1:
                break
            newest.insert(0, bad)
        # Steps before a rewind or a stop belong to another streak, even without a good step in between.
        return newest[-max(self.streak, self.config.max_bad_steps) :]

    def reset_streak(self) -> None:
        """Count the streak from zero again, so that a run which a streak stopped can be started again."""
        self._counts[_STREAK].zero_()

    def begin_stage(self, stage: TrainingStage) -> None:
        """Empty the window, because steps of another length or batch have norms of another size."""
        self._norms.fill_(_EMPTY)

    def empty_window(self) -> dict[str, Tensor]:
        """New tensors of `state_dict` that depend on the weights; a checkpoint's are loaded into them for `rewound`."""
        return {"norms": torch.full_like(self._norms, _EMPTY)}

    def rewound(self, step: int, trained: int, window: dict[str, Tensor]) -> None:
        """Continue after `step` with the weights that step `trained` made, and with their window; the counts stay."""
        self._norms.copy_(window["norms"])
        self._counts[_REWINDS].add_(1)
        self._counts[_TRAINED].fill_(trained)
        self.reset_streak()
        self.loaded(self.state_dict(), step)

    @staticmethod
    def empty_counts() -> dict[str, Tensor]:
        """New counts of `state_dict`, on the host; a checkpoint's are loaded into them for `trained_of`."""
        return {"counts": torch.zeros(4, dtype=torch.int64)}

    @staticmethod
    def trained_of(state: dict[str, Tensor], step: int) -> int:
        """The step that made the weights in a checkpoint of `step`."""
        # All zero if the run did not skip bad steps, because a step either counts as skipped or trains the weights.
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
            return "norms are not norms of gradients"
        return None

    def _read_counts(self) -> None:
        self.skipped, self.streak, self.trained, self.rewinds = self._counts.tolist()

    def _remembered(self) -> list[BadStep]:
        return [BadStep(int(step), *numbers) for step, *numbers in self._recent.tolist() if step]
