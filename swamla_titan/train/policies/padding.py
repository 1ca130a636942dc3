"""The metric `padding`, with data.packing = "best_fit"."""

import logging

from swamla_titan.config.sections import Data
from swamla_titan.data import IGNORED, StepBatch
from swamla_titan.distributed.mesh import World, all_gather_dict
from swamla_titan.train.policy import Policy, Values

logger = logging.getLogger(__name__)


def padding_metric(data: Data, world: World) -> list[Policy]:
    """The policy of a run whose sequences have padding, none for others."""
    return [] if data.packing == "concatenate" else [Padding(world)]


class Padding(Policy):
    """`padding`: the share of positions without a target in the sequences since the last log line."""

    def __init__(self, world: World) -> None:
        self._world, self._positions, self._padding, self._reported = world, 0, 0, False

    def take_batch(self, step: int, batch: StepBatch) -> None:
        """Count this rank's sequences."""
        self._positions += batch.targets.numel()
        self._padding += int((batch.targets == IGNORED).sum())

    def metrics(self) -> Values:
        """See Policy; all ranks call this."""
        every = all_gather_dict(self._world, {self._world.data_rank: (self._positions, self._padding)}).values()
        share = sum(padding for _, padding in every) / sum(positions for positions, _ in every)
        self._positions = self._padding = 0
        if not self._reported:
            logger.info(f"data: {share:.2%} of the positions are padding, which documents leave that are not cut")
            self._reported = True
        return {"padding": share}
