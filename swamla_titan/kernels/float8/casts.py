"""Casts to float8, alone and together with what computes their input: plain, and by Triton kernels (CUDA).

A float8 matrix here is x = scale * q with one float32 `scale`: dynamic scaling by the whole tensor's largest number
(Micikevicius et al., arXiv:2209.05433). Products scaled so are the fastest that GPUs have, and unlike scales of rows
one scale serves both layouts. It is a power of two, so that it rounds nothing: a number becomes the same float8
whatever stands beside it, on one rank or on many, as long as it is not among the smallest.

The largest number must be known before the first is cast. That of a norm is computed in plain PyTorch, which
torch.compile joins with the residual sum before it; others by kernels that read and write nothing (`largest_of`,
`swiglu_largest`). That of SwiGLU's gradient may be a bound (`swiglu_gradient_bound`): a type of many exponents, as e5m2
is, loses nothing by a scale that is too large. The kernels then compute, cast and write both layouts in one pass. All
casts round through the dtype that activations have, so that fusing changes no bit.
"""

import torch
from torch import Tensor

from swamla_titan.kernels.operator import operator, seen_through
from swamla_titan.kernels.swiglu import swiglu

_BLOCK = 8192  # numbers of which a program finds the largest
_TILE = 64  # rows and columns that a program writes, both ways in whole sectors of memory
_SMALLEST = torch.finfo(torch.float32).tiny  # of normal numbers, whose reciprocals are finite


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two by which numbers up to `largest` are divided to fit `dtype`: float32 scalars.

    Not clamped, but for what float32 has no normal numbers for; so a tensor of zeros has a scale. NaN gives NaN and
    infinity infinity, and with these whatever is multiplied by the cast tensor is no finite number either.
    """
    bits = (largest.float() / torch.finfo(dtype).max).view(torch.int32)
    upward = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # the mantissa carries into the exponent
    return torch.where(largest.isnan(), largest.float(), upward).clamp(min=_SMALLEST)


@operator("swamla_titan::float8_largest")
def largest_of(x: Tensor) -> Tensor:
    """The largest absolute value, a float32 scalar."""
    if not _by_kernels(x):
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    from swamla_titan.kernels.float8 import casts_triton as kernels

    x = x.contiguous()
    found = x.new_empty(-(-x.numel() // _BLOCK), dtype=torch.int32)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        seen_through(kernels.float8_largest)[(len(found),)](x, found, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return found.amax().view(torch.float32)


@largest_of.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def plain_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in float8. Infinities and NaN become NaN, also where `dtype` has infinities."""
    return (x.float() * (1 / scale)).to(dtype)


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b^T of float8 a [M, K] and b [N, K], both row by row, -> [M, N] in `dtype`.

    `fast` leaves sums in the tensor cores' short registers all the way. On a CPU emulated in float32.
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
    rows: bool = True,
    columns: bool = True,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [M, K], rounded to `through`, over `scale`: in float8 [M, K] and [K, M]; an empty tensor for one not wanted.

    `after` is not read: a compiler that sorts operations into passes must put this one behind what makes that.
    """
    x = x.contiguous()
    out, turned = _fake_cast(x, scale, dtype, through, rows, columns, after)
    if _by_kernels(x):
        inputs = x, scale, out, turned, x if after is None else after, *x.shape
        _launch("float8_cast", inputs, _bf16(through), ROWS_WANTED=rows, COLUMNS_WANTED=columns)
        return out, turned
    return _both(plain_cast(x.to(through), scale, dtype), rows, columns)


@float8_cast.register_fake
def _fake_cast(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    through: torch.dtype,
    rows: bool = True,
    columns: bool = True,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[0], x.shape[1], dtype, rows, columns)


@operator("swamla_titan::float8_swiglu_backward")
def float8_swiglu_backward(
    grad: Tensor, gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up [M, 2 F] from that of SwiGLU's result [M, F]: in float8 [M, 2 F] and [2 F, M]."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out, turned = _fake_swiglu_backward(grad, gate_up, scale, group, dtype)
    if _by_kernels(grad):
        inputs = grad, gate_up, scale, out, turned, *grad.shape
        _launch("float8_swiglu_backward", inputs, _bf16(grad.dtype), GROUP=group, C=min(_TILE, group))
        return out, turned
    gradient = swiglu_gradient(grad, gate_up, group).to(grad.dtype)
    return _both(plain_cast(gradient, scale, dtype), True, True)


@float8_swiglu_backward.register_fake
def _fake_swiglu_backward(
    grad: Tensor, gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _empty(gate_up, gate_up.shape[0], gate_up.shape[1], dtype, True, True)


@operator("swamla_titan::float8_swiglu_largest")
def swiglu_largest(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The largest absolute values of SwiGLU of gate_up [M, 2 F], and of gate_up: float32 scalars.

    Not in plain PyTorch: a compiler would keep gate_up in float32 for the gradient. And not as one tensor: a compiler
    may put a scale where one of them was, and cuBLASLt reads scales at multiples of 16 bytes alone.
    """
    if _by_kernels(gate_up):
        largest, of_gate_up = _swiglu_largest(gate_up, None, group)
        return largest.amax().view(torch.float32), of_gate_up.amax().view(torch.float32)
    return largest_of(swiglu(gate_up.float(), group)), largest_of(gate_up)


@swiglu_largest.register_fake
def _(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty((), dtype=torch.float32), gate_up.new_empty((), dtype=torch.float32)


@operator("swamla_titan::float8_swiglu_gradient_largest")
def swiglu_gradient_largest(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    """The largest absolute value of the gradient of gate_up [M, 2 F] from that of SwiGLU's result [M, F]: float32."""
    if _by_kernels(gate_up):
        return _swiglu_largest(gate_up, grad, group)[0].amax().view(torch.float32)
    return largest_of(swiglu_gradient(grad, gate_up, group))


@swiglu_gradient_largest.register_fake
def _(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    return gate_up.new_empty((), dtype=torch.float32)


def swiglu_gradient_bound(grad: Tensor, of_gate_up: Tensor) -> Tensor:
    """Not less than `swiglu_gradient_largest`, without reading gate_up again, of which `of_gate_up` is the largest.

    silu has a slope of at most 1.1, and |silu(x)| <= |x|. Often 100 times as much, 7 of the 30 binades of e5m2.
    """
    return 1.125 * largest_of(grad) * of_gate_up  # an eighth: bfloat16 may round 1.1 up


def _swiglu_largest(gate_up: Tensor, grad: Tensor | None, group: int) -> Tensor:
    """The bits of what each program finds: int32 [2 or, of the gradient, 1, programs]."""
    gate_up = gate_up.contiguous()
    rows, hidden, tile = gate_up.shape[0], gate_up.shape[1] // 2, min(_TILE, group)
    programs = -(-rows // _TILE) * -(-hidden // tile)
    found = gate_up.new_empty((2 if grad is None else 1, programs), dtype=torch.int32)
    inputs = gate_up, gate_up if grad is None else grad.contiguous(), found, rows, hidden
    _launch("float8_swiglu_largest", inputs, {}, GROUP=group, BACKWARD=grad is not None, C=tile)
    return found


def swiglu_gradient(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    """The gradient of gate_up [M, 2 F] in float32."""
    gate, up = gate_up.float().unflatten(-1, (-1, 2, group)).unbind(dim=-2)  # [M, n, group] each
    grad = grad.float().unflatten(-1, (-1, group))
    sigmoid = gate.sigmoid()
    of_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.stack((of_gate, grad * gate * sigmoid), dim=-2).flatten(1)


def cast_swiglu(gate_up: Tensor, scale: Tensor, group: int, dtype: torch.dtype, columns: bool) -> tuple[Tensor, Tensor]:
    """SwiGLU of gate_up [M, 2 F] in float8 [M, F] and, if wanted, [F, M]."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[1] // 2
    if _by_kernels(gate_up):
        out, turned = _empty(gate_up, gate_up.shape[0], width, dtype, True, columns)
        inputs = gate_up, scale, out, turned, gate_up.shape[0], width
        tile = {"GROUP": group, "C": min(_TILE, group)}
        _launch("float8_swiglu", inputs, _bf16(gate_up.dtype), COLUMNS_WANTED=columns, **tile)
        return out, turned
    result = swiglu(gate_up.float(), group).to(gate_up.dtype)
    return _both(plain_cast(result, scale, dtype), True, columns)


def cast_rms_norm(
    x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor]:
    """x [M, K] * rstd [M] * weight [K] in float8 [M, K] and, if wanted, [K, M]."""
    x = x.contiguous()
    if _by_kernels(x):
        out, turned = _empty(x, x.shape[0], x.shape[1], dtype, True, columns)
        inputs = x, weight, rstd.contiguous(), scale, out, turned, *x.shape
        _launch("float8_rms_norm", inputs, _bf16(x.dtype), COLUMNS_WANTED=columns)
        return out, turned
    result = (x.float() * rstd[:, None] * weight.float()).to(x.dtype)
    return _both(plain_cast(result, scale, dtype), True, columns)


def empty_pair(like: Tensor, rows: int, columns: int, dtype: torch.dtype, turned: bool) -> tuple[Tensor, Tensor]:
    """What the casts above give, without values."""
    return _empty(like, rows, columns, dtype, True, turned)


def _empty(
    like: Tensor, rows: int, columns: int, dtype: torch.dtype, rows_wanted: bool, columns_wanted: bool
) -> tuple[Tensor, Tensor]:
    out = like.new_empty((rows, columns) if rows_wanted else (0,), dtype=dtype)
    return out, like.new_empty((columns, rows) if columns_wanted else (0,), dtype=dtype)


def _both(quantized: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    nothing = quantized.new_empty(0)
    turned = quantized.t().contiguous() if columns else nothing
    # A matrix of one row or column turns by a view.
    return (quantized if rows else nothing), (turned.clone() if columns and rows else turned)


def _bf16(dtype: torch.dtype) -> dict[str, bool]:
    return {"TO_BFLOAT16": dtype == torch.bfloat16}


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _launch(name: str, inputs: tuple[Tensor | int, ...], dtype: dict[str, bool], **options: bool | int) -> None:
    """A kernel over tiles of its last two arguments, rows and columns."""
    from swamla_titan.kernels.float8 import casts_triton as kernels

    rows, columns = inputs[-2:]
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    assert isinstance(inputs[0], Tensor)
    tile = {"R": _TILE, "C": _TILE} | options
    grid = -(-columns // tile["C"]), -(-rows // tile["R"])
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current one
        seen_through(getattr(kernels, name))[grid](*inputs, **dtype, **tile, num_warps=4)
