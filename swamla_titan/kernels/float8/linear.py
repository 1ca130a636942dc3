"""Products x W^T in float8 with their gradients, and what makes their factors: for any device, and torch.compile.

A factor is an `Operand`: its float8 numbers in both layouts, and a carrier, through which gradients flow. For what was
cast from a tensor that exists, that is this tensor; for what was never written in any other form (the result of a norm
or of SwiGLU) it is one number, expanded to the shape. Saved for the backward pass are float8 numbers by columns alone.

    value        x [M, K] row by row          times  W [N, K] row by row
    gradient     g [M, N] row by row          times  W by columns [K, N]
    of W         g by columns [N, M]          times  x by columns [K, M]
"""

from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from swamla_titan.kernels.float8.casts import (
    cast_rms_norm,
    cast_swiglu,
    empty_pair,
    float8_cast,
    float8_swiglu_backward,
    largest_of,
    scale_for,
    scaled_product,
    swiglu_gradient_bound,
    swiglu_gradient_largest,
    swiglu_largest,
)
from swamla_titan.kernels.operator import operator

VALUES = torch.float8_e4m3fn  # of activations and weights


class Settings(NamedTuple):
    """`gradients`: their float8 type. `fast`: gradients too are summed in the tensor cores' short registers."""

    gradients: torch.dtype = torch.float8_e5m2
    fast: bool = False


class Operand(NamedTuple):
    """A float8 matrix of M = all leading axes: scale * rows; the last axis of `carrier` is K.

    `columns` is empty where no gradient is wanted, or where a weight is cast anew for the backward pass.
    """

    carrier: Tensor  # [..., K]
    rows: Tensor  # [M, K]
    columns: Tensor  # [K, M]
    scale: Tensor  # float32 scalar


def quantize(x: Tensor, through: torch.dtype | None = None, columns: bool = True) -> Operand:
    """x [..., K], rounded to `through` (None: x's dtype), as e4m3."""
    plain = x.detach().flatten(0, -2).contiguous()
    through = through or x.dtype
    scale = scale_for(largest_of(plain).to(through), VALUES)
    wanted = columns and torch.is_grad_enabled()
    rows, turned = float8_cast(plain, scale, VALUES, through, columns=wanted)
    return Operand(x, rows, turned, scale)


def product(x: Operand, weight: Operand, settings: Settings) -> Tensor:
    """x W^T: [..., K] and [N, K] -> [..., N] in the dtype of x's carrier."""
    out: Tensor = _product(*x, *weight, *settings)
    return out


def normalize(x: Tensor, weight: Tensor, eps: float) -> Operand:
    """RMSNorm (model/norms.py) of x [..., K] by weight [K]."""
    plain, gain = x.detach().flatten(0, -2).float(), weight.detach().float()
    rstd = torch.rsqrt(plain.square().mean(-1) + eps)
    scale = scale_for(((plain * gain).abs().amax(-1) * rstd).amax(), VALUES)
    carrier, rows, columns = _normalize(x, weight, rstd, scale, torch.is_grad_enabled())
    return Operand(carrier, rows.detach(), columns.detach(), scale)  # gradients flow through the carrier alone


def gate_up_product(x: Operand, weight: Operand, group: int, settings: Settings) -> Operand:
    """SwiGLU (kernels/swiglu.py) of x W^T: [..., K] and [2 F, K] -> [..., F]; the gradient of x W^T is float8 alone."""
    gate_up = scaled_product(x.rows, x.scale, weight.rows, weight.scale, x.carrier.dtype, fast=True)
    largest, of_gate_up = swiglu_largest(gate_up, group)
    scale = scale_for(largest, VALUES)
    factors = x.carrier, x.columns, x.scale, weight.carrier, weight.columns, weight.scale
    options = group, *settings, torch.is_grad_enabled()
    carrier, rows, columns = _swiglu(*factors, gate_up, of_gate_up, scale, *options)
    return Operand(carrier, rows.detach(), columns.detach(), scale)  # gradients flow through the carrier alone


@operator("swamla_titan::float8_product")
def _product(
    x: Tensor,
    x_rows: Tensor,
    x_columns: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_rows: Tensor,
    weight_columns: Tensor,
    weight_scale: Tensor,
    gradients: torch.dtype,
    fast: bool,
) -> Tensor:
    out = scaled_product(x_rows, x_scale, weight_rows, weight_scale, x.dtype, fast=True)
    return out.unflatten(0, x.shape[:-1])


@_product.register_fake
def _(
    x: Tensor,
    x_rows: Tensor,
    x_columns: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_rows: Tensor,
    weight_columns: Tensor,
    weight_scale: Tensor,
    gradients: torch.dtype,
    fast: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, x_columns, x_scale, weight, _, weight_columns, weight_scale, *settings = inputs
    ctx.settings = Settings(*settings)
    ctx.dtypes = x.dtype, weight.dtype
    again = weight if weight_columns.numel() == 0 else None
    ctx.save_for_backward(x_columns, x_scale, again, weight_columns, weight_scale)


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_columns, x_scale, weight, weight_columns, weight_scale = ctx.saved_tensors
    plain = grad.flatten(0, -2).contiguous()
    scale = scale_for(largest_of(plain), ctx.settings.gradients)
    rows, columns = float8_cast(plain, scale, ctx.settings.gradients, plain.dtype)
    weight_columns = _columns_of(weight, weight_columns, weight_scale, ctx.dtypes[0], rows)
    of_x = scaled_product(rows, scale, weight_columns, weight_scale, ctx.dtypes[0], ctx.settings.fast)
    of_weight = scaled_product(columns, scale, x_columns, x_scale, ctx.dtypes[1], ctx.settings.fast)
    return of_x.unflatten(0, grad.shape[:-1]), None, None, None, of_weight, *[None] * 5


_product.register_autograd(_product_gradients, setup_context=_setup_product)


# Of the others here, no operator multiplies matrices itself, and the backward pass is made of torch's own products.
@register_flop_formula(torch.ops.swamla_titan.float8_product)
def _flops(
    x: Size, x_rows: Size, x_columns: Size, x_scale: Size, weight: Size, weight_rows: Size, *rest: Any, **out: Any
) -> int:
    return 2 * x_rows[0] * weight_rows[0] * weight_rows[1]


def _columns_of(weight: Tensor | None, columns: Tensor, scale: Tensor, through: torch.dtype, after: Tensor) -> Tensor:
    """The columns that were kept, or of the weight as it was gathered again; `after` is made in the backward pass."""
    if weight is None:
        return columns
    # Without `after` a compiler would move the cast to the forward pass and keep its result.
    again: Tensor = float8_cast(weight, scale, VALUES, through, rows=False, after=after)[1]
    return again


@operator("swamla_titan::float8_normalize")
def _normalize(x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Carrier, rows, and columns if `wanted`."""
    return _carrier(x, x.shape), *cast_rms_norm(x.flatten(0, -2), weight, rstd, scale, VALUES, wanted)


@_normalize.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _carrier(x, x.shape), *empty_pair(x, rstd.shape[0], x.shape[-1], VALUES, wanted)


def _setup_normalize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # those of float8 numbers would be tensors of zeros
    x, weight, rstd, _, _ = inputs
    ctx.save_for_backward(x, weight, rstd)


def _normalize_gradients(ctx: Any, grad: Tensor | None, *of_float8: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    x, weight, rstd = ctx.saved_tensors
    normed = x.float() * rstd.unflatten(0, x.shape[:-1])[..., None]
    scaled = grad.float() * weight.float()
    of_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd.unflatten(0, x.shape[:-1])[..., None]
    of_weight = (grad.float() * normed).flatten(0, -2).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None, None


_normalize.register_autograd(_normalize_gradients, setup_context=_setup_normalize)


@operator("swamla_titan::float8_gate_up")
def _swiglu(
    x: Tensor,
    x_columns: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_columns: Tensor,
    weight_scale: Tensor,
    gate_up: Tensor,
    of_gate_up: Tensor,
    scale: Tensor,
    group: int,
    gradients: torch.dtype,
    fast: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of gate_up = x W^T [M, 2 F], which has no gradient of its own: carrier, rows, and columns if `wanted`."""
    carrier = _carrier(x, (*x.shape[:-1], gate_up.shape[1] // 2))
    return carrier, *cast_swiglu(gate_up, scale, group, VALUES, wanted)


@_swiglu.register_fake
def _(
    x: Tensor,
    x_columns: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_columns: Tensor,
    weight_scale: Tensor,
    gate_up: Tensor,
    of_gate_up: Tensor,
    scale: Tensor,
    group: int,
    gradients: torch.dtype,
    fast: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = gate_up.shape[1] // 2
    return _carrier(x, (*x.shape[:-1], width)), *empty_pair(gate_up, gate_up.shape[0], width, VALUES, wanted)


def _setup_swiglu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, x_columns, x_scale, weight, weight_columns, weight_scale, gate_up, of_gate_up, _, ctx.group, *rest = inputs
    ctx.settings = Settings(*rest[:2])
    ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
    again = weight if weight_columns.numel() == 0 else None
    ctx.save_for_backward(x_columns, x_scale, again, weight_columns, weight_scale, gate_up, of_gate_up)


def _swiglu_gradients(ctx: Any, grad: Tensor | None, *of_float8: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    x_columns, x_scale, weight, weight_columns, weight_scale, gate_up, of_gate_up = ctx.saved_tensors
    plain, dtype = grad.flatten(0, -2).contiguous(), ctx.settings.gradients
    if dtype == torch.float8_e5m2:
        largest = swiglu_gradient_bound(plain, of_gate_up)
    else:
        largest = swiglu_gradient_largest(plain, gate_up, ctx.group)
    scale = scale_for(largest, dtype)
    rows, columns = float8_swiglu_backward(plain, gate_up, scale, ctx.group, dtype)
    weight_columns = _columns_of(weight, weight_columns, weight_scale, ctx.dtypes[0], rows)
    of_x = scaled_product(rows, scale, weight_columns, weight_scale, ctx.dtypes[0], ctx.settings.fast)
    of_weight = scaled_product(columns, scale, x_columns, x_scale, ctx.dtypes[1], ctx.settings.fast)
    return of_x.unflatten(0, ctx.shape[:-1]), None, None, of_weight, *[None] * 9


_swiglu.register_autograd(_swiglu_gradients, setup_context=_setup_swiglu)


def _carrier(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `shape` that takes no memory, and that nobody reads."""
    return like.new_zeros(()).expand(shape)
