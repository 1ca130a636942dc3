"""Rewinding: after too long a row of bad steps the weights of an older checkpoint, and on with the data behind the row.

A row ends in one of two ways if it is longer than `fault_tolerance.max_bad_steps` allows. Without rewinds left the run
stops. With one left, weights, optimizer states and the window that spikes are measured by become those of a checkpoint;
step number, schedule, data and random states go on. So the batch of step n stays a function of n, and the data of the
row are passed over.

Which checkpoint: the newest one with weights older than those that the row began with. Bad steps change nothing: what
was saved within the row, or at the step before it, holds the weights that failed. Only checkpoints of
`checkpoint.interval` count, not those that a signal asked for: where a run was stopped must not change its weights.

A run that is killed and resumed comes to the same result:
- When: at the end of the step after the row is full, never earlier, whatever is logged or saved in between.
- Where to: checkpoints are deleted only after a newer one has been committed. If that one is from behind the rewind,
  the rewind is in it. If it is from before, a resumed run comes to the row again, and for that case retention spares
  one checkpoint more for each that it keeps: the one that a row just behind that would go back to.
- What is not guarded against: a checkpoint from behind two rewinds in a row turns out damaged, so that the run repeats
  both, while the target of the second is gone. It then goes back further if it can, and else stops with the message.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from swamla_titan.checkpoint.manifest import misnamed, read_manifest
from swamla_titan.checkpoint.store import CONFIG, Checkpoints, load_tensors
from swamla_titan.checkpoint.train_state import read_record
from swamla_titan.config import Config, load_config
from swamla_titan.distributed.agreement import broadcast_from_rank_0
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import Damaged, UserError
from swamla_titan.train.policies.bad_steps import BadSteps

logger = logging.getLogger(__name__)

Load = Callable[[Path, dict[str, dict[str, Tensor]]], None]


class _Saved(NamedTuple):
    """What a checkpoint says of its weights: the step after which it was saved, and the one that had made them."""

    step: int
    trained: int
    at_interval: bool


class Rewinding:
    """Which checkpoint a run goes back to, how often it may, and which ones it may still need. One on every rank."""

    def __init__(self, config: Config, checkpoints: Checkpoints, bad_steps: BadSteps, world: World) -> None:
        """With rewinds allowed, `checkpoints` keeps what they may need from here on."""
        self._most = config.fault_tolerance.max_rewinds
        self._steps = config.training.steps
        self._checkpoints, self._bad_steps, self._world = checkpoints, bad_steps, world
        self._known: dict[tuple[Path, int], _Saved | None] = {}
        self._found_none = False
        self._unsaved: int | None = None  # the first step whose weights may_mend left to a rewind
        if self._most:
            checkpoints.spared = self.spared

    def is_possible(self, step: int) -> bool:
        """Whether a row that is full at the end of `step` may end in a rewind; as of the policy's last `read`."""
        return self._bad_steps.rewinds < self._most and not self._found_none and step < self._steps

    def told(self, target: Path, step: int) -> str:
        """What a log says of the rewind that was made at the end of `step`."""
        return (
            f"rewound to the weights and optimizer of {target}; step {step + 1} goes on with the next batch; "
            f"rewind {self._bad_steps.rewinds} of {self._most}"
        )

    def why_not(self) -> str:
        """A sentence, with a space behind, for a run that stops although it was allowed to rewind; else nothing."""
        if self._found_none:
            return (
                "There is no rewind, for no whole checkpoint holds weights from before those that the row began with: "
                "lower checkpoint.interval. "
            )
        return f"All {self._most} rewinds were made. " if 0 < self._most <= self._bad_steps.rewinds else ""

    def may_mend(self, step: int) -> bool:
        """Whether weights that are no numbers at the end of `step` may be kept, unsaved, until a rewind.

        Bad steps in a row lead to one soon. With none, one save may be passed over: if steps are good by the next, with
        such weights all the same, no row will come.
        """
        if not self.is_possible(step):
            return False
        if self._bad_steps.in_row:
            return True
        self._unsaved = step if self._unsaved is None else self._unsaved
        return self._unsaved == step

    def rewind(self, step: int, load: Load) -> Path | None:
        """Go back from the row that `too_many` has found at the end of `step`; the checkpoint, None: there is none.

        All ranks come here. `load(path, rest)` fills weights, optimizer states and `rest` from a checkpoint, in place;
        one that it refuses with a UserError, as one of another model, is passed over like a damaged one.
        """
        before = self._bad_steps.trained_before_row
        for path, trained in broadcast_from_rank_0(
            self._world, lambda: list(self._older(before, step, self._checkpoints.finished()))
        ):
            if not self._checkpoints.is_whole(path):
                continue
            window = self._bad_steps.empty_window()
            try:
                load(path, {"bad_steps": window})
            except UserError as error:
                logger.warning("checkpoint passed over: %s", error)
                continue
            self._bad_steps.rewound(step, trained, window)
            self._unsaved = None
            return path
        self._found_none = True
        return None

    def spared(self, kept: Sequence[Path], others: Sequence[Path]) -> set[Path]:
        """Those of `others`, newest first, that a run resumed from one of the `kept` checkpoints may go back to."""
        needed = set()
        for saved in filter(None, map(self._saved, kept)):
            needed |= {path for path, _ in islice(self._older(saved.trained, saved.step, [*kept, *others]), 1)}
        return needed

    def _older(self, trained: int, step: int, paths: Iterable[Path]) -> Iterator[tuple[Path, int]]:
        """Those saved before `step`, with weights from before those that step `trained` made."""
        for path in paths:
            saved = self._saved(path)
            if saved and saved.at_interval and saved.step < step and saved.trained < trained:
                yield path, saved.trained

    def _saved(self, path: Path) -> _Saved | None:
        """What a checkpoint says of itself, damaged or not; None if it cannot be read, which is said once."""
        try:
            key = path, path.stat().st_ino  # a name is given anew where a damaged one is replaced
        except OSError:
            return None
        if key not in self._known:
            try:
                read_manifest(path)
                if problem := misnamed(path):
                    raise Damaged(problem)
                step = read_record(path).step
                interval = load_config(path / CONFIG).checkpoint.interval  # of the run that wrote it
                numbers = self._bad_steps.empty_counts()
                load_tensors(path, {"bad_steps": numbers})
                self._known[key] = _Saved(step, BadSteps.trained_of(numbers, step), step % interval == 0)
            except Damaged as error:
                logger.warning("checkpoint passed over: %s: %s", path, error)
                self._known[key] = None
            except (Exception, CheckpointException) as error:  # whatever a damaged pickle or zip makes its reader raise
                logger.warning("checkpoint passed over: %s cannot be read (%s)", path, error)
                self._known[key] = None
        return self._known[key]
