"""The exponential moving average of the weights, which often generalises better than the last weights.

    mean <- mean + (1 - d) (weight - mean),    d = min(decay, (1 + t) / (10 + t)) after step t,

so that the average forgets the random initial weights at any decay (as TensorFlow's ExponentialMovingAverage does).

Of a RowTable a step continues it in the rows that it looks up alone. While the weight w of a row stays as it is, the
steps k + 1 to t, of decays d, move its mean from m_k to

    m_t = w + (m_k - w) d_(k+1) ... d_t

So the mean of a row is brought up to date where its weight is about to change, or is read. That is what a pass over the
table in each step would give, but for the rounding of float32.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import free_gathered_weights, local, zeros_sharded_like
from swamla_titan.kernels.device import why_no_kernels
from swamla_titan.kernels.rows import average_of_rows
from swamla_titan.model.row_table import RowTable, row_tables
from swamla_titan.optim.groups import trained_parameters
from swamla_titan.optim.updates import fuse_elementwise, write_unless_bad

_ROWS_AT_A_TIME = 1 << 20  # of a pass over all rows, which needs memory for copies of them


class AveragedWeights:
    """A float32 average of the parameters of a model, or of a rank's pipeline stages, sharded as they are."""

    def __init__(
        self, parts: Sequence[nn.Module], decay: float, compiled: bool = False, lazy_tables: bool = True
    ) -> None:
        """Call `restart`, or load into `of_part`, once the weights have values; `lazy_tables` as in [optimizer]."""
        self._decay = decay
        self._parts = parts
        tables = {weight: table for part in parts for weight, table in row_tables(part).items()}
        self._of_tables = {weight: _TableAverage(table, lazy_tables) for weight, table in tables.items()}
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


class _TableAverage:
    """The average of one table's weight, sharded like it and in the same memory.

    `_mean` is, of each row, that of the step up to which the logarithms of all decays add up to `_log_decay_of_rows`
    [rows, 1]; `_log_decay` is this sum up to now. Both float64.
    """

    def __init__(self, table: RowTable, lazy: bool) -> None:
        """`lazy`: the optimizer moves no rows but those looked up."""
        self._table, self._lazy = table, lazy
        weight = table.weight
        self._mean = table.zeros(weight.shape[1], torch.float32)
        self._log_decay_of_rows = zeros_sharded_like(weight, 1, torch.float64)
        self._log_decay = torch.zeros((), dtype=torch.float64, device=local(weight).device)

    def state(self, name: str) -> dict[str, Tensor]:
        """The live tensors by the name of the weight: to save, or to load into."""
        of_rows, of_steps = names_of_decays(name)
        return {name: self._mean, of_rows: self._log_decay_of_rows, of_steps: self._log_decay}

    def restart(self) -> None:
        """Begin with the weight as it is."""
        mean, weight, of_rows = self._held()
        mean.copy_(weight)
        of_rows.zero_()
        self._log_decay.zero_()

    def before_update(self, bad: Tensor | None) -> None:
        """Bring up to date the rows whose weights the optimizer is about to change; not where the scalar `bad` is 1."""
        gradient, (mean, weight, of_rows) = self._table.gradient, self._held()
        if gradient.sums is None:
            return
        if self._lazy and not why_no_kernels(mean.device):
            average_of_rows((mean, weight, of_rows), gradient.looked_up(), self._log_decay, bad)
            return
        changing = ((each.rows, each.stays(bad)) for each in gradient.pieces()) if self._lazy else _blocks(mean, bad)
        for rows, stays in changing:
            values = self.read(rows), self._log_decay.expand(len(rows), 1)
            for held, new in zip((mean, of_rows), values):
                held.index_copy_(0, rows, new if stays is None else new.where(stays == 0, held[rows]))

    def advance(self, decay: float, bad: Tensor | None) -> None:
        """Count a step of this decay, after the update; not where the scalar `bad` is 1."""
        change = math.log(decay)
        self._log_decay.add_(change if bad is None else change * (bad == 0).double())

    @contextmanager
    def in_place_of_weight(self) -> Iterator[None]:
        """Within, look-ups read the average, of which nothing else is computed; the weight stays as it is."""
        self._table.stand_in = self
        try:
            yield
        finally:
            self._table.stand_in = None

    def read(self, rows: Tensor) -> Tensor:
        """As in model.row_table.Rows: the mean after all steps."""
        mean, weight, of_rows = (each[rows] for each in self._held())
        return up_to_date(weight, mean, of_rows, self._log_decay)

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of mean, weight and `_log_decay_of_rows`."""
        return local(self._mean), local(self._table.weight).detach(), local(self._log_decay_of_rows)


def up_to_date(weight: Tensor, mean: Tensor, log_decay_of_rows: Tensor, log_decay: Tensor) -> Tensor:
    """The mean of rows [n, width] after all steps, of the `mean` and the sum [n, 1] of those up to which it is."""
    return weight + (mean - weight) * (log_decay - log_decay_of_rows).exp().to(weight.dtype)


@torch.no_grad()
def bring_up_to_date(mean: Tensor, weight: Tensor, log_decay_of_rows: Tensor, log_decay: Tensor) -> None:
    """`up_to_date` of all rows, written into `mean`; some rows at a time, so that all else may be on the host."""
    tensors = mean, weight, log_decay_of_rows
    for old, *others in zip(*(each.split(_ROWS_AT_A_TIME) for each in tensors)):
        old.copy_(up_to_date(*(each.to(old.device) for each in (others[0], old, others[1], log_decay))))


def names_of_decays(name: str) -> tuple[str, str]:
    """Under which names checkpoints keep, of the average of a table's weight, each row's sum and that up to now."""
    return f"{name}.log_decay_of_rows", f"{name}.log_decay"


def bytes_of_average(part: nn.Module) -> int:
    """Bytes of the average of a model or a pipeline stage on this rank; its parameters may be on the meta device."""
    means = sum(4 * local(parameter).numel() for parameter in part.parameters())
    return means + sum(8 * (len(local(weight)) + 1) for weight in row_tables(part))  # with the sums of decays


def _blocks(table: Tensor, bad: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All rows, some at a time, with `bad`."""
    for begin in range(0, len(table), _ROWS_AT_A_TIME):
        yield torch.arange(begin, min(begin + _ROWS_AT_A_TIME, len(table)), device=table.device), bad


def _move_towards(mean: Tensor, weight: Tensor, share: Tensor, bad: Tensor | None) -> None:
    write_unless_bad(mean, mean + share * (weight - mean), bad)
