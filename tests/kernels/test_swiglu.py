"""SwiGLU by our kernels against its formula. Run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1."""

import os

import pytest
import torch
import torch.nn.functional as F

from swamla_titan.kernels.swiglu import swiglu, triton_swiglu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def formula(gate_up, group):
    """By indices: gate of hidden unit i is in group i // group."""
    hidden = torch.arange(gate_up.shape[-1] // 2, device=gate_up.device)
    gate = hidden // group * 2 * group + hidden % group
    return F.silu(gate_up[..., gate]) * gate_up[..., gate + group]


def test_plain_swiglu_takes_gates_and_ups_in_groups():
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(swiglu(x, 8), formula(x, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, group", [((2, 3, 512), 64), ((7, 1536), 256), ((1, 32), 16), ((5, 16384), 8192)])
def test_kernels_equal_the_formula_in_value_and_gradient(shape, group, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    ours, exact = triton_swiglu(x, group), formula(exact_x, group)
    upstream = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, x, upstream)
    (expected,) = torch.autograd.grad(exact, exact_x, upstream.double())
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(ours.double(), exact, **tolerance)
    torch.testing.assert_close(gradient.double(), expected, **tolerance)
    assert gradient.dtype == dtype


@pytest.mark.gpu
def test_the_operators_declare_what_they_do():
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.swamla_titan.swiglu.default, (x, 16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="generates code for a GPU")
def test_compiled_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: triton_swiglu(x @ w, 64) @ w[:64, :8], fullgraph=True)
    x, w = torch.randn(30, 128, device=DEVICE, requires_grad=True), torch.randn(128, 128, device=DEVICE)
    torch.testing.assert_close(compiled(x, w), swiglu(x @ w, 64) @ w[:64, :8], rtol=1e-4, atol=1e-3)
