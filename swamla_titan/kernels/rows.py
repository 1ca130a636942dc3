"""Rows of tables of embeddings: gradients summed by row, rows copied, and those that a step looked up moved.

On a GPU by Triton kernels, elsewhere by torch's operators.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.kernels.device import power_of_two, why_no_kernels
from swamla_titan.kernels.triton import jit, tl

_VALUES_AT_ONCE = 4  # of a run, in the kernel that sums them
# Rows of a tile that is copied, and programs that together have some 100 KB under way: what PCIe carries in the 2 us of
# an answer.
_ROWS, _PROGRAMS_BESIDE_OTHERS = 16, 32
_MOST_ELEMENTS = 1 << 14  # of that tile, so that wide rows fit in registers


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
        dtype = torch.promote_types(values.dtype, torch.float32)
        if not len(values):
            return values.to(dtype)
        if not why_no_kernels(values.device):
            return self._sums_by_kernel(values.contiguous(), dtype)
        values = values[self.order].to(dtype)
        return torch.segment_reduce(values, "sum", offsets=self.offsets, axis=0, unsafe=True, initial=0)

    def _sums_by_kernel(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        runs, width = len(self.offsets) - 1, values.shape[1]
        sums, tile = values.new_empty(runs, width, dtype=dtype), _tile(width)
        if runs:
            with torch.cuda.device_of(values):  # Triton launches on the current one
                sum_runs[(-(-runs // tile["ROWS"]),)](
                    values, self.order, self.offsets, sums, runs, **tile, AT_ONCE=_VALUES_AT_ONCE
                )
        return sums

    def runs(self) -> Tensor:
        """The number of each key's run [N], in the order of the unsorted keys."""
        runs = torch.empty_like(self.index)
        runs[self.order] = self.index
        return runs

    def of_kinds(self, keys: Sequence[int], runs: Sequence[int]) -> Iterator["Segments"]:
        """Where keys of several kinds were concatenated, each kind's larger than those before: the segments of each.

        `keys` and `runs` are how many there are of each kind; `offsets` then has no more than the end of the last run.
        """
        key = run = 0
        for of_kind, runs_of_kind in zip(keys, runs, strict=True):
            part = Segments.__new__(Segments)
            at = slice(key, key + of_kind)
            part.keys, part.order, part.index = self.keys[at], self.order[at] - key, self.index[at] - run
            part.offsets = self.offsets[run : run + runs_of_kind + 1] - key
            key, run = key + of_kind, run + runs_of_kind
            yield part


class LookedUp(NamedTuple):
    """The rows that a step looked up, once each, as run i of the sorted `keys` [N] from `offsets` [N + 1] on.

    `last` is the number of the last run, and `sums` [N, width] are the gradients, zeros behind it.
    """

    keys: Tensor
    offsets: Tensor
    last: Tensor
    sums: Tensor


def rows_as(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`table[rows].to(dtype)`, of a contiguous table of a GPU in one pass; rows do not count from the end."""
    if _is_for_operators(table) or not table.is_contiguous():
        return table[rows].to(dtype)
    values = table.new_empty(len(rows), table.shape[1], dtype=dtype)
    _copy(table, rows, values)
    return values


def copy_rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]`, by few programs: as many as keep PCIe busy, and no more, because others compute meanwhile."""
    if _is_for_operators(table):
        return table[rows]
    values = table.new_empty(len(rows), table.shape[1])
    _copy(table, rows, values, programs=_PROGRAMS_BESIDE_OTHERS)
    return values


def copy_rows_again(values: Tensor, table: Tensor, rows: Tensor, touched: Tensor, since: Tensor) -> None:
    """Write `table[rows]` into `values` where a row's `touched` [*, 1], int32, is at least the scalar `since`.

    Of other rows nothing is read from the table.
    """
    if _is_for_operators(table):
        values.copy_(torch.where(touched[rows] >= since, table[rows], values))
    else:
        _copy(table, rows, values, (touched, since))


def _is_for_operators(table: Tensor) -> bool:
    """Whether torch's operators copy the table's rows, because there are none, or no Triton for its device."""
    return not table.numel() or bool(why_no_kernels(table.device))


def _copy(
    table: Tensor,
    rows: Tensor,
    values: Tensor,
    changed: tuple[Tensor, Tensor] | None = None,
    programs: int | None = None,
) -> None:
    """`changed`: `touched` and `since` as of `copy_rows_again`; None: all rows are copied."""
    assert table.is_contiguous(), "rows lie one behind the other"
    if len(rows):
        tile = _tile(table.shape[1], _MOST_ELEMENTS, _ROWS)
        given = table, rows.contiguous(), values.contiguous(), *(changed or (rows, rows)), len(rows)
        with torch.cuda.device_of(table):  # Triton launches on the current one
            grid = (programs or -(-len(rows) // tile["ROWS"]),)
            read_rows[grid](*given, **tile, CHANGED=changed is not None)


def adam_of_rows(
    held: Sequence[Tensor],
    looked_up: LookedUp,
    step: Tensor,
    divisor: Tensor | None,
    bad: Tensor | None,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
) -> None:
    """Move the rows that were looked up, unless their gradient is zero, as `adamw` does (optim/updates.py; CUDA).

    `held`: weight and moments [rows, width], float32, and `touched` [rows, 1], int32, which becomes `step` in the rows
    that move; in the memory of the GPU or of the host. Operations are those of `adamw` in the same order, each rounded
    to the nearest.
    """
    divisor = step.new_ones(()) if divisor is None else divisor
    of_step = step, divisor, 1 - beta1**step, (1 - beta2**step).sqrt()
    factors = _lerp_factor(1 - beta1), _lerp_factor(1 - beta2), lr.item(), (lr * weight_decay).item(), eps
    _launch_of_rows(move_by_adam, held, looked_up, bad, *of_step, *factors)


def average_of_rows(held: Sequence[Tensor], looked_up: LookedUp, log_decay: Tensor, bad: Tensor | None) -> None:
    """Bring the means of the rows that `adam_of_rows` would move up to date, as `up_to_date` does (optim/ema.py; CUDA).

    `held`: mean and weight [rows, width], float32, and the sum of the logarithms of decays [rows, 1] up to which each
    mean is, float64, which becomes the scalar `log_decay`.
    """
    _launch_of_rows(move_averages, held, looked_up, bad, log_decay)


def _launch_of_rows(
    kernel: Any, held: Sequence[Tensor], looked_up: LookedUp, bad: Tensor | None, *rest: Tensor | float
) -> None:
    """A kernel that moves rows of the tensors `held`, unless the scalar `bad` is 1."""
    assert all(each.is_contiguous() for each in held), "rows lie one behind the other"
    runs, width = looked_up.sums.shape
    if runs:
        tile = _tile(width)
        bad = looked_up.sums.new_zeros(()) if bad is None else bad
        with torch.cuda.device_of(looked_up.sums):  # Triton launches on the current one
            grid = (-(-runs // tile["ROWS"]),)
            kernel[grid](*held, *looked_up, bad, *rest, **tile, enable_fp_fusion=False)


def _tile(width: int, elements: int = 1024, most: int = 1024) -> dict[str, int]:
    """The constants of a kernel whose programs take some rows of a table each: about so many elements."""
    columns = power_of_two(width)
    return {"WIDTH": width, "COLUMNS": columns, "ROWS": min(max(elements // columns, 1), most)}


def _lerp_factor(weight: float) -> float:
    """What torch.lerp multiplies by, from the nearer end."""
    return weight if weight < 0.5 else torch.tensor(weight, dtype=torch.float32).sub(1).item()


@jit
def sum_runs(
    values_ptr, order_ptr, offsets_ptr, sums_ptr, runs, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """values [*, WIDTH] -> their sums by run of equal keys [runs, WIDTH], of the dtype of the sums.

                 runs of equal keys, sorted            order, value after value         sums
    program 0    ROWS  ->  offsets, of each and next   [ WIDTH ] + [ WIDTH ] + ...  ->  ROWS of [ WIDTH ]
    program 1    ROWS  ->  offsets, of each and next   [ WIDTH ] + [ WIDTH ] + ...  ->  ROWS of [ WIDTH ]

    Each run is summed from its first value on, so a sum's bits depend on nothing else. AT_ONCE values of each run are
    loaded before they are added, because one load waits some hundred times as long as one addition.
    COLUMNS is the power of two from WIDTH on.
    """
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_run = run < runs
    begin = tl.load(offsets_ptr + run, mask=is_run, other=0)
    length = tl.load(offsets_ptr + run + 1, mask=is_run, other=0) - begin  # 0 behind the last run
    column = tl.arange(0, COLUMNS)[None, :]
    kind = sums_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), kind)
    # As many rounds as the longest of the program's runs has; shorter ones add zeros, which change no bit of a sum.
    for first in range(0, tl.max(length, axis=0), AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # unrolled, so that all of its loads are under way before the first addition
            wanted = first + i < length
            source = tl.load(order_ptr + begin + first + i, mask=wanted, other=0)
            inside = wanted[:, None] & (column < WIDTH)
            total += tl.load(values_ptr + source[:, None] * WIDTH + column, mask=inside, other=0.0).to(kind)
    tl.store(sums_ptr + run[:, None] * WIDTH + column, total, mask=is_run[:, None] & (column < WIDTH))


@jit
def read_rows(
    table_ptr, rows_ptr, values_ptr, touched_ptr, since_ptr, number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, CHANGED: tl.constexpr,
):  # fmt: skip
    """table [*, WIDTH] at rows [number] -> values [number, WIDTH], rounded to their dtype.

                 rows          table                          values
    program 0    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 0
    program 1    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 1
    program 0    ROWS   ->    ...                                                   tile 2, if there are 2 programs

    CHANGED: only rows whose touched [*] is at least `since`; of others neither table nor values are read or written.
    COLUMNS is the power of two from WIDTH on.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    # Programs take several tiles each, because few of them may run beside other kernels.
    for tile in range(tl.program_id(0), tl.cdiv(number, ROWS), tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        wanted = at < number
        row = tl.load(rows_ptr + at, mask=wanted, other=0)
        if CHANGED:
            wanted = wanted & (tl.load(touched_ptr + row, mask=wanted, other=0) >= tl.load(since_ptr).to(tl.int32))
        inside = wanted[:, None] & (column < WIDTH)
        values = tl.load(table_ptr + row[:, None] * WIDTH + column, mask=inside, other=0.0)
        tl.store(values_ptr + at.to(tl.int64)[:, None] * WIDTH + column, values, mask=inside)


@jit
def _rows_that_move(
    keys_ptr, offsets_ptr, last_ptr, sums_ptr, bad_ptr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a program's runs: the rows, and which move; where their values lie in the table, and which; and gradients.

                 runs of equal keys, sorted             gradient     rows of the table
    program 0    ROWS  ->  offsets  ->  keys = row      [ WIDTH ] -> [ WIDTH ] of each tensor
    program 1    ROWS  ->  offsets  ->  keys = row      [ WIDTH ] -> [ WIDTH ] of each tensor
    ...          behind `last`: nothing

    A row is that of one run, so no two programs write to one. Of rows that stay, because the gradient is zero or the
    step is bad, nothing is read or written. COLUMNS is the power of two from WIDTH on.
    """
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    moves = run <= tl.where(tl.load(bad_ptr) == 0, tl.load(last_ptr), -1)
    row = tl.load(keys_ptr + tl.load(offsets_ptr + run, mask=moves, other=0), mask=moves, other=0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = moves[:, None] & (column < WIDTH)
    gradient = tl.load(sums_ptr + run[:, None] * WIDTH + column, mask=inside, other=0.0)
    moves = moves & (tl.max((gradient != 0).to(tl.int32), axis=1) != 0)  # a NaN is not zero
    return row, moves, row[:, None] * WIDTH + column, moves[:, None] & inside, gradient  # int64, as the keys


@jit
def move_by_adam(
    weight_ptr, first_ptr, second_ptr, touched_ptr, keys_ptr, offsets_ptr, last_ptr, sums_ptr, bad_ptr, step_ptr,
    divisor_ptr, correction1_ptr, correction2_ptr, factor1, factor2, lr, shrink, eps, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weight, first, second [*, WIDTH] and touched [*] move in the rows of runs 0 to `last`; sums [runs, WIDTH].

    program 0    ROWS of sums [ WIDTH ]  ->  their rows of [ weight | first | second ], touched
    program 1    ROWS of sums [ WIDTH ]  ->  their rows of [ weight | first | second ], touched
    """
    row, moves, at, inside, gradient = _rows_that_move(
        keys_ptr, offsets_ptr, last_ptr, sums_ptr, bad_ptr, WIDTH, COLUMNS, ROWS
    )
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    # The operations of `adamw` in their order, each rounded as torch's: no approximate division, and
    # multiplications are fused with additions in lerp alone.
    gradient = tl.div_rn(gradient, tl.load(divisor_ptr))
    first = _lerp(first, gradient, factor1)
    second = _lerp(second, gradient * gradient, factor2)
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.load(correction2_ptr)) + eps
    update = tl.div_rn(lr * tl.div_rn(first, tl.load(correction1_ptr)), denominator)
    tl.store(weight_ptr + at, (weight - shrink * weight) - update, mask=inside)
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(touched_ptr + row, tl.load(step_ptr).to(tl.int32), mask=moves)


@jit
def move_averages(
    mean_ptr, weight_ptr, log_decays_ptr, keys_ptr, offsets_ptr, last_ptr, sums_ptr, bad_ptr, log_decay_ptr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """mean [*, WIDTH] in the rows of runs 0 to `last` goes towards weight [*, WIDTH]; log_decays [*] are float64.

    program 0    ROWS of log_decays, [ mean | weight ]  ->  the same rows of [ mean ], log_decays
    program 1    ROWS of log_decays, [ mean | weight ]  ->  the same rows of [ mean ], log_decays
    """
    row, moves, at, inside, _ = _rows_that_move(
        keys_ptr, offsets_ptr, last_ptr, sums_ptr, bad_ptr, WIDTH, COLUMNS, ROWS
    )
    log_decay = tl.load(log_decay_ptr)
    before = tl.load(log_decays_ptr + row, mask=moves, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    share = tl.exp(log_decay - before).to(tl.float32)[:, None]  # that is left of the mean
    tl.store(mean_ptr + at, weight + (mean - weight) * share, mask=inside)
    tl.store(log_decays_ptr + row, tl.zeros_like(before) + log_decay, mask=moves)


@jit
def _lerp(start, end, factor):
    """As torch.lerp, which goes from the nearer end: `factor` is the weight if that is below 0.5, else weight - 1."""
    return tl.fma(tl.zeros_like(start) + factor, end - start, tl.where(factor > 0, start, end))
