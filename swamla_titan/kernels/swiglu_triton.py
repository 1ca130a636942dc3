"""Triton kernels of SwiGLU, forward and backward, over rows of GROUP gates and GROUP up projections."""

import triton
import triton.language as tl


@triton.jit
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


@triton.jit
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
