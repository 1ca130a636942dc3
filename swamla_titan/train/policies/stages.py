"""Begins the stages of training.stages: the shape of steps and the model's window change between two steps."""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from swamla_titan.config.schedule import TrainingStage
from swamla_titan.system.events import record_event
from swamla_titan.train.policy import Policy
from swamla_titan.train.setup import Setup

logger = logging.getLogger(__name__)


class OfStages(Protocol):
    """What depends on the shape of steps."""

    def begin_stage(self, stage: TrainingStage) -> None:
        """The next step is the first of `stage`."""


class StageChanges(Policy):
    """Begins a stage before its first step, in all `parts` that depend on the shape of steps."""

    def __init__(self, setup: Setup, parts: Sequence[OfStages]) -> None:
        """A resumed run that stands between two stages begins the second one, as if it had not been interrupted."""
        self._schedule, self._parts = setup.schedule, parts
        self._stage = self._schedule.stage(max(setup.train_state.step, 1))  # of the step before

    def before_step(self, step: int) -> None:
        """Begin the stage of `step`, if it is another than that of the step before."""
        stage = self._schedule.stage(step)
        if stage is self._stage:
            return
        self._stage = stage
        for part in self._parts:
            part.begin_stage(stage)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # memory of the sizes until now fits no tensor of the new ones
        logger.info("step %d begins stage %d: %s", step, stage.number, stage)
        record_event("stage", step=step, number=stage.number, shape=str(stage))
