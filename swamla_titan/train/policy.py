"""Policies: hooks that the trainer calls around its steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from swamla_titan.data import StepBatch

Values = dict[str, float | int]
"""Metrics by name."""


class StepOutcome(NamedTuple):
    """The mean loss over the global batch's targets, the gradient norm before clipping, and the learning rate.

    Loss and norm are scalars on the device, which may still compute them.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float


class Policy:
    """Something that a run does beside its steps; a subclass overrides the hooks that it needs.

    The trainer calls each hook in the order of `Trainer.policies`. All ranks have the same policies, except for the
    metrics logger, which only rank 0 has; so its hooks must not communicate.
    """

    def begin(self, step: int) -> None:
        """The first step of this start begins, after `step` steps of earlier starts."""

    def before_step(self, step: int) -> None:
        """The batch of `step` (from 1) is about to be taken from the loader."""

    def take_batch(self, step: int, batch: StepBatch) -> None:
        """This rank's slice of the batch of `step` was read."""

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        """`step` was submitted to the device, which may still compute it."""

    def metrics(self) -> Values:
        """This policy's values for the line of a step that is logged. The device is idle."""
        return {}

    def train_state(self) -> dict[str, Any]:
        """This policy's fields of the TrainState that is about to be saved."""
        return {}

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Encloses work between steps, "validation", "checkpoint" or "rewind"; does not wait for the device."""
        yield

    def close(self, discard: bool) -> None:
        """The run ends. `discard`: without waiting for the device and without writing to the dump folder."""
