"""Triton kernels that compute a matrix and write it as float8, both untransposed and transposed.

A float8 matmul reads both operands along the axis that it sums over, so an operand of two matmuls (forward and
backward) is needed both ways. A program computes one tile and transposes it through shared memory, so that both copies
are written in full sectors. All kernels but the plain amax have the grid (tiles of columns, tiles of rows):

                  c                             c                                r
        x [   .   .   .   ]         out [   .   .   .   ]       out_t    [   .   .   ]
      r   [   .   #   .   ]   ->  r     [   .   #   .   ]    and       c [   .   #   ]
          [   .   .   .   ]             [   .   .   .   ]                [   .   .   ]

`scale_ptr` holds one float32, a power of two: the value that a quantized 1 stands for. A GPU's float8 conversions
saturate, but because the scale follows from amax nothing here is out of range.
"""

from swamla_titan.kernels.triton import jit, tl


@jit
def _quantized(values, scale_ptr, out_ptr):
    # The load is volatile so that the two copies share no conversion: if ptxas 12.8 stores the same converted float32
    # values both untransposed and, byte by byte, transposed, it loses half of the conversions and reads registers that
    # nothing has written.
    # The scale of a tensor that holds an infinity is infinity, so its finite values become 0 and infinity becomes NaN,
    # which shows in all that is computed from it.
    return (values * (1.0 / tl.load(scale_ptr, volatile=True))).to(out_ptr.dtype.element_ty)


@jit
def _store_with_transposed(
    values, scale_ptr, out_ptr, out_t_ptr, row, column, rows, columns,
    UNTRANSPOSED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Quantize values [R, C], float32, into out [rows, columns] and out_t [columns, rows], at `row` and `column`."""
    far_row, far_column = row.to(tl.int64), column.to(tl.int64)
    if UNTRANSPOSED:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = far_row[:, None] * columns + column[None, :]
        tl.store(out_ptr + at, _quantized(values, scale_ptr, out_ptr), mask=inside)
    if TRANSPOSED:
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        at = far_column[:, None] * rows + row[None, :]
        tl.store(out_t_ptr + at, tl.trans(_quantized(values, scale_ptr, out_t_ptr)), mask=inside)


@jit
def _rows_and_columns(R: tl.constexpr, C: tl.constexpr):
    """The indices [R] and [C] of this program's tile."""
    return tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)


@jit
def _gate_column(GROUP: tl.constexpr, C: tl.constexpr):
    """The columns in gate_up of this program's gates; the up projections of the same units are GROUP further right."""
    parts: tl.constexpr = GROUP // C
    tile = tl.program_id(0)
    # Written so that the compiler sees the multiples of C in it: it then reads 16 bytes at a time.
    return tile // parts * (2 * GROUP) + tile % parts * C + tl.arange(0, C)


@jit
def _load_tile(x_ptr, row, column, rows, stride, end):
    """[R, C] of a matrix whose rows are `stride` apart, in float32; zeros from row `rows` and column `end` on."""
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < rows)[:, None] & (column < end)[None, :]
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _rounded(x, TO_BFLOAT16: tl.constexpr):
    """x in float32, rounded to bfloat16 if asked."""
    if TO_BFLOAT16:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@jit
def float8_cast(
    x_ptr, scale_ptr, out_ptr, out_t_ptr, after_ptr, rows, columns,
    TO_BFLOAT16: tl.constexpr, UNTRANSPOSED: tl.constexpr, TRANSPOSED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Cast x [rows, columns]. Nothing is read at `after_ptr`.

    x [r, c]  ->  out [r, c], out_t [c, r]
    """
    row, column = _rows_and_columns(R, C)
    x = _rounded(_load_tile(x_ptr, row, column, rows, columns, columns), TO_BFLOAT16)
    _store_with_transposed(
        x, scale_ptr, out_ptr, out_t_ptr, row, column, rows, columns, UNTRANSPOSED, TRANSPOSED
    )  # fmt: skip


@jit
def float8_rms_norm(
    x_ptr, weight_ptr, rstd_ptr, scale_ptr, out_ptr, out_t_ptr, rows, columns,
    TO_BFLOAT16: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Cast x [rows, columns] * rstd [rows] * weight [columns].

    weight          [c]
    rstd [r]   x [r, c]  ->  out [r, c], out_t [c, r]
    """
    row, column = _rows_and_columns(R, C)
    x = _load_tile(x_ptr, row, column, rows, columns, columns)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    x = _rounded(x * rstd[:, None] * weight[None, :], TO_BFLOAT16)
    _store_with_transposed(x, scale_ptr, out_ptr, out_t_ptr, row, column, rows, columns, True, TRANSPOSED)


@jit
def float8_swiglu(
    gate_up_ptr, scale_ptr, out_ptr, out_t_ptr, rows, hidden,
    GROUP: tl.constexpr, TO_BFLOAT16: tl.constexpr, TRANSPOSED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Cast silu(gate) * up [rows, hidden] of gate_up [rows, hidden / GROUP, 2, GROUP]; C divides GROUP.

           |--- GROUP ---|--- GROUP ---|
    gate_up [ .  gate  .  |  .   up   . | next group ... ]  ->  out [r, c], out_t [c, r]
                  ^ _gate_column  ^ GROUP further right
    """
    row, column = _rows_and_columns(R, C)
    gate_column = _gate_column(GROUP, C)
    gate = _load_tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _load_tile(gate_up_ptr, row, gate_column + GROUP, rows, 2 * hidden, 2 * hidden)
    out = _rounded(gate * tl.sigmoid(gate) * up, TO_BFLOAT16)
    _store_with_transposed(out, scale_ptr, out_ptr, out_t_ptr, row, column, rows, hidden, True, TRANSPOSED)


@jit
def float8_swiglu_backward(
    grad_ptr, gate_up_ptr, scale_ptr, out_ptr, out_t_ptr, rows, hidden,
    GROUP: tl.constexpr, TO_BFLOAT16: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Cast the gradient of gate_up [rows, hidden / GROUP, 2, GROUP] from grad [rows, hidden]; C divides GROUP.

    grad [r, c]
    gate_up [ .  gate  .  |  .   up   . ]  ->  the same two tiles of out, and of out_t
                  ^ _gate_column  ^ GROUP further right
    """
    row, column = _rows_and_columns(R, C)
    gate_column = _gate_column(GROUP, C)
    up_column = gate_column + GROUP
    gate = _load_tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _load_tile(gate_up_ptr, row, up_column, rows, 2 * hidden, 2 * hidden)
    grad = _load_tile(grad_ptr, row, column, rows, hidden, hidden)
    sigmoid = tl.sigmoid(gate)
    grad_gate = _rounded(grad * up * sigmoid * (1 + gate * (1 - sigmoid)), TO_BFLOAT16)
    grad_up = _rounded(grad * gate * sigmoid, TO_BFLOAT16)
    _store_with_transposed(grad_gate, scale_ptr, out_ptr, out_t_ptr, row, gate_column, rows, 2 * hidden, True, True)
    _store_with_transposed(grad_up, scale_ptr, out_ptr, out_t_ptr, row, up_column, rows, 2 * hidden, True, True)


@jit
def _abs_bits(x):
    """The bits of |x|, float32, as int32: ordered as the absolute values are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def float8_amax(x_ptr, amax_ptr, elements, BLOCK: tl.constexpr):
    """The bits of the amax of each BLOCK of x [elements]: int32 [programs].

    x [ BLOCK | BLOCK | BLOCK | ... ]
          v       v       v
    amax  0       1       2
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(amax_ptr + tl.program_id(0), tl.max(_abs_bits(x), 0))


@jit
def float8_swiglu_amax(
    gate_up_ptr, grad_ptr, amax_ptr, rows, hidden,
    GROUP: tl.constexpr, BACKWARD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The bits of each tile's amax. Forward: of SwiGLU's output and of gate_up, int32 [2, programs].

    BACKWARD: of gate_up's gradient, int32 [programs].

        grad [r, c]   (BACKWARD)
        gate_up [ .  gate  .  |  .   up   . ]  ->  amax [program], amax [programs + program]
                      ^ _gate_column  ^ GROUP further right
    """
    row, column = _rows_and_columns(R, C)
    gate_column = _gate_column(GROUP, C)
    gate = _load_tile(gate_up_ptr, row, gate_column, rows, 2 * hidden, 2 * hidden)
    up = _load_tile(gate_up_ptr, row, gate_column + GROUP, rows, 2 * hidden, 2 * hidden)
    sigmoid = tl.sigmoid(gate)
    if BACKWARD:
        grad = _load_tile(grad_ptr, row, column, rows, hidden, hidden)
        bits = tl.maximum(_abs_bits(grad * up * sigmoid * (1 + gate * (1 - sigmoid))), _abs_bits(grad * gate * sigmoid))
    else:
        bits = _abs_bits(gate * sigmoid * up)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax_ptr + program, tl.max(tl.max(bits, 1), 0))
    if not BACKWARD:
        both = tl.maximum(_abs_bits(gate), _abs_bits(up))
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.store(amax_ptr + programs + program, tl.max(tl.max(both, 1), 0))
