"""SwiGLU (Shazeer, arXiv:2002.05202) of fused gate and up projections: in plain PyTorch, and by Triton kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.kernels.operator import inlined, operator

_ELEMENTS = 4096  # of the output, per program


def swiglu(gate_up: Tensor, group: int) -> Tensor:
    """silu(gate) * up: gate_up [..., n * 2 * group] -> [..., n * group]; gate and up groups alternate.

    torch.compile fuses the forward pass into one loop, but its loop of the backward pass reads everything twice.
    """
    gate, up = gate_up.unflatten(-1, (-1, 2, group)).unbind(dim=-2)  # [..., n, group] each
    return (F.silu(gate) * up).flatten(-2)


def triton_swiglu(gate_up: Tensor, group: int) -> Tensor:
    """`swiglu` by Triton kernels (CUDA), computed in float32; `group` is a power of two."""
    out: Tensor = _forward(gate_up, group)
    return out


@operator("swamla_titan::swiglu")
def _forward(gate_up: Tensor, group: int) -> Tensor:
    from swamla_titan.kernels import swiglu_triton as kernels

    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    rows = out.numel() // group
    each = max(_ELEMENTS // group, 1)
    with torch.cuda.device_of(gate_up):  # Triton launches on the current one
        grid = (-(-rows // each),)
        inlined(kernels.swiglu_forward)[grid](gate_up, out, rows, GROUP=group, ROWS=each, num_warps=8)
    return out


@_forward.register_fake
def _(gate_up: Tensor, group: int) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operator("swamla_titan::swiglu_backward")
def _backward(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    from swamla_titan.kernels import swiglu_triton as kernels

    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    rows = grad.numel() // group
    each = max(_ELEMENTS // group, 1)
    with torch.cuda.device_of(gate_up):
        inlined(kernels.swiglu_backward)[(-(-rows // each),)](
            *(grad, gate_up, grad_gate_up, rows), GROUP=group, ROWS=each, num_warps=8
        )
    return grad_gate_up


@_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.group = inputs
    ctx.save_for_backward(gate_up)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return torch.ops.swamla_titan.swiglu_backward(grad, gate_up, ctx.group), None


_forward.register_autograd(_gradients, setup_context=_setup)
