"""Steps that go wrong in a run of the real command, on one rank of it."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from swamla_titan.data import StepBatch
from swamla_titan.distributed.dtensor import local
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.step import StepOutcome, TrainStep
from tests.distributed.job import Ended, before_step, run_and_listen

KINDS = ("nan gradient", "inf gradient", "nan loss", "nan batch", "spike", "ruin")


class Fault(NamedTuple):
    """What befalls rank `rank` alone in step `step` (from 1).

    nan, inf gradient: one element of one gradient; nan loss: the value alone, the gradients are good; nan batch: the
    loss of the first micro-batch before its backward pass (a rank without a pipeline); spike: its gradients, 1e4 fold;
    ruin: a good step, after which its weights are no numbers.
    """

    step: int
    kind: str
    rank: int = 0


def run_with_faults(faults: tuple[Fault, ...], unapplied: tuple[int, ...], config: str, *overrides: str) -> Ended:
    """Train with these faults; the optimizer is not called at all in the steps `unapplied`. Restores what it patches.

    The policy's own means play no part in leaving a step out: it is what a skipped step is compared with.
    """
    rank = int(os.environ.get("RANK", "0"))
    mine = {fault.step: fault.kind for fault in faults if fault.rank == rank}
    assert set(mine.values()) <= set(KINDS)
    current = 0
    take_step, model_step, model_loss = TrainStep.__call__, ParallelModel.train_step, ParallelModel._loss

    def train_step(self: TrainStep, batch: StepBatch, step: int) -> StepOutcome:
        nonlocal current
        current = step
        if current in unapplied:
            for optimizer in self.state.optimizers:
                optimizer.step = lambda *_: None  # type: ignore[method-assign,assignment]
        outcome = take_step(self, batch, step)
        if current in unapplied:
            for optimizer in self.state.optimizers:
                del optimizer.step
        if mine.get(current) == "ruin":
            with torch.no_grad():
                torch._foreach_mul_(
                    [local(weight) for part in self.state.model.parts for weight in part.parameters()], torch.nan
                )
        return outcome

    @torch.no_grad()
    def spoil(self: ParallelModel, micro_batches, loss_denominator: float) -> Tensor:
        with torch.enable_grad():
            loss = model_step(self, micro_batches, loss_denominator)
        kind = mine.get(current, "")
        gradients = [local(weight.grad) for part in self.parts for weight in part.parameters()]
        if kind.endswith(" gradient"):
            next(each for each in gradients if each.numel()).view(-1)[0] = float(kind.split()[0])
        elif kind == "spike":
            torch._foreach_mul_(gradients, 1e4)
        return loss * torch.nan if kind == "nan loss" else loss

    def loss_of_batch(self: ParallelModel, micro_batch, denominator: float, prepared=None) -> Tensor:
        loss = model_loss(self, micro_batch, denominator, prepared)
        return loss * torch.nan if mine.get(current) == "nan batch" and loss.requires_grad else loss

    TrainStep.__call__, ParallelModel.train_step, ParallelModel._loss = (  # type: ignore[method-assign]
        train_step,
        spoil,
        loss_of_batch,
    )
    try:
        return run_and_listen(config, *overrides)
    finally:
        TrainStep.__call__, ParallelModel.train_step, ParallelModel._loss = (  # type: ignore[method-assign]
            take_step,
            model_step,
            model_loss,
        )


def run_with_faults_and_signal(
    faults: tuple[Fault, ...], number: int, step: int, config: str, *overrides: str
) -> Ended:
    """`run_with_faults`, in a process that gets signal `number` as it begins step `step`."""
    before_step(step, lambda _: os.kill(os.getpid(), number))
    return run_with_faults(faults, (), config, *overrides)
