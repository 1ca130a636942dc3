"""Linear layers x W^T in float8, alone and with SwiGLU, and RMSNorm that gives float8: any device, and torch.compile.

An operand is an `Operand`: its float8 values, untransposed and transposed, and an autograd placeholder through which
gradients flow. Where a tensor was cast, it is its own placeholder; the output of a norm or of SwiGLU exists as float8
alone, and its placeholder is one element expanded to the shape. Saved for the backward pass are transposed float8
values only. The three matmuls of a layer read both operands along the axis that they sum over:

    output        x [M, K]     and  W [N, K]
    gradient of x g [M, N]     and  W^T [K, N]
    gradient of W g^T [N, M]   and  x^T [K, M]
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
    scale_for,
    scaled_matmul,
    swiglu_amax,
    swiglu_gradient_amax,
    swiglu_gradient_amax_bound,
    tensor_amax,
)
from swamla_titan.kernels.operator import operator

VALUES = torch.float8_e4m3fn  # of activations and weights


class Settings(NamedTuple):
    """`gradients`: their float8 type. `fast`: their matmuls too accumulate in the tensor cores' registers."""

    gradients: torch.dtype = torch.float8_e5m2
    fast: bool = False


class Operand(NamedTuple):
    """The float8 matrix scale * data, where all leading axes are flattened to M and K is the last axis.

    `transposed` is empty where no gradient is wanted, or where a weight is cast again in the backward pass.
    """

    placeholder: Tensor  # [..., K], for autograd
    data: Tensor  # [M, K]
    transposed: Tensor  # [K, M]
    scale: Tensor  # float32 scalar


def quantize(x: Tensor, through: torch.dtype | None = None, transposed: bool = True) -> Operand:
    """Cast x [..., K], rounded to `through` first (None: x's dtype), to e4m3."""
    plain = x.detach().flatten(0, -2).contiguous()
    through = through or x.dtype
    scale = scale_for(tensor_amax(plain).to(through), VALUES)
    data, data_t = float8_cast(plain, scale, VALUES, through, transposed=transposed and torch.is_grad_enabled())
    return Operand(x, data, data_t, scale)


def float8_linear(x: Operand, weight: Operand, settings: Settings) -> Tensor:
    """x W^T: [..., K] and [N, K] -> [..., N] in the dtype of x's placeholder."""
    out: Tensor = _linear(*x, *weight, *settings)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Operand:
    """RMSNorm (model/layers.py) of x [..., K] with weight [K], as e4m3."""
    plain, gain = x.detach().flatten(0, -2).float(), weight.detach().float()
    rstd = torch.rsqrt(plain.square().mean(-1) + eps)
    scale = scale_for(((plain * gain).abs().amax(-1) * rstd).amax(), VALUES)
    placeholder, data, transposed = _rms_norm(x, weight, rstd, scale, torch.is_grad_enabled())
    return Operand(placeholder, data.detach(), transposed.detach(), scale)  # gradients flow through the placeholder


def float8_linear_swiglu(x: Operand, weight: Operand, group: int, settings: Settings) -> Operand:
    """SwiGLU (kernels/swiglu.py) of x W^T: [..., K] and [2 F, K] -> [..., F]; x W^T has its gradient in float8 only."""
    gate_up = scaled_matmul(x.data, x.scale, weight.data, weight.scale, x.placeholder.dtype, fast=True)
    amax, gate_up_amax = swiglu_amax(gate_up, group)
    scale = scale_for(amax, VALUES)
    operands = x.placeholder, x.transposed, x.scale, weight.placeholder, weight.transposed, weight.scale
    options = group, *settings, torch.is_grad_enabled()
    placeholder, data, transposed = _swiglu(*operands, gate_up, gate_up_amax, scale, *options)
    return Operand(placeholder, data.detach(), transposed.detach(), scale)  # gradients flow through the placeholder


@operator("swamla_titan::float8_product")
def _linear(
    x: Tensor,
    x_data: Tensor,
    x_transposed: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_data: Tensor,
    weight_transposed: Tensor,
    weight_scale: Tensor,
    gradients: torch.dtype,
    fast: bool,
) -> Tensor:
    out = scaled_matmul(x_data, x_scale, weight_data, weight_scale, x.dtype, fast=True)
    return out.unflatten(0, x.shape[:-1])


@_linear.register_fake
def _(x: Tensor, x_data: Tensor, x_transposed: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, x_transposed, x_scale, weight, _, weight_transposed, weight_scale, *settings = inputs
    ctx.settings = Settings(*settings)
    ctx.dtypes = x.dtype, weight.dtype
    again = weight if weight_transposed.numel() == 0 else None
    ctx.save_for_backward(x_transposed, x_scale, again, weight_transposed, weight_scale)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_transposed, x_scale, weight, weight_transposed, weight_scale = ctx.saved_tensors
    plain = grad.flatten(0, -2).contiguous()
    scale = scale_for(tensor_amax(plain), ctx.settings.gradients)
    data, transposed = float8_cast(plain, scale, ctx.settings.gradients, plain.dtype)
    weight_transposed = _transposed_weight(weight, weight_transposed, weight_scale, ctx.dtypes[0], data)
    grad_x = scaled_matmul(data, scale, weight_transposed, weight_scale, ctx.dtypes[0], ctx.settings.fast)
    grad_weight = scaled_matmul(transposed, scale, x_transposed, x_scale, ctx.dtypes[1], ctx.settings.fast)
    return grad_x.unflatten(0, grad.shape[:-1]), None, None, None, grad_weight, *[None] * 5


_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)


# The only operator here with a matmul inside; the backward passes call torch's own, which are counted by themselves.
@register_flop_formula(torch.ops.swamla_titan.float8_product)
def _flops(
    x: Size, x_data: Size, x_transposed: Size, x_scale: Size, weight: Size, weight_data: Size, *rest: Any, **out: Any
) -> int:
    return 2 * x_data[0] * weight_data[0] * weight_data[1]


def _transposed_weight(
    weight: Tensor | None, transposed: Tensor, scale: Tensor, through: torch.dtype, after: Tensor
) -> Tensor:
    """W^T in float8: saved, or cast from the gathered `weight`; `after` is a tensor made in the backward pass."""
    if weight is None:
        return transposed
    # Without `after` a compiler would move the cast to the forward pass and save its result.
    again: Tensor = float8_cast(weight, scale, VALUES, through, untransposed=False, after=after)[1]
    return again


@operator("swamla_titan::float8_normalize")
def _rms_norm(
    x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Placeholder, data, and if `transposed` their transpose."""
    return _autograd_placeholder(x, x.shape), *cast_rms_norm(x.flatten(0, -2), weight, rstd, scale, VALUES, transposed)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, scale: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _autograd_placeholder(x, x.shape), *empty_pair(x, (rstd.shape[0], x.shape[-1]), VALUES, transposed)


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # those of float8 values would be tensors of zeros
    x, weight, rstd, _, _ = inputs
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_gradients(ctx: Any, grad: Tensor | None, *of_float8: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    x, weight, rstd = ctx.saved_tensors
    normed = x.float() * rstd.unflatten(0, x.shape[:-1])[..., None]
    scaled = grad.float() * weight.float()
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd.unflatten(0, x.shape[:-1])[..., None]
    grad_weight = (grad.float() * normed).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_setup_rms_norm)


@operator("swamla_titan::float8_gate_up")
def _swiglu(
    x: Tensor,
    x_transposed: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_transposed: Tensor,
    weight_scale: Tensor,
    gate_up: Tensor,
    gate_up_amax: Tensor,
    scale: Tensor,
    group: int,
    gradients: torch.dtype,
    fast: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU of gate_up = x W^T [M, 2 F]: placeholder, data, and if `transposed` their transpose.

    Its inputs include x and W because gate_up itself has no gradient: the backward pass goes straight to theirs.
    """
    placeholder = _autograd_placeholder(x, (*x.shape[:-1], gate_up.shape[1] // 2))
    return placeholder, *cast_swiglu(gate_up, scale, group, VALUES, transposed)


@_swiglu.register_fake
def _(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, gate_up, _amax, _scale, _group, _gradients, _fast, transposed = inputs
    width = gate_up.shape[1] // 2
    pair = empty_pair(gate_up, (gate_up.shape[0], width), VALUES, transposed)
    return _autograd_placeholder(x, (*x.shape[:-1], width)), *pair


def _setup_swiglu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, x_transposed, x_scale, weight, weight_transposed, weight_scale, gate_up, gate_up_amax, _, ctx.group, *rest = (
        inputs
    )
    ctx.settings = Settings(*rest[:2])
    ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
    again = weight if weight_transposed.numel() == 0 else None
    ctx.save_for_backward(x_transposed, x_scale, again, weight_transposed, weight_scale, gate_up, gate_up_amax)


def _swiglu_gradients(ctx: Any, grad: Tensor | None, *of_float8: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    x_transposed, x_scale, weight, weight_transposed, weight_scale, gate_up, gate_up_amax = ctx.saved_tensors
    plain, dtype = grad.flatten(0, -2).contiguous(), ctx.settings.gradients
    if dtype == torch.float8_e5m2:
        amax = swiglu_gradient_amax_bound(plain, gate_up_amax)
    else:
        amax = swiglu_gradient_amax(plain, gate_up, ctx.group)
    scale = scale_for(amax, dtype)
    data, transposed = float8_swiglu_backward(plain, gate_up, scale, ctx.group, dtype)
    weight_transposed = _transposed_weight(weight, weight_transposed, weight_scale, ctx.dtypes[0], data)
    grad_x = scaled_matmul(data, scale, weight_transposed, weight_scale, ctx.dtypes[0], ctx.settings.fast)
    grad_weight = scaled_matmul(transposed, scale, x_transposed, x_scale, ctx.dtypes[1], ctx.settings.fast)
    return grad_x.unflatten(0, ctx.shape[:-1]), None, None, grad_weight, *[None] * 9


_swiglu.register_autograd(_swiglu_gradients, setup_context=_setup_swiglu)


def _autograd_placeholder(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `shape` that takes no memory and is never read: autograd attaches the gradient to it."""
    return like.new_zeros(()).expand(shape)
