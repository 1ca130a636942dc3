"""Metrics of a mixture: loss, tokens and epochs of each source."""

import logging
from typing import Any

import numpy as np

from swamla_titan.data import IGNORED, StepBatch
from swamla_titan.distributed.mesh import all_gather_dict
from swamla_titan.parallel.model_parts import ParallelModel, SourceLosses
from swamla_titan.system.events import record_event
from swamla_titan.train.policy import Policy, Values
from swamla_titan.train.setup import Setup

logger = logging.getLogger(__name__)


def mixture_metrics(setup: Setup, model: ParallelModel) -> list[Policy]:
    """The policy of a run with several sources, none for one source."""
    return [] if setup.corpus.order.has_one_source else [MixtureMetrics(setup, model)]


class MixtureMetrics(Policy):
    """`loss/NAME`: mean over the source's targets since the last log line; absent if there were none.

    `tokens/NAME`: trained on in all; they add up to `tokens`. `epochs/NAME`: how often the streams of the source have
    read their data, on average. A source whose first stream begins another epoch is logged, because from then on text
    is repeated.
    """

    def __init__(self, setup: Setup, model: ParallelModel) -> None:
        self._world, self._names, self._streams = setup.world, setup.corpus.names, setup.corpus.data.streams
        self._losses = model.source_losses = SourceLosses(len(self._names), model.parts, setup.world)
        start = setup.train_state
        self._start = start.source_tokens
        self._before = np.array([start.source_tokens.get(name, 0) for name in self._names])  # of all ranks
        self._tokens = np.zeros(len(self._names), dtype=np.int64)  # of this one, since this start
        self._targets = np.zeros(len(self._names), dtype=np.int64)  # since the last log line
        self._epochs: dict[int, int] = {}  # by the key of a stream that this rank reads
        self._latest = [
            max((cursor["epoch"] for key, cursor in start.cursors.items() if key // self._streams == source), default=0)
            for source in range(len(self._names))
        ]

    def take_batch(self, step: int, batch: StepBatch) -> None:
        """Count this rank's sequences."""
        assert batch.sources is not None
        self._step = step
        sources, sequences = batch.sources.numpy(), len(self._names)
        self._tokens += np.bincount(sources, minlength=sequences) * batch.tokens.shape[1]
        targets = (batch.targets.numpy() != IGNORED).sum(axis=1)
        self._targets += np.bincount(sources, targets, sequences).astype(np.int64)
        self._epochs = {key: cursor["epoch"] for key, cursor in batch.cursors.items()}

    def metrics(self) -> Values:
        """See Policy; all ranks call this."""
        losses = self._losses.take()
        every = all_gather_dict(
            self._world, {self._world.data_rank: (self._tokens, self._targets, self._epochs)}
        ).values()
        tokens = self._before + np.sum([tokens for tokens, _, _ in every], axis=0)
        targets = np.sum([targets for _, targets, _ in every], axis=0)
        self._targets = np.zeros_like(self._targets)
        epochs = {key: epoch for _, _, of_rank in every for key, epoch in of_rank.items()}
        values: Values = {}
        for source, name in enumerate(self._names):
            own = [epochs.get(source * self._streams + slot, 0) for slot in range(self._streams)]
            self._log_epoch(source, max(own))
            values |= {f"loss/{name}": losses[source] / targets[source]} if targets[source] else {}
            values |= {f"tokens/{name}": int(tokens[source]), f"epochs/{name}": sum(own) / len(own)}
        return values

    def _log_epoch(self, source: int, epoch: int) -> None:
        if epoch > self._latest[source] and self._world.is_rank_0:
            record_event("epoch", step=self._step, source=self._names[source], epoch=epoch + 1)
            logger.info(
                "data: %s begins its epoch %d: text of it that was read before is read again from here on",
                self._names[source],
                epoch + 1,
            )
        self._latest[source] = max(epoch, self._latest[source])

    def train_state(self) -> dict[str, Any]:
        """`source_tokens`; all ranks call this."""
        every = all_gather_dict(self._world, {self._world.data_rank: self._tokens}).values()
        now = dict(zip(self._names, (self._before + np.sum([*every], axis=0)).tolist()))
        return {"source_tokens": self._start | now}  # also those of sources that are gone
