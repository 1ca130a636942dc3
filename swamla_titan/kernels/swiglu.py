"""SwiGLU (Shazeer, arXiv:2002.05202) of fused gate and up projections: in plain PyTorch, and by Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.kernels.operator import differentiate, inlined, operator
from swamla_titan.kernels.triton import jit, tl

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
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    rows = out.numel() // group
    each = max(_ELEMENTS // group, 1)
    with torch.cuda.device_of(gate_up):  # Triton launches on the current one
        grid = (-(-rows // each),)
        inlined(swiglu_forward)[grid](gate_up, out, rows, GROUP=group, ROWS=each, num_warps=8)
    return out


@_forward.register_fake
def _(gate_up: Tensor, group: int) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operator("swamla_titan::swiglu_backward")
def _backward(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    rows = grad.numel() // group
    each = max(_ELEMENTS // group, 1)
    with torch.cuda.device_of(gate_up):
        inlined(swiglu_backward)[(-(-rows // each),)](
            *(grad, gate_up, grad_gate_up, rows), GROUP=group, ROWS=each, num_warps=8
        )
    return grad_gate_up


@_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, group: int) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


differentiate(_forward, _backward)


@jit
def swiglu_forward(gate_up_ptr, out_ptr, rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """gate_up [rows, 2, GROUP] -> out [rows, GROUP].

    program 0   ROWS  [ gate | up ]  ->  ROWS  [ out ]
    program 1   ROWS  [ gate | up ]  ->  ROWS  [ out ]
                       GROUP  GROUP             GROUP
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, GROUP)[None, :]
    inside = row < rows
    gate_ptrs = gate_up_ptr + row * (2 * GROUP) + column
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + GROUP, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * GROUP + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def swiglu_backward(grad_ptr, gate_up_ptr, grad_gate_up_ptr, rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """grad [rows, GROUP] and gate_up [rows, 2, GROUP] -> grad_gate_up [rows, 2, GROUP].

    program 0   ROWS  [ grad ]  [ gate | up ]  ->  ROWS  [ grad_gate | grad_up ]
    program 1   ROWS  [ grad ]  [ gate | up ]  ->  ROWS  [ grad_gate | grad_up ]
                       GROUP     GROUP  GROUP               GROUP       GROUP
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, GROUP)[None, :]
    inside = row < rows
    at = row * (2 * GROUP) + column
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + GROUP, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * GROUP + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * gate * sigmoid
    kind = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + at, grad_gate.to(kind), mask=inside)
    tl.store(grad_gate_up_ptr + at + GROUP, grad_up.to(kind), mask=inside)
