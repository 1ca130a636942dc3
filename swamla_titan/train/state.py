"""What training changes: built for a configuration, and initialized or loaded from a checkpoint."""

from pathlib import Path

import torch

from swamla_titan.checkpoint.state import OF_MODELS, Average, OptimizerStates, RandomStates, State, Weights, declared
from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World
from swamla_titan.optim import AveragedWeights, Optimizers, build_optimizer
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.bad_steps import BadSteps
from swamla_titan.train.loss_scale import LossScale
from swamla_titan.train.precision import seed_of

GROUPS = declared(*OF_MODELS.values(), BadSteps, LossScale)  # that checkpoints may hold


class RunState(State):
    """This rank's shards of model and optimizers, the average of weights, the state of policies, the random states.

    `bad_steps` is None where bad steps are not skipped, `ema` where no average is kept, `loss_scale` where the loss is
    not scaled.
    """

    def __init__(self, config: Config, world: World, newest: Path | None, step: int) -> None:
        """As of `step`: from the checkpoint `newest`, or without one as a run begins."""
        self.model = ParallelModel(config, world)
        if not newest:
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
        self.loss_scale = LossScale(weights_device) if config.float8.loss_scaling else None
        if self.loss_scale:
            self.model.loss_scale = self.loss_scale.value
        groups = (
            Weights(parts),
            OptimizerStates(parts, self.optimizers, config.optimizer),
            Average(parts, self.ema) if self.ema else None,
            self.bad_steps,
            self.loss_scale,
            RandomStates(world.device, world.rank),
        )
        super().__init__([each for each in groups if each is not None], GROUPS, world)
        if newest:
            # For a rank that the checkpoint has no random states for, because there are more ranks now.
            torch.manual_seed(seed_of(config.job.seed, world.rank, step))
            self.load(newest, step)
        else:
            self.begin()
