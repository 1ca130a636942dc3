"""The moving average of a RowTable, which a step continues in the rows that it looks up alone.

While the weight w of a row stays as it is, the steps k + 1 to t, of decays d, move its mean from m_k to

    m_t = w + (m_k - w) d_(k+1) ... d_t

So the mean of a row is brought up to date where its weight is about to change, or is read. That is what a pass over the
table in each step would give, but for the rounding of float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from swamla_titan.distributed.dtensor import local, zeros_sharded_like
from swamla_titan.model.row_table import Piece, RowTable

_ROWS_AT_A_TIME = 1 << 20  # of a pass over all rows, which needs memory for copies of them


class RowAverage:
    """The average of one table's weight, sharded like it and in the same memory.

    `mean` is, of each row, that of the step up to which the logarithms of all decays add up to `log_decay_of_rows`
    [rows, 1]; `log_decay` is this sum up to now. Both float64.
    """

    def __init__(self, table: RowTable, lazy: bool) -> None:
        """`lazy`: the optimizer moves no rows but those looked up."""
        self._table, self._lazy = table, lazy
        weight = table.weight
        self.mean = table.zeros(weight.shape[1], torch.float32)
        self.log_decay_of_rows = zeros_sharded_like(weight, 1, torch.float64)
        self.log_decay = torch.zeros((), dtype=torch.float64, device=local(weight).device)

    def state(self, name: str) -> dict[str, Tensor]:
        """The live tensors by the name of the weight: to save, or to load into."""
        of_rows, of_steps = names_of_decays(name)
        return {name: self.mean, of_rows: self.log_decay_of_rows, of_steps: self.log_decay}

    def restart(self) -> None:
        """Begin with the weight as it is."""
        local(self.mean).copy_(local(self._table.weight))
        local(self.log_decay_of_rows).zero_()
        self.log_decay.zero_()

    def before_update(self, bad: Tensor | None) -> None:
        """Bring up to date the rows whose weights the optimizer is about to change; not where the scalar `bad` is 1."""
        gradient = self._table.gradient
        if self._lazy:
            for piece in gradient.pieces():
                self._bring_up_to_date(piece, piece.stays(bad))
        elif gradient.sums is not None:
            for rows in _blocks(local(self.mean)):
                values = self.read(rows), self.log_decay.expand(len(rows), 1)
                for held, new in zip((local(self.mean), local(self.log_decay_of_rows)), values):
                    held.index_copy_(0, rows, new if bad is None else new.where(bad == 0, held[rows]))

    def advance(self, decay: float, bad: Tensor | None) -> None:
        """Count a step of this decay, after the update; not where the scalar `bad` is 1."""
        change = math.log(decay)
        self.log_decay.add_(change if bad is None else change * (bad == 0).double())

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
        held = self._table.weight, self.mean, self.log_decay_of_rows
        weight, mean, at = (local(each).detach()[rows] for each in held)
        return up_to_date(weight, mean, at, self.log_decay)

    def _bring_up_to_date(self, piece: Piece, stays: Tensor) -> None:
        table, held, decays = self._table, local(self.mean), local(self.log_decay_of_rows)
        mean, at = table.gather(held, piece, stays), decays[piece.rows]
        new = up_to_date(table.gather(local(table.weight).detach(), piece, stays), mean, at, self.log_decay)
        table.scatter(held, piece, stays, new.where(stays == 0, mean))
        decays.index_copy_(0, piece.rows, self.log_decay.where(stays == 0, at))


def up_to_date(weight: Tensor, mean: Tensor, log_decay_of_rows: Tensor, log_decay: Tensor) -> Tensor:
    """The mean of rows [n, width] after all steps, of the `mean` and the sum [n, 1] of those up to which it is."""
    return weight + (mean - weight) * (log_decay - log_decay_of_rows).exp().to(weight.dtype)


@torch.no_grad()
def bring_up_to_date(mean: Tensor, weight: Tensor, log_decay_of_rows: Tensor, log_decay: Tensor) -> None:
    """`up_to_date` of all rows, written into `mean`; some rows at a time, so that all else may be on the host."""
    tensors = mean, weight, log_decay_of_rows
    for old, *others in zip(*(each.split(_ROWS_AT_A_TIME) for each in tensors)):
        old.copy_(up_to_date(*(each.to(old.device) for each in (others[0], old, others[1], log_decay))))


def bytes_of_decays(weight: Tensor) -> int:
    """Bytes of what a RowAverage keeps on this rank beside the mean; `weight` may be on the meta device."""
    return 8 * (len(local(weight)) + 1)


def names_of_decays(name: str) -> tuple[str, str]:
    """Under which names checkpoints keep `log_decay_of_rows` and `log_decay` of a weight's average."""
    return f"{name}.log_decay_of_rows", f"{name}.log_decay"


def _blocks(table: Tensor) -> Iterator[Tensor]:
    """All rows, some at a time."""
    for begin in range(0, len(table), _ROWS_AT_A_TIME):
        yield torch.arange(begin, min(begin + _ROWS_AT_A_TIME, len(table)), device=table.device)
