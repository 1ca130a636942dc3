"""Metrics of models with tables: means that annexes observe, and the share of rows that steps look up."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.optim import GroupedOptimizer
from swamla_titan.train.policy import Policy, Values
from swamla_titan.train.step import RunState


def lookup_metrics(config: ModelConfig, state: RunState, world: World) -> list[Policy]:
    """The policies of a model with tables or annexes, none for other models; all ranks call this."""
    touched = TouchedRows(state.optimizers, world)
    means = [AnnexMetrics(config, state.model.parts, world)] if annexes_of(config) else []
    return [*([touched] if touched.is_needed() else []), *means]


class AnnexMetrics(Policy):
    """Means over tokens, of each layer with an annex NAME: NAME_OBSERVED_LAYER, such as engram_gate_2."""

    def __init__(self, config: ModelConfig, parts: Sequence[SWAMLAModel], world: World) -> None:
        """`parts` are those of the model on this rank."""
        self._annexes = {key: annex for part in parts for key, annex in part.annexes.each()}
        self._keys = [
            (str(layer), name, observed)
            for layer in range(config.num_layers)
            for name, annex in annexes_of(config, layer).items()
            for observed in annex.observed
        ]
        self._world = world

    def metrics(self) -> Values:
        """See Policy; all ranks call this."""
        taken = {key: annex.take_observed() for key, annex in self._annexes.items()}
        sums = [taken.get((layer, name), {}).get(observed, (0.0, 0.0)) for layer, name, observed in self._keys]
        total = torch.tensor(sums, dtype=torch.float64)  # [keys, sum and tokens]
        if self._world.host_group is not None:
            dist.all_reduce(total, group=self._world.host_group)
        found = zip(self._keys, total.tolist())
        return {f"{name}_{observed}_{layer}": of / tokens for (layer, name, observed), (of, tokens) in found if tokens}


class TouchedRows(Policy):
    """The share of rows that any step looked up, and that the steps since the last log line did.

    It reads the optimizer's `touched`: for each row the last step that looked it up. Steps that were skipped as bad do
    not count.
    """

    def __init__(self, optimizers: Sequence[GroupedOptimizer], world: World) -> None:
        """`optimizers`: of this rank's parts of the model."""
        self._world = world
        self._states: list[Mapping[str, Tensor]] = [
            optimizer.state[weight] for optimizer in optimizers for weight in optimizer.tables
        ]
        self._since = [state["step"].clone() for state in self._states]

    def is_needed(self) -> bool:
        """Whether any rank has tables; all ranks call this."""
        return self._world.all_reduce_max(float(bool(self._states))) > 0

    def begin(self, step: int) -> None:
        """Count the steps from here on."""
        for state, since in zip(self._states, self._since):
            since.copy_(state["step"])

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """After a rewind, which restores older step counts, count from here on again."""
        yield
        if doing == "rewind":
            self.begin(0)

    def metrics(self) -> Values:
        """Both shares; waits for the device. All ranks call this."""
        counts = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        for state, since in zip(self._states, self._since):
            touched = local(state["touched"])
            rows = torch.full_like(since, touched.numel(), dtype=torch.float64)
            counts += torch.stack(((touched > 0).sum(), (touched > since).sum(), rows)).to(counts.device)
        self.begin(0)
        if self._world.size > 1:
            dist.all_reduce(counts)
        ever, lately, rows_of_all = counts.tolist()
        return {"table_rows_touched": ever / rows_of_all, "table_rows_touched_since_last_log": lately / rows_of_all}
