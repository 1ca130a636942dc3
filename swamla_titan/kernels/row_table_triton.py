"""Triton kernels of a table of embeddings: its gradient's sums by row, and Adam of the rows that a step looked up."""

from swamla_titan.kernels.triton import jit, tl


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
    length = tl.load(offsets_ptr + run + 1, mask=is_run, other=0) - begin
    column = tl.arange(0, COLUMNS)[None, :]
    kind = sums_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), kind)
    for first in range(0, tl.max(length, axis=0), AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            wanted = first + i < length
            source = tl.load(order_ptr + begin + first + i, mask=wanted, other=0)
            inside = wanted[:, None] & (column < WIDTH)
            total += tl.load(values_ptr + source[:, None] * WIDTH + column, mask=inside, other=0.0).to(kind)
    tl.store(sums_ptr + run[:, None] * WIDTH + column, total, mask=is_run[:, None] & (column < WIDTH))


@jit
def adam_of_rows(
    weight_ptr, first_ptr, second_ptr, touched_ptr, keys_ptr, offsets_ptr, last_ptr, sums_ptr, step_ptr, divisor_ptr,
    bad_ptr, correction1_ptr, correction2_ptr, factor1, factor2, lr, shrink, eps, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weight, first, second [*, WIDTH] and touched [*] move in the rows of runs 0 to `last`; sums [runs, WIDTH].

                 runs of equal keys, sorted             gradient     rows of the table
    program 0    ROWS  ->  offsets  ->  keys = row      [ WIDTH ] -> [ weight | first | second ], touched
    program 1    ROWS  ->  offsets  ->  keys = row      [ WIDTH ] -> [ weight | first | second ], touched
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

    inside = moves[:, None] & inside
    at = row[:, None] * WIDTH + column  # int64, as the keys
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    # The operations of `updates.adamw` in their order, each rounded as torch's: no approximate division, and
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
def _lerp(start, end, factor):
    """As torch.lerp, which goes from the nearer end: `factor` is the weight if that is below 0.5, else weight - 1."""
    return tl.fma(tl.zeros_like(start) + factor, end - start, tl.where(factor > 0, start, end))
