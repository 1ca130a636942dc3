"""What a run does about bad steps: it reports them, saves no weights that are not finite, and ends long streaks.

A streak of `fault_tolerance.max_bad_steps` ends in a rewind (rewinding.py), or stops the run. Both leave
traces/bad-steps-N.json, which names the data that the batches of the streak consisted of.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swamla_titan.checkpoint.reader import is_finite
from swamla_titan.config import Config
from swamla_titan.data import BatchLoader
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World, all_gather_dict
from swamla_titan.errors import RunFailed
from swamla_titan.train.bad_steps import BadStep
from swamla_titan.train.policies.rewinding import Rewinding
from swamla_titan.train.policy import Policy, StepOutcome, Values
from swamla_titan.train.setup import Setup
from swamla_titan.train.step import RunState

logger = logging.getLogger(__name__)

Cursor = dict[str, Any]

_NAMED = 8  # in a warning


class BadStepPolicy(Policy):
    """Acts on what `state.bad_steps` has judged; where bad steps are applied (None), it only checks the outcome."""

    def __init__(self, setup: Setup, state: RunState, loader: BatchLoader) -> None:
        self._config, self._world = setup.config, setup.world
        self._traces = Path(setup.config.job.dump_folder) / "traces"
        self._state, self._judge, self._rewinding = state, state.bad_steps, None
        if self._judge:
            self._rewinding = Rewinding(self._config, setup.checkpoints, self._judge, self._world)
        self._loader = loader
        # The cursors before each of the last batches. `too_many` answers a step late: one more than a streak.
        steps = setup.config.fault_tolerance.max_bad_steps + 1
        self._cursors: deque[tuple[int, dict[int, Cursor]]] = deque(maxlen=steps)

    def before_step(self, step: int) -> None:
        """Remember where the batch of `step` begins."""
        if self._judge:
            self._cursors.append((step, self._loader.cursors))

    def metrics(self) -> Values:
        """The steps skipped so far, and the rewinds, if there were any; also warns of newly skipped steps."""
        self.report()
        if not self._judge:
            return {}
        values: Values = {"skipped_steps": self._judge.skipped}
        return values | ({"rewinds": self._judge.rewinds} if self._judge.rewinds else {})

    def report(self) -> None:
        """Warn of the steps skipped since the last call; waits for the device."""
        if self._judge and (skipped := self._judge.read()):
            logger.warning("%s. %s", warning(skipped, self._judge.skipped), remedies(self._config))

    def too_many(self, step: int) -> bool:
        """Whether a streak was too long at the end of the step before `step`; the host does not wait, see BadSteps."""
        return self._judge is not None and self._judge.too_many(step)

    def require_finite(self, step: int, outcome: StepOutcome, to_save: bool = False) -> bool:
        """Whether the weights may be saved; if not, and no rewind can replace them, raise RunFailed, on every rank.

        Where bad steps are applied, the weights are not finite after a step whose loss or gradient norm is not. Where
        they are skipped, a good step that was far too large can leave such weights: every step after it is bad, and
        only a rewind helps. The weights are checked before saving (`to_save`), and in a streak of bad steps.
        """
        loss, grad_norm = outcome.loss.item(), outcome.grad_norm.item()
        if self._judge and self._rewinding:
            suspected = to_save or self._judge.streak > 0
            if not suspected or are_finite(self._state.model.parts, self._world):
                return True
            if self._rewinding.may_mend(step):
                return False
            what = "the weights are no finite numbers any more; they are not saved"
        elif math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        else:
            what = "this step is not saved"
        raise RunFailed(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; {what}. {remedies(self._config)}. Then start the "
            "same command again. If the loss had risen for long, move the newest checkpoints away first"
        )

    def end_streak(
        self, step: int, sequences: int, too_many: bool, paused: AbstractContextManager[None]
    ) -> RunFailed | None:
        """End a streak that is too long; returns the error to raise once `step` is saved, None: the run continues.

        `too_many`: the answer for `step`. `sequences`: the index of the next global sequence. `paused` encloses a
        rewind. All ranks call this, after `report`.
        """
        if not self._judge or not self._rewinding:
            return None
        is_full = self._judge.streak >= self._config.fault_tolerance.max_bad_steps
        # A run stops as soon as the streak is known. But a rewind changes the weights, so that its step must not depend
        # on whether a log line happened to show the streak earlier.
        if not too_many and not (is_full and not self._rewinding.is_possible(step)):
            return None
        streak = self._judge.newest_streak()
        what = f"a streak of {len(streak)} bad steps, up to step {streak[-1]}"
        path = self._write(streak, step, sequences)
        if self._rewinding.is_possible(step):
            with paused:
                target = self._rewinding.rewind(step, self._state)
            if target:
                logger.warning("%s: %s; %s lists their data", what, self._rewinding.report(target, step), path)
                return None
        self._judge.reset_streak()
        return RunFailed(
            f"{what}. They changed nothing; step {step} is saved, "
            f"and {path} says which data they read. {self._rewinding.why_not()}If those are at fault, start the same "
            f"command again: it continues after them. {remedies(self._config)}. If the loss had risen before, move the "
            "newest checkpoints away first. If good steps pass for spikes, raise fault_tolerance.spike_sigma"
        )

    def _write(self, streak: Sequence[BadStep], step: int, sequences: int) -> Path:
        """`write_bad_batches` with the cursors of all ranks; all call it. A disk error is only logged."""
        path = self._traces / f"bad-steps-{step}.json"
        size = self._config.training.global_batch_size
        own = {(step, stream): cursor for step, cursors in self._cursors for stream, cursor in cursors.items()}
        cursors = all_gather_dict(self._world, own)
        if self._world.is_rank_0:
            first = sequences - step * size  # not 0 where checkpoint.allow has changed the batch or the data
            try:
                write_bad_batches(path, streak, first, size, self._config.data.streams, cursors)
            except OSError as error:  # the run must still rewind or stop
                logger.error("%s could not be written: %s", path, error.strerror)
        return path


def write_bad_batches(
    path: Path,
    bad: Sequence[BadStep],
    first: int,
    global_batch_size: int,
    streams: int,
    cursors: dict[tuple[int, int], Cursor],
) -> None:
    """Write a JSON list with an object for each bad step: loss, norm, and what its batch consisted of.

    `first_sequence` .. `last_sequence` are global sequence numbers, where step 1 would begin with `first`: 0 if batches
    always had one size. Sequence g is the next one of stream g % streams. `cursors` maps (step, stream) to the stream's
    position before the batch; it lacks steps before a restart. NaN and infinities, which JSON lacks, are the strings
    "nan", "inf" and "-inf". A limit that did not exist is absent. Raises OSError.
    """
    objects: list[dict[str, Any]] = []
    for step in bad:
        begin = first + (step.step - 1) * global_batch_size
        numbers = range(begin, begin + global_batch_size)
        read = sorted({number % streams for number in numbers})
        entry: dict[str, Any] = {"step": step.step, "loss": _number(step.loss), "grad_norm": _number(step.grad_norm)}
        if math.isfinite(step.limit):
            entry["limit"] = step.limit
        entry |= {"first_sequence": numbers[0], "last_sequence": numbers[-1], "streams": streams}
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
    """What to try where losses or gradients are not finite or spike: a sentence that depends on the configuration."""
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
