"""Tables of embeddings whose steps cost by the rows looked up, not by the rows that exist.

A table's gradient is never a tensor of the table's shape. Each backward pass leaves pairs of a row and its gradient;
`RowGradient.merge` sums them by row once a step, and the optimizer gathers, moves and scatters these rows alone
(optim/rules.py), on a GPU in one kernel (kernels/rows.py). Nothing else of a step sees the table.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local, zeros_sharded_like
from swamla_titan.kernels.device import hand_over, on_stream, side_stream
from swamla_titan.kernels.host_memory import zeros_on_host
from swamla_titan.kernels.rows import LookedUp, Segments, copy_rows, copy_rows_again, rows_as
from swamla_titan.model.layers import UpdateRule

_ROWS_OF_A_PIECE = 1 << 18


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

    def looked_up(self) -> LookedUp:
        """The rows that were looked up, for kernels."""
        assert self.segments is not None
        assert self.sums is not None
        return LookedUp(self.segments.keys, self.segments.offsets, self.segments.index[-1:], self.sums)

    def pieces(self) -> Iterator[Piece]:
        """The same, once each, some at a time so that what is computed of them is small."""
        if self.sums is None:
            return
        keys, offsets, last, sums = self.looked_up()
        for begin in range(0, len(sums), _ROWS_OF_A_PIECE):
            numbers = torch.arange(begin, min(begin + _ROWS_OF_A_PIECE, len(sums)), device=last.device)
            numbers = torch.minimum(numbers, last)  # the host does not know how many there are
            gradients = sums[numbers]
            is_idle = (gradients == 0).all(dim=1, keepdim=True) | (last < begin)
            yield Piece(keys[offsets[numbers]], gradients, is_idle)

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


class Rows(Protocol):
    """What look-ups read on this rank."""

    def read(self, rows: Tensor) -> Tensor:
        """Rows [n], int64, by their index on this rank -> their values [n, width]."""


class ReadAhead(NamedTuple):
    """Rows [n, width] that are read while updates of them may still be queued, or under way.

    `since`: the number of the last step that was counted when reading began. What it and later steps change is read
    again when the rows are looked up: a step is counted before it has written its rows. `generation`: how often the
    table had been `rewritten`.
    """

    values: Tensor
    since: Tensor
    generation: int


class RowSteps(NamedTuple):
    """The number of the step that last changed each row on this rank [rows, 1], int32, and that of the last step."""

    of_rows: Tensor
    last: Tensor


class RowRequest:
    """Which rows of some tables are looked up, known before any is read; here all of them are on this rank.

    It depends on the indices alone, so it may be made before the optimizer step that the rows still wait for.
    """

    def __init__(self, indices: Sequence[Tensor]) -> None:
        """`indices` [...] int64 of the rows of each table."""
        self.shapes = [each.shape for each in indices]
        self._indices = [each.flatten() for each in indices]
        self._ahead: list[ReadAhead | None] = []

    def read_ahead(self, tables: Sequence["RowTable"]) -> list[Tensor]:
        """Begin to read the rows of tables that lie elsewhere; what is being read. `tables` are those looked up in."""
        self._ahead = [table.read_ahead(rows) for table, rows in zip(tables, self.rows(), strict=True)]
        return [tensor for each in self._ahead if each for tensor in (each.values, each.since)]

    def read(self, tables: Sequence["RowTable"], dtype: torch.dtype) -> list[Tensor]:
        """Of each table the values [n, width] of its `rows`, of `dtype`."""
        ahead, self._ahead = self._ahead or [None] * len(tables), []  # which would be kept for the backward pass
        return [table.read(rows, dtype, early) for table, rows, early in zip(tables, self.rows(), ahead, strict=True)]

    def rows(self) -> list[Tensor]:
        """Of each table the rows [n] that are to be read on this rank, by their index there; they may repeat."""
        return self._indices

    def returned(self, read: list[Tensor]) -> list[Tensor]:
        """What was read of each table's `rows` [n, width] -> what its indices look up [N, width]."""
        return read

    def summed(self, table: int, gradient: Tensor) -> Tensor:
        """The gradient of what the indices of table number `table` looked up [N, width] -> of its `rows` [n, width]."""
        return gradient


class LocalRows:
    """The placement of tables that have all rows on this rank. Ranks that share rows: parallel/row_tables.py."""

    def __init__(self, ahead_on: torch.device | None = None) -> None:
        """`ahead_on`: the device on which requests are prepared beside what it computes; None: in line with it."""
        self._stream = None if ahead_on is None else side_stream(ahead_on)

    def request(self, sizes: Sequence[int], indices: Sequence[Tensor]) -> RowRequest:
        """The look-up of `indices` in tables of so many rows."""
        return RowRequest(indices)

    def ahead(self) -> AbstractContextManager[object]:
        """Within, what is queued for the device waits for nothing that was queued before, if a request needs that."""
        return on_stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Let what is queued from now on use tensors that were made within `ahead`."""
        hand_over(self._stream, tensors)

    def catch_up(self) -> None:
        """Let what is queued within `ahead` from now on wait, once, for what was queued before."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


_ON_THIS_RANK = LocalRows()


class RowTable(nn.Module):
    """`rows` embeddings, each `width` wide, of which a step looks up few.

    `weight` [rows, width] has no `.grad`: see `gradient`. A plan may replace `placement`, and keep the weight in the
    memory of the host (`keep_on_host`). Two attributes may be set: `stand_in`, what look-ups read instead of the
    weight; and by its optimizer `steps`, without which no rows are read ahead.
    """

    update_rule = UpdateRule(by_rows=True, lr_multiplier=5.0, decays=False)

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.gradient = RowGradient()
        self.placement = _ON_THIS_RANK
        self.stand_in: Rows | None = None
        self.steps: RowSteps | None = None
        self.returns_placeholder = False
        self._host_of: torch.device | None = None
        self._generation = 0  # how often `rewritten` was called

    def keep_on_host(self, device: torch.device) -> None:
        """Let `to_empty` make the weight in the memory of the host, where `device` reads it; while it is on "meta".

        There it stays, in its dtype, whatever `to` is called with later: rows are rounded when they are read.
        """
        assert self.weight.is_meta, "the weight is somewhere else already"
        self._host_of = device

    def zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        """Zeros [rows, width], which ranks share as the weight, in the same memory."""
        if self._host_of is None:
            return zeros_sharded_like(self.weight, width, dtype)
        return zeros_sharded_like(self.weight, width, dtype, partial(zeros_on_host, device=self._host_of))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowTable":
        if self._host_of is None:
            return super()._apply(fn, recurse)
        if self.weight.is_meta:  # to_empty, which would fill a GPU, as would copies of what is there
            return super()._apply(lambda weight: self.zeros(weight.shape[1], weight.dtype), recurse)
        return self

    def rewritten(self) -> None:
        """To be called when the weight or `steps` were written by anything but optimizer steps, as from a checkpoint.

        What was read ahead before is then not used, because `steps` may not know what has changed; and reading ahead
        waits for what was queued before this call, as it does not otherwise.
        """
        self._generation += 1
        self.placement.catch_up()

    def read_ahead(self, rows: Tensor) -> ReadAhead | None:
        """Begin to read rows from the memory of the host; None where the device has them, or reads something else."""
        if self._host_of is None or self.steps is None or self.stand_in is not None:
            return None
        since = self.steps.last.clone()  # before any row is read
        return ReadAhead(copy_rows(local(self.weight).detach(), rows), since, self._generation)

    def read(self, rows: Tensor, dtype: torch.dtype, ahead: ReadAhead | None = None) -> Tensor:
        """The values [n, width] of rows [n], int64, of the weight, or of what stands in for it.

        `ahead`: what `read_ahead` gave for these rows.
        """
        if self.stand_in is not None:
            return self.stand_in.read(rows).to(dtype)
        weight = local(self.weight).detach()
        if ahead is None or self.steps is None or ahead.generation != self._generation:
            return rows_as(weight, rows, dtype)
        copy_rows_again(ahead.values, weight, rows, self.steps.of_rows, ahead.since)
        return ahead.values.to(dtype)

    def forward(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Indices [...] int64 of rows -> [..., width] of `dtype`, None: the weight's.

        Where ranks share the table, all of them call this equally often. Indices must be below `rows`; that is not
        checked, because it would wait for the GPU.
        """
        return look_up([self], request_rows([self], [indices]), dtype or self.weight.dtype)[0]


def request_rows(tables: Sequence[RowTable], indices: Sequence[Tensor]) -> RowRequest:
    """The look-up of `indices` [...] in each of `tables`, which are placed together."""
    placement = tables[0].placement
    assert all(table.placement is placement for table in tables), "one request goes to one placement"
    return placement.request([len(table.weight) for table in tables], indices)


def look_up(tables: Sequence[RowTable], request: RowRequest, dtype: torch.dtype) -> list[Tensor]:
    """What the indices of `request` look up in each table, [..., width] of `dtype`.

    Where ranks share the tables, all of them call this equally often.
    """
    found = request.returned(request.read(tables, dtype))
    return [_LookUp.apply(table.weight, table, request, number, found) for number, table in enumerate(tables)]


class _LookUp(torch.autograd.Function):
    """The gradient of one table's rows, so that each is exchanged as soon as it is there.

    Not of all tables together: torch splits a pipeline's backward pass by nodes of the graph, and one node above
    several layers would have it compute these layers again.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, table: RowTable, request: RowRequest, number: int, found: list[Tensor]
    ) -> Tensor:
        ctx.table, ctx.request, ctx.number = table, request, number
        return found[number].view(*request.shapes[number], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        table, request, number = ctx.table, ctx.request, ctx.number
        table.gradient.add(request.rows()[number], request.summed(number, gradient.flatten(0, -2)))
        weight = table.weight
        placeholder = local(weight).detach().new_zeros(()).expand(weight.shape) if table.returns_placeholder else None
        return placeholder, None, None, None, None


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
