"""What training changes, as tensors: made for a configuration, given to a checkpoint, filled from one."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamla_titan.checkpoint.random_state import random_state, set_random_state
from swamla_titan.checkpoint.staging import ALIGNED
from swamla_titan.checkpoint.store import Checkpoints, holds_ema, load_tensors, require_finite, tensors_of
from swamla_titan.config import Config
from swamla_titan.distributed.agreement import all_ranks_or_raise
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.optim import AveragedWeights, build_optimizer, state_bytes
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.numerics import seed_of
from swamla_titan.train.policies.bad_steps import BadSteps
from swamla_titan.train.policies.loss_scale import LossScale
from swamla_titan.train.policies.rewinding import Rewinding

logger = logging.getLogger(__name__)


class TrainingState:
    """This rank's part of model and optimizers, the average of weights, the history of bad steps, the random states.

    `bad_steps` and `rewinding` are None where bad steps are not skipped, `ema` where no average is kept, `loss_scale`
    where the loss is not scaled.
    """

    def __init__(self, config: Config, world: World, checkpoints: Checkpoints, newest: Path | None, step: int) -> None:
        """As of `step`: from the checkpoint `newest`, or without one as a run begins."""
        self._seed, self._optimizer, self._world = config.job.seed, config.optimizer, world
        self.model = ParallelModel(config, world)
        if not newest:
            self.model.init_weights(config.job.seed)
        compiled = config.compile.enabled and not config.parallel.cpu_offload
        self.optimizers = [
            build_optimizer(part, config.optimizer, world.stage_group, compiled) for part in self.model.parts
        ]
        self.ema = None
        if config.ema.decay:
            self.ema = AveragedWeights(self.model.parts, config.ema.decay, compiled)
        self.bad_steps = self.rewinding = None
        if config.fault_tolerance.skip_bad_steps:
            weights_device = torch.device("cpu") if config.parallel.cpu_offload else world.device
            self.bad_steps = BadSteps(config.fault_tolerance, weights_device, world)
            self.rewinding = Rewinding(config, checkpoints, self.bad_steps, world)
        self.loss_scale = None
        if config.float8.loss_scaling:
            self.loss_scale = LossScale(torch.device("cpu") if config.parallel.cpu_offload else world.device)
            self.model.loss_scale = self.loss_scale.value
        if newest:
            self._load(newest, step)
        elif self.ema:
            self.ema.restart()

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds: the live tensors, but copies of the random states."""
        return tensors_of(self.model.parts, self.optimizers, self.ema) | self._policies() | self._random()

    def size(self) -> int:
        """About how many bytes of them this rank holds."""
        copies = 2 if self.ema else 1
        held = [local(weight).numel() for part in self.model.parts for weight in part.parameters()]
        states = sum(state_bytes(part, self._optimizer) for part in self.model.parts)
        return sum(copies * 4 * elements + 8 * ALIGNED for elements in held) + states + (1 << 20)

    def load_into(self, path: Path, rest: dict[str, dict[str, Tensor]]) -> None:
        """Fill weights, their average, optimizer states and `rest` from a checkpoint, in place."""
        there = all_ranks_or_raise(self._world, lambda: holds_ema(path))
        ema = self.ema if there else None
        # Part by part: both ends of a tied weight go by one name, and a rank may hold the two (ZBVZeroBubble).
        for part, optimizer in zip(self.model.parts, self.optimizers):
            tensors = tensors_of([part], [optimizer], ema)
            load_tensors(path, tensors | rest, self._world)
            require_finite(path, tensors, self._world)
        if self.ema and not ema:
            self.ema.restart()
            if self._world.is_rank_0:
                logger.warning("%s holds no average of the weights: it begins with the weights themselves", path)
        if there and not self.ema and self._world.is_rank_0:
            logger.warning("%s holds an average of the weights, which ema.decay = 0 drops", path)

    def _load(self, path: Path, step: int) -> None:
        # What a rank keeps that the checkpoint has no random state for: there are more ranks now than there were.
        torch.manual_seed(seed_of(self._seed, self._world.rank, step))
        random = self._random()
        self.load_into(path, random | self._policies())
        set_random_state(random["random"], self._world.device, self._world.rank)
        if self.bad_steps:
            self.bad_steps.resume(step)

    def _policies(self) -> dict[str, dict[str, Tensor]]:
        states = {"bad_steps": self.bad_steps, "loss_scale": self.loss_scale}
        return {name: policy.state() for name, policy in states.items() if policy}

    def _random(self) -> dict[str, dict[str, Tensor]]:
        return {"random": random_state(self._world.device, self._world.rank)}
