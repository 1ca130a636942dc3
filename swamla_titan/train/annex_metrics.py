"""Metrics of annexes (model/annex.py): the means of what each observed since the last log line."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.train.policy import Policy


class AnnexMetrics(Policy):
    """For each layer with an annex NAME, NAME_OBSERVED_LAYER: as engram_gate_2."""

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

    def metrics(self) -> dict[str, float | int]:
        """See Policy; all ranks call this."""
        taken = {key: annex.take_observed() for key, annex in self._annexes.items()}
        sums = [taken.get((layer, name), {}).get(observed, (0.0, 0)) for layer, name, observed in self._keys]
        total = torch.tensor(sums, dtype=torch.float64)  # [keys, sum and passes]
        if self._world.host_group is not None:
            dist.all_reduce(total, group=self._world.host_group)
        found = zip(self._keys, total.tolist())
        return {f"{name}_{observed}_{layer}": of / passes for (layer, name, observed), (of, passes) in found if passes}
