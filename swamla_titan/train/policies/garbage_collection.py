"""Runs Python's garbage collection at the same steps on all ranks (training.gc_interval).

A collection on one rank at a random moment would delay all ranks. Objects from before the first step, and compiled
code, are never scanned, so that even a full collection takes milliseconds.
"""

import gc

from swamla_titan.config import Config
from swamla_titan.train.policy import Policy


class GarbageCollection(Policy):
    """Collects the youngest generations every training.gc_interval steps, and all generations after a checkpoint."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._interval, self._checkpoint_interval = config.training.gc_interval, config.checkpoint.interval
        self._is_compiled = config.compile.enabled
        self._first_step = first_step

    def before_step(self, step: int) -> None:
        """Collect garbage of the step before `step`, with its checkpoint and validation."""
        if not self._interval:
            return
        before = step - 1
        if step == self._first_step:
            gc.disable()
            gc.freeze()
        elif before == self._first_step and self._is_compiled:
            gc.collect()
            gc.freeze()
        elif before % self._checkpoint_interval == 0:
            gc.collect(2)
        elif before % self._interval == 0:
            gc.collect(1)

    def close(self, discard: bool) -> None:
        """Let Python collect by itself again."""
        gc.enable()
        gc.unfreeze()
