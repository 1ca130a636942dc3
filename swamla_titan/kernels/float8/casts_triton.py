"""Triton kernels that cast to float8 what they compute, in both layouts that products need, in one pass over memory.

A product in float8 reads both its factors along the axis that is summed over, so what takes part in two products is
needed row by row and column by column. Each program computes a tile, and writes it once as it is and once transposed
(through shared memory, so that both are written in whole sectors). `scale_ptr` holds one float32, a power of two: what
a quantized 1 stands for. float8 conversions of a GPU saturate, but nothing here is larger than the largest number.
"""

import triton
import triton.language as tl


@triton.jit
def _quantized(values, scale_ptr, out_ptr):
    # Volatile, so that the two layouts share no conversion: ptxas 12.8 loses half of those that are stored both as they
    # are and, byte by byte, transposed, as those of float32 are. It reads registers that nothing has written instead.
    # 0 of what holds an infinity, so that infinity becomes NaN and is seen in whatever is computed of it.
    return (values * (1.0 / tl.load(scale_ptr, volatile=True))).to(out_ptr.dtype.element_ty)


@triton.jit
def _store_both(
    values, scale_ptr, rows_ptr, columns_ptr, row, column, rows, columns,
    ROWS_WANTED: tl.constexpr, COLUMNS_WANTED: tl.constexpr,
):  # fmt: skip
    """values [R, C] in float32 to [rows, columns] and [columns, rows], at `row` [R] and `column` [C]."""
    far_row, far_column = row.to(tl.int64), column.to(tl.int64)
    if ROWS_WANTED:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = far_row[:, None] * columns + column[None, :]
        tl.store(rows_ptr + at, _quantized(values, scale_ptr, rows_ptr), mask=inside)
    if COLUMNS_WANTED:
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        at = far_column[:, None] * rows + row[None, :]
        tl.store(columns_ptr + at, tl.trans(_quantized(values, scale_ptr, columns_ptr)), mask=inside)


@triton.jit
def _place(R: tl.constexpr, C: tl.constexpr):
    return tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)


@triton.jit
def _gate_column(GROUP: tl.constexpr, C: tl.constexpr):
    """Where the gates of this program's hidden units lie; their ups follow GROUP later."""
    parts: tl.constexpr = GROUP // C
    tile = tl.program_id(0)
    # Written so that the compiler sees the multiples of C in it: it then reads 16 bytes at a time.
    return tile // parts * (2 * GROUP) + tile % parts * C + tl.arange(0, C)


@triton.jit
def _tile(x_ptr, row, column, rows, stride, end):
    """[R, C] of a matrix whose rows are `stride` apart, zeros from row `rows` and column `end` on, in float32."""
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < rows)[:, None] & (column < end)[None, :]
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, TO_BFLOAT16: tl.constexpr):
    """As bfloat16 would hold it."""
    if TO_BFLOAT16:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def float8_cast(
    x_ptr, scale_ptr, rows_ptr, columns_ptr, after_ptr, rows, columns,
    TO_BFLOAT16: tl.constexpr, ROWS_WANTED: tl.constexpr, COLUMNS_WANTED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x [rows, columns]; grid (tiles of columns, tiles of rows). Nothing is read at `after_ptr`."""
    row, column = _place(R, C)
    x = _rounded(_tile(x_ptr, row, column, rows, columns, columns), TO_BFLOAT16)
    _store_both(
        x, scale_ptr, rows_ptr, columns_ptr, row, column, rows, columns, ROWS_WANTED, COLUMNS_WANTED
    )  # fmt: skip


@triton.jit
def float8_rms_norm(
    x_ptr, weight_ptr, rstd_ptr, scale_ptr, rows_ptr, columns_ptr, rows, columns,
    TO_BFLOAT16: tl.constexpr, COLUMNS_WANTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] * rstd [rows] * weight [columns]."""
    row, column = _place(R, C)
    x = _tile(x_ptr, row, column, rows, columns, columns)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    x = _rounded(x * rstd[:, None] * weight[None, :], TO_BFLOAT16)
    _store_both(x, scale_ptr, rows_ptr, columns_ptr, row, column, rows, columns, True, COLUMNS_WANTED)


@triton.jit
def float8_swiglu(
    gate_up_ptr, scale_ptr, rows_ptr, columns_ptr, rows, hidden,
    GROUP: tl.constexpr, TO_BFLOAT16: tl.constexpr, COLUMNS_WANTED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """gate_up [rows, hidden / GROUP, 2, GROUP] -> silu(gate) * up [rows, hidden]; C divides GROUP."""
    row, column = _place(R, C)
    gate_column = _gate_column(GROUP, C)
    gate = _tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _tile(gate_up_ptr, row, gate_column + GROUP, rows, 2 * hidden, 2 * hidden)
    out = _rounded(gate * tl.sigmoid(gate) * up, TO_BFLOAT16)
    _store_both(out, scale_ptr, rows_ptr, columns_ptr, row, column, rows, hidden, True, COLUMNS_WANTED)


@triton.jit
def float8_swiglu_backward(
    grad_ptr, gate_up_ptr, scale_ptr, rows_ptr, columns_ptr, rows, hidden,
    GROUP: tl.constexpr, TO_BFLOAT16: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """grad [rows, hidden] and gate_up [rows, hidden / GROUP, 2, GROUP] -> gradients of gate_up; C divides GROUP."""
    row, column = _place(R, C)
    gate_column = _gate_column(GROUP, C)
    up_column = gate_column + GROUP
    gate = _tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _tile(gate_up_ptr, row, up_column, rows, 2 * hidden, 2 * hidden)
    grad = _tile(grad_ptr, row, column, rows, hidden, hidden)
    sigmoid = tl.sigmoid(gate)
    of_gate = _rounded(grad * up * sigmoid * (1 + gate * (1 - sigmoid)), TO_BFLOAT16)
    of_up = _rounded(grad * gate * sigmoid, TO_BFLOAT16)
    _store_both(of_gate, scale_ptr, rows_ptr, columns_ptr, row, gate_column, rows, 2 * hidden, True, True)
    _store_both(of_up, scale_ptr, rows_ptr, columns_ptr, row, up_column, rows, 2 * hidden, True, True)


@triton.jit
def _bits(x):
    """Of float32 without the sign, as int32, whose order is that of the absolute values, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def float8_largest(x_ptr, largest_ptr, numbers, BLOCK: tl.constexpr):
    """The bits of the largest absolute value in each program's BLOCK of x [numbers]: int32 [programs]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    tl.store(largest_ptr + tl.program_id(0), tl.max(_bits(x), 0))


@triton.jit
def float8_swiglu_largest(
    gate_up_ptr, grad_ptr, largest_ptr, rows, hidden,
    GROUP: tl.constexpr, BACKWARD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The bits of the largest absolute value in each program's tile of gate_up's gradient: int32 [programs];

    or forward of SwiGLU's result and of gate_up: [2, programs].
    """
    row, column = _place(R, C)
    gate_column = _gate_column(GROUP, C)
    gate = _tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _tile(gate_up_ptr, row, gate_column + GROUP, rows, 2 * hidden, 2 * hidden)
    sigmoid = tl.sigmoid(gate)
    if BACKWARD:
        grad = _tile(grad_ptr, row, column, rows, hidden, hidden)
        bits = tl.maximum(_bits(grad * up * sigmoid * (1 + gate * (1 - sigmoid))), _bits(grad * gate * sigmoid))
    else:
        bits = _bits(gate * sigmoid * up)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest_ptr + program, tl.max(tl.max(bits, 1), 0))
    if not BACKWARD:
        both = tl.maximum(_bits(gate), _bits(up))
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.store(largest_ptr + programs + program, tl.max(tl.max(both, 1), 0))
