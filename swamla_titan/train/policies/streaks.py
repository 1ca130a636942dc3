"""What a run does about bad steps: it reports them, saves no weights that are not finite, and ends long streaks.

A streak of `fault_tolerance.max_bad_steps` ends in a rewind, or stops the run where no rewind is left
(`fault_tolerance.max_rewinds`). Both leave traces/bad-steps-N.json, which names the data that the batches of the streak
consisted of.

A rewind takes weights, optimizer states and the window that spikes are measured by from a checkpoint; step number,
schedule, data and random states continue. So the batch of step n stays a function of n, and the data of the streak are
skipped. The checkpoint is the newest one with weights older than those that the streak began with: bad steps change
nothing, so what was saved within the streak, or at the step before it, holds the weights that failed. Only checkpoints
of `checkpoint.interval` count, not those that a signal asked for, because where a run was stopped must not change its
weights.

A run that is killed and resumed comes to the same result:
- When: at the end of the step after the streak is full, never earlier, whatever is logged or saved in between.
- Where to: checkpoints are removed only after a newer one has been committed. If that one is later than the rewind, the
  rewind is in it. If it is earlier, a resumed run comes to the streak again, and for that case retention protects one
  more checkpoint for each that it keeps: the target of a streak that would begin right after it.
- What is not covered: a checkpoint that is later than two successive rewinds turns out damaged, so that the run repeats
  both, while the target of the second is gone. It then goes back further if it can, and else stops with the message.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from swamla_titan.checkpoint.reader import is_finite
from swamla_titan.checkpoint.state import State
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config import Config
from swamla_titan.config.schedule import Schedule, TrainingStage
from swamla_titan.data import BatchLoader, SequenceOrder
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World, all_gather_dict, broadcast_from_rank_0
from swamla_titan.errors import RunFailed
from swamla_titan.system.events import record_event
from swamla_titan.train.bad_steps import BadStep, BadSteps
from swamla_titan.train.policy import Policy, StepOutcome, Values
from swamla_titan.train.setup import Setup
from swamla_titan.train.step import RunState

logger = logging.getLogger(__name__)

Cursor = dict[str, Any]

_NAMED = 8  # in a warning


def bad_step_policy(setup: Setup, state: RunState, loader: BatchLoader) -> "BadStepPolicy":
    """The policy that fault_tolerance.skip_bad_steps asks for; `state.bad_steps` is there if it is true."""
    return SkippingPolicy(setup, state, state.bad_steps, loader) if state.bad_steps else BadStepPolicy(setup.config)


class BadStepPolicy(Policy):
    """Ends a run at the first loss or gradient norm that is not finite, because such steps are applied."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def begin_stage(self, stage: TrainingStage) -> None:
        """The next step is the first of `stage`."""

    def report(self) -> None:
        """Warn of the steps skipped since the last call; waits for the device."""

    def too_many(self, step: int) -> bool:
        """Whether a streak was too long at the end of the step before `step`; the host does not wait, see BadSteps."""
        return False

    def require_finite(self, step: int, outcome: StepOutcome, to_save: bool = False) -> bool:
        """Whether the weights may be saved; if not, and no rewind can replace them, raise RunFailed, on every rank.

        `to_save`: before saving, not only for a log line.
        """
        # Where bad steps are applied, the weights are not finite after a step whose loss or gradient norm is not.
        if math.isfinite(outcome.loss.item()) and math.isfinite(outcome.grad_norm.item()):
            return True
        raise self._not_finite(step, outcome, "this step is not saved")

    def _not_finite(self, step: int, outcome: StepOutcome, what: str) -> RunFailed:
        return RunFailed(
            f"step {step}: loss {outcome.loss.item()}, gradient norm {outcome.grad_norm.item()}; {what}. "
            f"{remedies(self._config)}. Then start the same command again. If the loss had risen for long, move the "
            "newest checkpoints away first"
        )

    def end_streak(self, step: int, too_many: bool, paused: AbstractContextManager[None]) -> RunFailed | None:
        """End a streak that is too long; returns the error to raise once `step` is saved, None: the run continues.

        `too_many`: the answer for `step`. `paused` encloses a rewind. All ranks call this, after `report`.
        """
        return None


class SkippingPolicy(BadStepPolicy):
    """Reports the steps that `judge` found bad, and ends streaks of them; for runs that skip bad steps."""

    def __init__(self, setup: Setup, state: RunState, judge: BadSteps, loader: BatchLoader) -> None:
        super().__init__(setup.config)
        self._state, self._judge, self._loader, self._world = state, judge, loader, setup.world
        self._traces = Path(setup.config.job.dump_folder) / "traces"
        self._rewinding = Rewinding(setup.config, setup.checkpoints, judge, setup.world)
        # The cursors before each of the last batches: one more than a streak has, because `too_many` answers a step
        # late.
        steps = setup.config.fault_tolerance.max_bad_steps + 1
        self._cursors: deque[tuple[int, dict[int, Cursor]]] = deque(maxlen=steps)
        self._schedule, self._order = setup.schedule, setup.corpus.order

    def before_step(self, step: int) -> None:
        """Remember where the batch of `step` begins."""
        self._cursors.append((step, self._loader.cursors))

    def metrics(self) -> Values:
        """The steps skipped so far, and the rewinds, if there were any; also warns of newly skipped steps."""
        self.report()
        values: Values = {"skipped_steps": self._judge.skipped}
        return values | ({"rewinds": self._judge.rewinds} if self._judge.rewinds else {})

    def begin_stage(self, stage: TrainingStage) -> None:
        self._judge.begin_stage(stage)

    def report(self) -> None:
        if skipped := self._judge.read():
            logger.warning("%s. %s", warning(skipped, self._judge.skipped), remedies(self._config))
            record_event("skipped", steps=[each.step for each in skipped])

    def too_many(self, step: int) -> bool:
        return self._judge.too_many(step)

    def require_finite(self, step: int, outcome: StepOutcome, to_save: bool = False) -> bool:
        # A good step can be so large that the weights overflow. All steps after it are bad, and only a rewind helps, so
        # the weights are checked before saving and in a streak of bad steps.
        suspected = to_save or self._judge.streak > 0
        if not suspected or are_finite(self._state.model.parts, self._world):
            return True
        if self._rewinding.may_mend(step):
            return False
        raise self._not_finite(step, outcome, "the weights are not finite any more; they are not saved")

    def end_streak(self, step: int, too_many: bool, paused: AbstractContextManager[None]) -> RunFailed | None:
        is_full = self._judge.streak >= self._config.fault_tolerance.max_bad_steps
        # A run stops as soon as the streak is known. A rewind changes the weights, so its step must not depend on
        # whether a log line showed the streak earlier.
        if not too_many and not (is_full and not self._rewinding.is_possible(step)):
            return None
        streak = self._judge.newest_streak()
        what = f"a streak of {len(streak)} bad steps, up to step {streak[-1]}"
        path = self._write(streak, step)
        if self._rewinding.is_possible(step):
            with paused:
                target = self._rewinding.rewind(step, self._state)
            if target:
                logger.warning("%s: %s; %s lists their data", what, self._rewinding.report(target, step), path)
                record_event("rewind", step=step, trained=self._judge.trained)
                return None
        self._judge.reset_streak()
        return RunFailed(
            f"{what}. They changed nothing; step {step} is saved, "
            f"and {path} says which data they read. {self._rewinding.why_not()}If those are at fault, start the same "
            f"command again: it continues after them. {remedies(self._config)}. If the loss had risen before, move the "
            "newest checkpoints away first. If good steps pass for spikes, raise fault_tolerance.spike_sigma"
        )

    def _write(self, streak: Sequence[BadStep], step: int) -> Path:
        """Write a streak's batches with the cursors of all ranks, which all call this; a disk error is only logged."""
        path = self._traces / f"bad-steps-{step}.json"
        own = {(step, stream): cursor for step, cursors in self._cursors for stream, cursor in cursors.items()}
        cursors = all_gather_dict(self._world, own)
        if self._world.is_rank_0:
            try:
                write_bad_batches(path, streak, self._schedule, self._order, cursors)
            except OSError as error:  # the run must still rewind or stop
                logger.error("%s could not be written: %s", path, error.strerror)
        return path


class _Saved(NamedTuple):
    """A checkpoint's step, the step that made its weights, and whether checkpoint.interval saved it."""

    step: int
    trained: int
    at_interval: bool


class Rewinding:
    """Chooses the checkpoint that a run goes back to, counts rewinds, and protects checkpoints that it may still need.

    Every rank has one.
    """

    def __init__(self, config: Config, checkpoints: Checkpoints, bad_steps: BadSteps, world: World) -> None:
        """From now on `checkpoints` protects what rewinds may need, if rewinds are allowed."""
        self._most = config.fault_tolerance.max_rewinds
        self._steps = config.training.steps
        self._checkpoints, self._bad_steps, self._world = checkpoints, bad_steps, world
        self._known: dict[tuple[Path, int], _Saved | None] = {}
        self._found_none = False
        self._unsaved: int | None = None  # the first step that was not saved, in the hope of a rewind
        if self._most:
            checkpoints.protected = self.protected

    def is_possible(self, step: int) -> bool:
        """Whether a streak that is full at the end of `step` can end in a rewind, as of the last `report`."""
        return self._bad_steps.rewinds < self._most and not self._found_none and step < self._steps

    def report(self, target: Path, step: int) -> str:
        """The log line on the rewind at the end of `step`."""
        return (
            f"rewound to the weights and optimizer of {target}; step {step + 1} continues with the next batch; "
            f"rewind {self._bad_steps.rewinds} of {self._most}"
        )

    def why_not(self) -> str:
        """Why a run stops although rewinds are allowed: a sentence and a space, or nothing."""
        if self._found_none:
            return (
                "There is no rewind, because no intact checkpoint holds weights from before those that the streak "
                "began with: lower checkpoint.interval. "
            )
        return f"All {self._most} rewinds were made. " if 0 < self._most <= self._bad_steps.rewinds else ""

    def may_mend(self, step: int) -> bool:
        """Whether a run with weights that are not finite at the end of `step` may continue, unsaved, until a rewind.

        A streak of bad steps leads to a rewind soon. Without a streak, one save may be skipped: if the steps until the
        next save are good in spite of such weights, there will be no streak.
        """
        if not self.is_possible(step):
            return False
        if self._bad_steps.streak:
            return True
        self._unsaved = step if self._unsaved is None else self._unsaved
        return self._unsaved == step

    def rewind(self, step: int, state: State) -> Path | None:
        """Rewind for the streak that `too_many` found at the end of `step`; returns the checkpoint, None if none.

        Loads weights and optimizer states into `state`. Skips checkpoints that are damaged or do not fit, such as those
        of another model. All ranks call this.
        """
        before = self._bad_steps.trained_before_streak
        targets = broadcast_from_rank_0(
            self._world, lambda: dict(self._older(before, step, self._checkpoints.finished()))
        )
        windows = {path: self._bad_steps.empty_window() for path in targets}
        target = self._checkpoints.load_first(
            targets, lambda path: state.load_learned(path, {BadSteps.group: windows[path]})
        )
        if target:
            self._bad_steps.rewound(step, targets[target], windows[target])
            self._unsaved = None
        else:
            self._found_none = True
        return target

    def protected(self, kept: Sequence[Path], others: Sequence[Path]) -> set[Path]:
        """The checkpoints of `others`, newest first, that a run which resumes from one of `kept` may go back to."""
        needed = set()
        for saved in filter(None, map(self._saved, kept)):
            needed |= {path for path, _ in islice(self._older(saved.trained, saved.step, [*kept, *others]), 1)}
        return needed

    def _older(self, trained: int, step: int, paths: Iterable[Path]) -> Iterator[tuple[Path, int]]:
        """Checkpoints before `step` with weights older than those of step `trained`, and the step that made them."""
        for path in paths:
            saved = self._saved(path)
            if saved and saved.at_interval and saved.step < step and saved.trained < trained:
                yield path, saved.trained

    def _saved(self, path: Path) -> _Saved | None:
        """The steps of a checkpoint, damaged or not; None, with one warning, if it cannot be read."""
        try:
            key = path, path.stat().st_ino  # because a damaged checkpoint may be replaced by another of this name
        except OSError:
            return None
        if key not in self._known:
            self._known[key] = self._read(path)
        return self._known[key]

    def _read(self, path: Path) -> _Saved | None:
        counts = BadSteps.empty_counts()
        found = self._checkpoints.peek(path, {BadSteps.group: counts})
        if found is None:
            return None
        step, config = found  # of the run that wrote it
        return _Saved(step, BadSteps.trained_of(counts, step), step % config.checkpoint.interval == 0)


def write_bad_batches(
    path: Path,
    bad: Sequence[BadStep],
    schedule: Schedule,
    order: SequenceOrder,
    cursors: dict[tuple[int, int], Cursor],
) -> None:
    """Write a JSON list with an object for each bad step: loss, norm, and the data of its batch.

    `first_sequence` .. `last_sequence` are global sequence numbers. Sequence g is the next one of stream g %
    streams; of a mixture `sources` has the names of all sources, and stream k of source i is called i * streams + k.
    `cursors` maps (step, stream) to the stream's cursor before the batch; it lacks steps before a restart.
    NaN and infinities, which JSON lacks, become the strings "nan", "inf" and "-inf". A step without a limit has no
    key for it. Raises OSError.
    """
    objects: list[dict[str, Any]] = []
    for step in bad:
        stage = schedule.stage(step.step)
        numbers = range(stage.after(step.step - 1).sequences, stage.after(step.step).sequences)
        read = sorted({*order.cursor_keys(np.array(numbers)).tolist()})
        entry: dict[str, Any] = {"step": step.step, "loss": _number(step.loss), "grad_norm": _number(step.grad_norm)}
        if math.isfinite(step.limit):
            entry["limit"] = step.limit
        entry |= {"first_sequence": numbers[0], "last_sequence": numbers[-1], "streams": order.streams}
        entry |= {} if order.has_one_source else {"sources": list(order.names)}
        found = {stream: cursors[step.step, stream] for stream in read if (step.step, stream) in cursors}
        if found:
            entry["cursors"] = found
        objects.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(objects, indent=1) + "\n", encoding="utf-8")


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def warning(skipped: Sequence[BadStep], in_all: int) -> str:
    """The warning for the steps skipped since the last one."""
    shown = ", ".join(map(str, skipped[:_NAMED]))
    more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    return f"skipped as bad, changing nothing: step{'s' * (len(skipped) > 1)} {shown}{more}; {in_all} in all"


def remedies(config: Config) -> str:
    """What to try against losses or gradients that are not finite or spike: a sentence for this configuration."""
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
            f'continue with float8.recipe = "off"{first} to see whether "{float8.recipe}" is at fault (any checkpoint '
            "continues under any recipe)"
        )
    return f"If this continues: {'; '.join(tries)}"


def are_finite(parts: Iterable[nn.Module], world: World) -> bool:
    """Whether every weight on every rank is finite; all ranks call this, and wait for their devices."""
    weights = [local(weight.detach()) for part in parts for weight in part.parameters()]
    mine = torch.stack([is_finite(weight) for weight in weights]).all().item()
    return world.all_reduce_max(float(not mine)) == 0
