"""A training step, which the trainer and benchmarks call, and the state that it changes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from swamla_titan.checkpoint.initial_load import InitialLoad
from swamla_titan.checkpoint.state import OF_MODELS, Average, OptimizerStates, RandomStates, State, Weights, declared
from swamla_titan.config import Config
from swamla_titan.config.schedule import TrainingStage
from swamla_titan.data import IGNORED, StepBatch, micro_batch_size, micro_batches
from swamla_titan.distributed.mesh import World
from swamla_titan.optim import AveragedWeights, Optimizers, build_optimizer, lr_factor
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.bad_steps import BadSteps
from swamla_titan.train.loss_scale import LossScale
from swamla_titan.train.policy import StepOutcome
from swamla_titan.train.precision import seed_of

GROUPS = declared(*OF_MODELS.values(), BadSteps, LossScale)  # that checkpoints may hold


class RunState(State):
    """The state of a run on this rank: shards of model and optimizers, average of weights, policies, random states.

    `bad_steps` is None where bad steps are not skipped, `ema` where no average is kept. `policies` are those whose
    state is part of it.
    """

    def __init__(
        self, config: Config, world: World, newest: Path | None, step: int, initial: InitialLoad | None = None
    ) -> None:
        """As of `step`: from the checkpoint `newest`, or without one as a run begins, with what `initial` has."""
        self.model = ParallelModel(config, world)
        if not newest and not initial:
            self.model.init_weights(config.job.seed)
        parts = self.model.parts
        compiled = config.compile.enabled and not config.parallel.cpu_offload
        self.optimizers = Optimizers(
            build_optimizer(part, config.optimizer, world.stage_group, compiled) for part in parts
        )
        lazy = config.optimizer.lazy_tables
        self.ema = AveragedWeights(parts, config.ema.decay, compiled, lazy) if config.ema.decay else None
        weights_device = torch.device("cpu") if config.parallel.cpu_offload else world.device
        skips = config.fault_tolerance.skip_bad_steps
        self.bad_steps = BadSteps(config.fault_tolerance, weights_device, world) if skips else None
        self.policies = [LossScale(weights_device)] if config.float8.loss_scaling else []
        for scaling in self.policies:
            self.model.loss_scaling = scaling
        groups = (
            Weights(parts),
            OptimizerStates(parts, self.optimizers, config.optimizer),
            Average(parts, self.ema) if self.ema else None,
            self.bad_steps,
            *self.policies,
            RandomStates(world.device, world.rank),
        )
        super().__init__([each for each in groups if each is not None], GROUPS, world)
        if newest:
            # For a rank that the checkpoint has no random states for, because there are more ranks now.
            torch.manual_seed(seed_of(config.job.seed, world.rank, step))
            self.load(newest, step)
        elif initial:
            self.load_learned(initial.path, {}, initial.groups)
        else:
            self.begin()


def micro_batch_size_of(stage: TrainingStage, world: World) -> int:
    """Sequences of a rank's micro-batch in the steps of `stage`."""
    training = stage.training
    return micro_batch_size(training.local_batch_size, training.global_batch_size, world.degrees.data)


class TrainStep:
    """Takes a step: updates the weights of `state` by one global batch, of which this rank reads its slice.

    The host does not wait for the device. A step that is bad by its loss or gradient norm changes neither weights nor
    optimizer states, see bad_steps.py.
    """

    def __init__(
        self, stage: TrainingStage, world: World, state: RunState, before_update: Callable[[], None] = lambda: None
    ) -> None:
        """Begin with the steps of `stage`.

        `before_update` is called before weights and states change, because a checkpoint may still copy them.
        """
        self.world, self.state, self.before_update = world, state, before_update
        self.begin_stage(stage)

    def begin_stage(self, stage: TrainingStage) -> None:
        """Take the steps of `stage` from now on."""
        self.config, self.targets = stage.config, stage.tokens_per_step
        self.micro_batch_size = micro_batch_size_of(stage, self.world)
        self.state.model.begin_stage(stage.config)

    def __call__(self, batch: StepBatch, step: int) -> StepOutcome:
        """Take step number `step` (from 1); all ranks call this."""
        return self.update(self.forward_backward(batch), step)

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Compute the gradients of the global batch's mean loss; returns this loss."""
        count = -(-batch.largest // self.micro_batch_size)
        # Sums over the global count of targets give the mean, however ranks and micro-batches divide the batch.
        return self.state.model.train_step(
            list(micro_batches(batch, self.micro_batch_size, count)), self._targets(batch)
        )

    def _targets(self, batch: StepBatch) -> Tensor | float:
        """The number of targets in the global batch: a scalar on the device where there is padding."""
        if self.config.data.packing == "concatenate":
            return self.targets
        own = torch.full((), float((batch.targets != IGNORED).sum()), device=self.world.device)
        return self.world.all_reduce_loss(own) / self.world.degrees.context  # whose ranks have the same sequences

    def update(self, loss: Tensor, step: int) -> StepOutcome:
        """Apply the gradients in step number `step`, unless it is bad."""
        training, state = self.config.training, self.state
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_schedule, step - 1, training.steps)
        grad_norm = state.model.gradient_norm()
        self.before_update()
        is_bad = state.bad_steps.judge(step, loss, grad_norm) if state.bad_steps else None
        if state.ema:
            state.ema.before_update(is_bad)
        state.optimizers.step(lr, grad_norm, training.max_grad_norm, is_bad)
        if state.ema:
            state.ema.update(step, is_bad)
        return StepOutcome(loss, grad_norm, lr)
