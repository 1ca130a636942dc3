"""Rewinding: after too long a streak of bad steps, the weights of an older checkpoint and the data after the streak.

A streak longer than `fault_tolerance.max_bad_steps` allows ends in one of two ways. Without rewinds left the run stops.
With one left, weights, optimizer states and the window that spikes are measured by become those of a checkpoint; step
number, schedule, data and random states continue. So the batch of step n stays a function of n, and the data of the
streak are skipped.

The target is the newest checkpoint with weights older than those that the streak began with. Bad steps change nothing:
what was saved within the streak, or at the step before it, holds the weights that failed. Only checkpoints of
`checkpoint.interval` count, not those that a signal asked for: where a run was stopped must not change its weights.

A run that is killed and resumed comes to the same result:
- When: at the end of the step after the streak is full, never earlier, whatever is logged or saved in between.
- Where to: checkpoints are removed only after a newer one has been committed. If that one is later than the rewind, the
  rewind is in it. If it is earlier, a resumed run comes to the streak again, and for that case retention protects one
  more checkpoint for each that it keeps: the target of a streak that would begin right after it.
- What is not covered: a checkpoint that is later than two successive rewinds turns out damaged, so that the run repeats
  both, while the target of the second is gone. It then goes back further if it can, and else stops with the message.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from swamla_titan.checkpoint.state import State
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World, broadcast_from_rank_0
from swamla_titan.train.bad_steps import BadSteps


class _Saved(NamedTuple):
    """A checkpoint: the step that it is of, the one that made its weights, and whether checkpoint.interval saved it."""

    step: int
    trained: int
    at_interval: bool


class Rewinding:
    """Decides which checkpoint a run goes back to, how often it may, and which ones it may still need.

    One on every rank.
    """

    def __init__(self, config: Config, checkpoints: Checkpoints, bad_steps: BadSteps, world: World) -> None:
        """If rewinds are allowed, `checkpoints` protects from here on what they may need."""
        self._most = config.fault_tolerance.max_rewinds
        self._steps = config.training.steps
        self._checkpoints, self._bad_steps, self._world = checkpoints, bad_steps, world
        self._known: dict[tuple[Path, int], _Saved | None] = {}
        self._found_none = False
        self._unsaved: int | None = None  # the first step whose weights may_mend left to a rewind
        if self._most:
            checkpoints.protected = self.protected

    def is_possible(self, step: int) -> bool:
        """Whether a streak that is full at the end of `step` may end in a rewind; as of the policy's last `read`."""
        return self._bad_steps.rewinds < self._most and not self._found_none and step < self._steps

    def report(self, target: Path, step: int) -> str:
        """The log line about the rewind that was made at the end of `step`."""
        return (
            f"rewound to the weights and optimizer of {target}; step {step + 1} continues with the next batch; "
            f"rewind {self._bad_steps.rewinds} of {self._most}"
        )

    def why_not(self) -> str:
        """Why a run stops although it was allowed to rewind, a sentence with a space behind it; else nothing."""
        if self._found_none:
            return (
                "There is no rewind, because no intact checkpoint holds weights from before those that the streak "
                "began with: lower checkpoint.interval. "
            )
        return f"All {self._most} rewinds were made. " if 0 < self._most <= self._bad_steps.rewinds else ""

    def may_mend(self, step: int) -> bool:
        """Whether weights that are not finite at the end of `step` may be kept, unsaved, until a rewind.

        A streak of bad steps leads to one soon. Without one, a single save may be skipped: if steps are good until the
        next save, in spite of such weights, there will be no streak.
        """
        if not self.is_possible(step):
            return False
        if self._bad_steps.streak:
            return True
        self._unsaved = step if self._unsaved is None else self._unsaved
        return self._unsaved == step

    def rewind(self, step: int, state: State) -> Path | None:
        """Go back from the streak that `too_many` has found at the end of `step`; returns the checkpoint, None if none.

        All ranks call this. Loads what was learned into `state`. Skips a checkpoint that does not fit, as one of
        another model, like a damaged one.
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
        """Those of `others`, newest first, that a run resumed from one of the `kept` checkpoints may go back to."""
        needed = set()
        for saved in filter(None, map(self._saved, kept)):
            needed |= {path for path, _ in islice(self._older(saved.trained, saved.step, [*kept, *others]), 1)}
        return needed

    def _older(self, trained: int, step: int, paths: Iterable[Path]) -> Iterator[tuple[Path, int]]:
        """Those saved before `step`, with weights from before those that step `trained` made, and the step that did."""
        for path in paths:
            saved = self._saved(path)
            if saved and saved.at_interval and saved.step < step and saved.trained < trained:
                yield path, saved.trained

    def _saved(self, path: Path) -> _Saved | None:
        """Read a checkpoint's steps, damaged or not; None, with one warning, if it cannot be read."""
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
