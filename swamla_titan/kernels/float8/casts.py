"""Casts to float8, alone or fused with the operation before: in plain PyTorch, and by Triton kernels (CUDA).

A float8 matrix is x = scale * q with one float32 `scale`: tensorwise dynamic scaling by amax, the largest absolute
value (Micikevicius et al., arXiv:2209.05433). Tensorwise-scaled matmuls are the fastest that GPUs have, and unlike
scales per row, one scale serves both x and x^T. Scales are powers of two, so that scaling does not round: an element is
quantized to the same float8 value whatever else the tensor holds, on one rank or on many, unless it underflows.

amax must be known before the first element is cast. The norm's is computed in plain PyTorch, because torch.compile
fuses it with the residual sum before; others by kernels that write nothing but it (`tensor_amax`, `swiglu_amax`).
SwiGLU's gradient may use an upper bound instead (`swiglu_gradient_amax_bound`), because a type with a wide exponent
range, as e5m2, loses nothing by a scale that is too large. The casting kernels then compute, quantize and write x and
x^T while they read their input once. All casts round to the activations' dtype first, so that fusing changes no bit.

A float8 matmul reads both operands along the axis that it sums over, so an operand of two matmuls (forward and
backward) is needed both ways. A program computes one tile and transposes it through shared memory, so that both copies
are written in full sectors. All kernels but the plain amax have the grid (tiles of columns, tiles of rows):

                  c                             c                                r
        x [   .   .   .   ]         out [   .   .   .   ]       out_t    [   .   .   ]
      r   [   .   #   .   ]   ->  r     [   .   #   .   ]    and       c [   .   #   ]
          [   .   .   .   ]             [   .   .   .   ]                [   .   .   ]

Their `scale_ptr` holds one float32, a power of two: the value that a quantized 1 stands for. A GPU's float8 conversions
saturate, but because the scale follows from amax nothing here is out of range.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.operator import inlined, operator
from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.kernels.triton import jit, tl

_BLOCK = 8192  # elements that a program reduces to their amax
_TILE = 64  # rows and columns of a program's tile: x and x^T are both written in full sectors of memory
_SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal value, whose reciprocal is finite


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two that makes values up to `amax` fit `dtype` when divided by it: float32 scalars.

    Clamped only to float32's normal values; so a tensor of zeros has a scale. NaN gives NaN and infinity gives
    infinity, and these make the results of all matmuls with the cast tensor non-finite too.
    """
    bits = (amax.float() / torch.finfo(dtype).max).view(torch.int32)
    upward = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # the mantissa carries into the exponent
    return torch.where(amax.isnan(), amax.float(), upward).clamp(min=_SMALLEST)


@operator("swamla_titan::float8_largest")
def tensor_amax(x: Tensor) -> Tensor:
    """The largest absolute value of x, a float32 scalar."""
    if not _by_kernels(x):
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    x = x.contiguous()
    found = x.new_empty(-(-x.numel() // _BLOCK), dtype=torch.int32)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        inlined(amax_of_blocks)[(len(found),)](x, found, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return found.amax().view(torch.float32)


@tensor_amax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def plain_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in float8. Infinities and NaN become NaN, even if `dtype` has infinities."""
    return (x.float() * (1 / scale)).to(dtype)


def scaled_matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b^T of float8 a [M, K] and b [N, K], both row-major, -> [M, N] in `dtype`.

    `fast` accumulates in the tensor cores' registers of lower precision throughout. A CPU emulates it in float32.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() * a_scale) @ (b.float() * b_scale).t()).to(dtype)


@operator("swamla_titan::float8_cast")
def float8_cast(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    through: torch.dtype,
    untransposed: bool = True,
    transposed: bool = True,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [M, K], rounded to `through`, divided by `scale`: float8 [M, K] and [K, M]; an unwanted one is an empty tensor.

    `after` is not read: it makes the compiler, which moves operations between forward and backward pass, run this one
    later than the operation that computes `after`.
    """
    x = x.contiguous()
    out, out_t = _fake_cast(x, scale, dtype, through, untransposed, transposed, after)
    if _by_kernels(x):
        inputs = x, scale, out, out_t, x if after is None else after, *x.shape
        _launch(write_cast, inputs, _bf16(through), UNTRANSPOSED=untransposed, TRANSPOSED=transposed)
        return out, out_t
    return _with_transposed(plain_cast(x.to(through), scale, dtype), untransposed, transposed)


@float8_cast.register_fake
def _fake_cast(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    through: torch.dtype,
    untransposed: bool = True,
    transposed: bool = True,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return empty_pair(x, x.shape, dtype, transposed, untransposed)


@operator("swamla_titan::float8_swiglu_backward")
def float8_swiglu_backward(
    grad: Tensor, gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up [M, 2 F] from `grad` [M, F] of SwiGLU's output, in float8: [M, 2 F] and [2 F, M]."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out, out_t = _fake_swiglu_backward(grad, gate_up, scale, group, dtype)
    if _by_kernels(grad):
        inputs = grad, gate_up, scale, out, out_t, *grad.shape
        _launch(write_swiglu_gradient, inputs, _bf16(grad.dtype), GROUP=group, C=min(_TILE, group))
        return out, out_t
    gradient = swiglu_gradient(grad, gate_up, group).to(grad.dtype)
    return _with_transposed(plain_cast(gradient, scale, dtype), True, True)


@float8_swiglu_backward.register_fake
def _fake_swiglu_backward(
    grad: Tensor, gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return empty_pair(gate_up, gate_up.shape, dtype)


@operator("swamla_titan::float8_swiglu_largest")
def swiglu_amax(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The amax of SwiGLU of gate_up [M, 2 F], and that of gate_up: float32 scalars.

    Not in plain PyTorch, because a compiler would keep gate_up in float32 for the gradient. And not as one tensor of
    two, because a compiler may place a scale at the second's address, and cuBLASLt reads scales only at multiples of 16
    bytes.
    """
    if _by_kernels(gate_up):
        of_swiglu, of_gate_up = _swiglu_amax(gate_up, None, group)
        return of_swiglu.amax().view(torch.float32), of_gate_up.amax().view(torch.float32)
    return tensor_amax(swiglu(gate_up.float(), group)), tensor_amax(gate_up)


@swiglu_amax.register_fake
def _(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty((), dtype=torch.float32), gate_up.new_empty((), dtype=torch.float32)


@operator("swamla_titan::float8_swiglu_gradient_largest")
def swiglu_gradient_amax(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    """The amax of the gradient of gate_up [M, 2 F], from `grad` [M, F] of SwiGLU's output: a float32 scalar."""
    if _by_kernels(gate_up):
        return _swiglu_amax(gate_up, grad, group)[0].amax().view(torch.float32)
    return tensor_amax(swiglu_gradient(grad, gate_up, group))


@swiglu_gradient_amax.register_fake
def _(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    return gate_up.new_empty((), dtype=torch.float32)


def swiglu_gradient_amax_bound(grad: Tensor, gate_up_amax: Tensor) -> Tensor:
    """An upper bound of `swiglu_gradient_amax` that does not read gate_up again, but only its amax.

    It holds because silu has a slope of at most 1.1, and |silu(x)| <= |x|. It is often 100 times too large, which takes
    7 of e5m2's 30 binades.
    """
    return 1.125 * tensor_amax(grad) * gate_up_amax  # an eighth: bfloat16 may round 1.1 up


def _swiglu_amax(gate_up: Tensor, grad: Tensor | None, group: int) -> Tensor:
    """Each program's amax, as bits: int32 [2, programs], of the gradient [1, programs]."""
    gate_up = gate_up.contiguous()
    rows, hidden, tile = gate_up.shape[0], gate_up.shape[1] // 2, min(_TILE, group)
    programs = -(-rows // _TILE) * -(-hidden // tile)
    found = gate_up.new_empty((2 if grad is None else 1, programs), dtype=torch.int32)
    inputs = gate_up, gate_up if grad is None else grad.contiguous(), found, rows, hidden
    _launch(amax_of_swiglu, inputs, {}, GROUP=group, BACKWARD=grad is not None, C=tile)
    return found


def swiglu_gradient(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    """The gradient of gate_up [M, 2 F], in float32, from `grad` [M, F] of SwiGLU's output."""
    gate, up = gate_up.float().unflatten(-1, (-1, 2, group)).unbind(dim=-2)  # [M, n, group] each
    grad = grad.float().unflatten(-1, (-1, group))
    sigmoid = gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.stack((grad_gate, grad * gate * sigmoid), dim=-2).flatten(1)


def cast_swiglu(
    gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """SwiGLU of gate_up [M, 2 F] in float8: [M, F] and, if `transposed`, [F, M]."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[1] // 2
    if _by_kernels(gate_up):
        out, out_t = empty_pair(gate_up, (gate_up.shape[0], width), dtype, transposed)
        inputs = gate_up, scale, out, out_t, gate_up.shape[0], width
        tile = {"GROUP": group, "C": min(_TILE, group)}
        _launch(write_swiglu, inputs, _bf16(gate_up.dtype), TRANSPOSED=transposed, **tile)
        return out, out_t
    result = swiglu(gate_up.float(), group).to(gate_up.dtype)
    return _with_transposed(plain_cast(result, scale, dtype), True, transposed)


def cast_rms_norm(
    x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """x [M, K] * rstd [M] * weight [K] in float8: [M, K] and, if `transposed`, [K, M]."""
    x = x.contiguous()
    if _by_kernels(x):
        out, out_t = empty_pair(x, x.shape, dtype, transposed)
        inputs = x, weight, rstd.contiguous(), scale, out, out_t, *x.shape
        _launch(write_rms_norm, inputs, _bf16(x.dtype), TRANSPOSED=transposed)
        return out, out_t
    result = (x.float() * rstd[:, None] * weight.float()).to(x.dtype)
    return _with_transposed(plain_cast(result, scale, dtype), True, transposed)


def empty_pair(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, transposed: bool = True, untransposed: bool = True
) -> tuple[Tensor, Tensor]:
    """Uninitialized outputs of casts: [rows, columns] and [columns, rows]; an unwanted one is an empty tensor."""
    rows, columns = shape
    out = like.new_empty((rows, columns) if untransposed else (0,), dtype=dtype)
    return out, like.new_empty((columns, rows) if transposed else (0,), dtype=dtype)


def _with_transposed(quantized: Tensor, untransposed: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    nothing = quantized.new_empty(0)
    quantized_t = quantized.t().contiguous() if transposed else nothing
    if transposed and untransposed:  # two outputs must not share memory, as [1, N] does with a contiguous transpose
        quantized_t = quantized_t.clone()
    return (quantized if untransposed else nothing), quantized_t


def _bf16(dtype: torch.dtype) -> dict[str, bool]:
    return {"TO_BFLOAT16": dtype == torch.bfloat16}


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _launch(kernel: Any, inputs: tuple[Tensor | int, ...], dtype: dict[str, bool], **options: bool | int) -> None:
    """Launch a kernel with one program per tile; the last two inputs are the numbers of rows and columns."""
    rows, columns = inputs[-2:]
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    assert isinstance(inputs[0], Tensor)
    tile = {"R": _TILE, "C": _TILE} | options
    grid = -(-columns // tile["C"]), -(-rows // tile["R"])
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current one
        inlined(kernel)[grid](*inputs, **dtype, **tile, num_warps=4)


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
def write_cast(
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
def write_rms_norm(
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
def write_swiglu(
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
def write_swiglu_gradient(
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
def amax_of_blocks(x_ptr, amax_ptr, elements, BLOCK: tl.constexpr):
    """The bits of the amax of each BLOCK of x [elements]: int32 [programs].

    x [ BLOCK | BLOCK | BLOCK | ... ]
          v       v       v
    amax  0       1       2
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(amax_ptr + tl.program_id(0), tl.max(_abs_bits(x), 0))


@jit
def amax_of_swiglu(
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
    # The casting kernel computes these values again, because it must know amax before it writes the first of them.
    sigmoid = tl.sigmoid(gate)
    if BACKWARD:
        grad = _load_tile(grad_ptr, row, column, rows, hidden, hidden)
        bits = tl.maximum(_abs_bits(grad * up * sigmoid * (1 + gate * (1 - sigmoid))), _abs_bits(grad * gate * sigmoid))
    else:
        bits = _abs_bits(gate * sigmoid * up)
    # A place for each program instead of an atomic maximum, which would have to be zeroed by a launch of its own first.
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax_ptr + program, tl.max(tl.max(bits, 1), 0))
    if not BACKWARD:  # of gate_up too, because it is in the registers now
        both = tl.maximum(_abs_bits(gate), _abs_bits(up))
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.store(amax_ptr + programs + program, tl.max(tl.max(both, 1), 0))
