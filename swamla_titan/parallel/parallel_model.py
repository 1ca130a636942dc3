"""The model as the trainer sees it: the same few calls whatever the plan."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.config import Config
from swamla_titan.data import MicroBatch
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import clip_gradients
from swamla_titan.parallel.data_parallel import reduce_after_this_backward
from swamla_titan.parallel.parallelize import parallelize
from swamla_titan.parallel.sharded import local, shards_of, write_whole
from swamla_titan.parallel.world import World


class ParallelModel:
    """This rank's part of a model, built and laid out as the configuration says.

    `parts` are the whole model, or the pipeline stages that this rank holds.
    """

    def __init__(self, config: Config, world: World) -> None:
        """Build the parts; their parameters' values are still undefined, see `init_weights`."""
        self.config = config
        self.world = world
        with torch.device("meta"):
            self.parts = [SWAMLAModel(config.model)]
        for part in self.parts:
            parallelize(part, config, world)
            part.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)

    def init_weights(self, seed: int) -> None:
        """Draw all parameters; every rank draws whole ones and keeps its part, so nothing is communicated."""
        for part in self.parts:
            part.init_weights(seed, write_whole)

    def train_step(self, micro_batches: Sequence[MicroBatch], loss_denominator: float) -> Tensor:
        """Forward and backward passes over this rank's micro-batches; gradients are those of the global batch.

        Returns the loss of the global batch, on the device: the sum over all its targets / `loss_denominator`.
        """
        loss = torch.zeros((), device=self.world.device)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            reduce_after_this_backward(self.parts[0], last, self.config.parallel.reduce_every_micro_batch)
            part = self._loss(micro_batch, loss_denominator)
            part.backward()
            loss += part.detach()
        return self.world.sum_over_sequences(loss)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the plain cross-entropy over all targets that all ranks hold, float64, on the device."""
        for part in self.parts:
            part.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro_batch in micro_batches:
            total += self._loss(micro_batch, 1.0)
        for part in self.parts:
            part.train()
        return self.world.sum_over_sequences(total)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of at most `max_norm`; returns the norm before."""
        return clip_gradients(self._gradients(), max_norm, self._sum_over_ranks if self.world.size > 1 else None)

    def _loss(self, micro_batch: MicroBatch, denominator: float) -> Tensor:
        inputs = micro_batch.to(self.world.device)
        loss: Tensor = self.parts[0](inputs.tokens, inputs.targets, inputs.document_ids, loss_denominator=denominator)
        return loss

    def _gradients(self) -> Iterator[tuple[Tensor, float]]:
        """This rank's part of each gradient, and which share of its elements counts here: 1 / copies among the ranks."""
        holders = self.world.size / self.world.degrees.pipeline
        for part in self.parts:
            for parameter in part.parameters():
                if parameter.grad is not None:
                    yield local(parameter.grad), shards_of(parameter.grad) / holders

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value
