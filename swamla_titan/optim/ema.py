"""The exponential moving average of the weights, which often generalises better than the last weights.

    mean <- mean + (1 - d) (weight - mean),    d = min(decay, (1 + t) / (10 + t)) after step t,

so that the average forgets the random initial weights at any decay (as TensorFlow's ExponentialMovingAverage does).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import free_gathered_weights, local, zeros_sharded_like
from swamla_titan.model.row_table import row_tables
from swamla_titan.optim.groups import trained_parameters
from swamla_titan.optim.row_average import RowAverage, bytes_of_decays
from swamla_titan.optim.updates import fuse_elementwise, write_unless_bad


class AveragedWeights:
    """A float32 average of the parameters of a model, or of a rank's pipeline stages, sharded as they are."""

    def __init__(
        self, parts: Sequence[nn.Module], decay: float, compiled: bool = False, lazy_tables: bool = True
    ) -> None:
        """Call `restart`, or load into `of_part`, once the weights have values; `lazy_tables` as in [optimizer]."""
        self._decay = decay
        self._parts = parts
        tables = {weight: table for part in parts for weight, table in row_tables(part).items()}
        self._of_tables = {weight: RowAverage(table, lazy_tables) for weight, table in tables.items()}
        self._means: dict[nn.Parameter, Tensor] = {}
        for parameter in (parameter for part in parts for parameter in part.parameters() if parameter not in tables):
            self._means[parameter] = zeros_sharded_like(parameter, parameter.shape[-1], torch.float32)
        self._move = fuse_elementwise(_move_towards, compiled)

    def of_part(self, part: nn.Module) -> dict[str, Tensor]:
        """The averages themselves by their weights' names in the full model: to save, or to load into."""
        found: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(part):
            table = self._of_tables.get(parameter)
            found |= table.state(name) if table else {name: self._means[parameter]}
        return found

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the current weights."""
        for parameter, mean in self._means.items():
            local(mean).copy_(local(parameter))
        for table in self._of_tables.values():
            table.restart()

    @torch.no_grad()
    def before_update(self, bad: Tensor | None) -> None:
        """Before the optimizer's step: of tables, what needs the weights as they still are."""
        for table in self._of_tables.values():
            table.before_update(bad)

    @torch.no_grad()
    def update(self, step: int, bad: Tensor | None) -> None:
        """After step `step`, counted from 1, move the average towards the weights; not if the scalar `bad` is 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        share = torch.tensor(1 - decay, dtype=torch.float32)
        for parameter, mean in self._means.items():
            if local(mean).numel():
                self._move(local(mean).view(-1), local(parameter).detach().view(-1), share, bad)
        for table in self._of_tables.values():
            table.advance(decay, bad)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchange weights and averages within the context; nothing else may read either meanwhile, not even a save."""
        self._swap()
        try:
            with ExitStack() as tables:
                for table in self._of_tables.values():
                    tables.enter_context(table.in_place_of_weight())
                yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in self._means.items():
            weight, average = local(parameter).detach(), local(mean)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for part in self._parts:
            free_gathered_weights(part)  # FSDP2 may have kept them, and they are those from before the exchange


def bytes_of_average(part: nn.Module) -> int:
    """Bytes of the average of a model or a pipeline stage on this rank; its parameters may be on the meta device."""
    means = sum(4 * local(parameter).numel() for parameter in part.parameters())
    return means + sum(bytes_of_decays(weight) for weight in row_tables(part))


def _move_towards(mean: Tensor, weight: Tensor, share: Tensor, bad: Tensor | None) -> None:
    write_unless_bad(mean, mean + share * (weight - mean), bad)
