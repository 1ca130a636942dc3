"""Tables of embeddings whose steps cost by the rows looked up, not by the rows that exist.

A table's gradient is never a tensor of the table's shape. Each backward pass leaves pairs of a row and its gradient;
`RowGradient.merge` sums them by row once a step, and the optimizer gathers, moves and scatters these rows alone
(optim/row_adam.py). No operator of a step but these gathers and scatters sees the table.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local, zeros_sharded_like
from swamla_titan.kernels.host_memory import zeros_on_host
from swamla_titan.model.update_rule import UpdateRule

_ROWS_OF_A_PIECE = 1 << 18


class Segments:
    """Runs of equal keys in sorted order, without the host knowing how many there are.

    Of N keys: `keys` [N] sorted, `order` [N] where each came from, `index` [N] the number of each one's run, and
    `offsets` [N + 1] where each run begins; the offsets behind the last run are N.
    """

    def __init__(self, keys: Tensor) -> None:
        """`keys` [N], int64."""
        self.keys, self.order = keys.sort(stable=True)
        begins = torch.ones_like(self.keys, dtype=torch.bool)
        torch.ne(self.keys[1:], self.keys[:-1], out=begins[1:])
        self.index = begins.cumsum(0) - 1
        self.offsets = torch.searchsorted(self.index, torch.arange(len(keys) + 1, device=keys.device))

    def sums(self, values: Tensor) -> Tensor:
        """Values [N, width], in the order of the unsorted keys -> their sums by run [N, width], float32 or wider.

        Those behind the last run are zeros. The same bits on every call: a run is summed from its first key on.
        """
        values = values[self.order].to(torch.promote_types(values.dtype, torch.float32))
        if not len(values):
            return values
        return torch.segment_reduce(values, "sum", offsets=self.offsets, axis=0, unsafe=True, initial=0)


class Piece(NamedTuple):
    """Some of the rows [n] that a step looked up, and their gradients [n, width].

    The last row of all is repeated to the end. So what is computed of a row, and written, must be the same each time.
    `is_idle` [n, 1]: there is nothing to do, because the gradient is zero, as that of padding, or the repetition began
    in an earlier piece.
    """

    rows: Tensor
    gradients: Tensor
    is_idle: Tensor

    def stays(self, bad: Tensor | None) -> Tensor:
        """1 for each row [n, 1] that stays as it is, else 0, float32; `bad`: 1 if all do."""
        is_idle = self.is_idle.float()
        return is_idle if bad is None else torch.maximum(is_idle, bad)


class RowGradient:
    """The gradient of the rows of a table that are on this rank.

    After `merge`, and until `clear`: `segments` of the N rows as they were looked up, and `sums` [N, width] of each
    distinct row, and zeros behind the last. None where nothing was looked up.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.segments: Segments | None = None
        self.sums: Tensor | None = None

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Rows [n], int64, by their index on this rank, and the gradient [n, width] of each; rows may repeat."""
        self._pairs.append((rows, values))

    def merge(self) -> None:
        """Sum by row what was added in the micro-batches of a step; once until `clear`."""
        if not self._pairs:
            return
        assert self.sums is None, "a second merge would discard the sums of the first"
        rows, values = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*self._pairs))
        self._pairs.clear()
        self.segments = Segments(rows)
        self.sums = self.segments.sums(values)

    def pieces(self) -> Iterator[Piece]:
        """The rows that were looked up, once each, some at a time so that what is computed of them is small."""
        if self.sums is None or self.segments is None or not len(self.sums):
            return
        segments, last = self.segments, self.segments.index[-1]
        for begin in range(0, len(self.sums), _ROWS_OF_A_PIECE):
            numbers = torch.arange(begin, min(begin + _ROWS_OF_A_PIECE, len(self.sums)), device=last.device)
            numbers = torch.minimum(numbers, last)  # the host does not know how many there are
            gradients = self.sums[numbers]
            is_idle = (gradients == 0).all(dim=1, keepdim=True) | (last < begin)
            yield Piece(segments.keys[segments.offsets[numbers]], gradients, is_idle)

    def dense(self, rows: int) -> Tensor:
        """The gradient as a tensor [rows, width], of the `rows` that are on this rank."""
        assert self.sums is not None
        dense = self.sums.new_zeros(rows, self.sums.shape[1])
        for piece in self.pieces():
            dense.index_copy_(0, piece.rows, piece.gradients)
        return dense

    def clear(self) -> None:
        """Forget the gradient."""
        self._pairs.clear()
        self.segments = self.sums = None


Backward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The gradient of what was looked up [N, width] -> rows on this rank [n], and their gradients [n, width]."""


class Rows(Protocol):
    """What look-ups read on this rank."""

    def read(self, rows: Tensor) -> Tensor:
        """Rows [n], int64, by their index on this rank -> their values [n, width]."""


class LocalRows:
    """All rows are on this rank. Where ranks share them, parallel/row_tables.py gives tables another."""

    def look_up(self, held: Rows, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Backward]:
        """Those `held` on this rank, indices [N] of the whole table -> rows [N, width] of `dtype`, and the backward."""
        return held.read(indices).to(dtype), lambda gradient: (indices, gradient)


class RowTable(nn.Module):
    """`rows` embeddings, each `width` wide, of which a step looks up few.

    `weight` [rows, width] has no `.grad`: see `gradient`. A plan may replace `placement`, and give the weight a place
    with `keep_on_host`. `stand_in` may be set: what look-ups read instead of the weight.
    """

    update_rule = UpdateRule(by_rows=True, lr_multiplier=5.0, decays=False)

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.gradient = RowGradient()
        self.placement = LocalRows()
        self.stand_in: Rows | None = None
        self.returns_placeholder = False
        self._host_of: torch.device | None = None

    def keep_on_host(self, device: torch.device) -> None:
        """Let `to_empty` make the weight in the memory of the host, where `device` reads it; while it is on "meta"."""
        assert self.weight.is_meta, "the weight is somewhere else already"
        self._host_of = device

    def zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        """Zeros [rows, width], which ranks share as the weight, in the same memory."""
        if self._host_of is None:
            return zeros_sharded_like(self.weight, width, dtype)
        return zeros_sharded_like(self.weight, width, dtype, partial(zeros_on_host, device=self._host_of))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowTable":
        if self._host_of is not None and self.weight.is_meta:  # to_empty, which would fill a GPU
            return super()._apply(lambda weight: self.zeros(weight.shape[1], weight.dtype), recurse)
        return super()._apply(fn, recurse)

    def read(self, rows: Tensor) -> Tensor:
        """As in Rows: of the weight, or of what stands in for it."""
        return local(self.weight).detach()[rows] if self.stand_in is None else self.stand_in.read(rows)

    def forward(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Indices [...] int64 of rows -> [..., width] of `dtype`, None: the weight's.

        Where ranks share the table, all of them call this equally often. Indices must be below `rows`; that is not
        checked, because it would wait for the GPU.
        """
        found: Tensor = _LookUp.apply(self.weight, indices, dtype or self.weight.dtype, self)
        return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, dtype: torch.dtype, table: RowTable) -> Tensor:
        ctx.table = table
        found, ctx.rows_of = table.placement.look_up(table, indices.flatten(), dtype)
        return found.view(*indices.shape, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        table: RowTable = ctx.table
        table.gradient.add(*ctx.rows_of(gradient.flatten(0, -2)))
        weight = table.weight
        placeholder = local(weight).detach().new_zeros(()).expand(weight.shape) if table.returns_placeholder else None
        return placeholder, None, None, None


def row_tables(model: nn.Module) -> dict[nn.Parameter, RowTable]:
    """The tables of a model or a part of it, by their weights.

    Raises TypeError if two have the same weight, because each has a gradient of its own.
    """
    tables = [module for module in model.modules() if isinstance(module, RowTable)]
    found = {table.weight: table for table in tables}
    if len(found) < len(tables):
        raise TypeError("two RowTables have the same weight: look up in one RowTable twice instead")
    return found


@contextmanager
def placeholder_gradients(tables: Collection[RowTable]) -> Iterator[None]:
    """Within, look-ups return a gradient of zeros that takes no memory for the weight, and it is dropped at the end.

    torch.autograd.grad, with which split backward passes of pipelines compute the gradients of the weights, raises an
    error for a parameter that gets none. `.backward()` must not run within: it would make the zeros dense.
    """
    for table in tables:
        table.returns_placeholder = True
    try:
        yield
    finally:
        for table in tables:
            table.returns_placeholder, table.weight.grad = False, None
