"""Casts to float8 by our kernels against plain PyTorch. Run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.

Triton's interpreter (3.6) rounds to float8 wrongly: there the same kernels write float32 instead.
"""

import os

import pytest
import torch

from swamla_titan.kernels.float8 import casts as float8
from swamla_titan.kernels.float8.casts import (
    cast_rms_norm,
    cast_swiglu,
    float8_cast,
    float8_swiglu_backward,
    plain_cast,
    scale_for,
    swiglu_amax,
    swiglu_gradient,
    swiglu_gradient_amax,
    swiglu_gradient_amax_bound,
    tensor_amax,
)
from swamla_titan.kernels.swiglu import swiglu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WRITTEN = [torch.float32] if INTERPRETED else [E4M3, E5M2]
SHAPES = [(64, 128), (48, 80), (130, 272), (16, 16)]


@pytest.fixture
def by_kernels(monkeypatch):
    monkeypatch.setattr(float8, "_by_kernels", lambda x: True)


def scale_of(x, dtype):
    dtype = E4M3 if dtype == torch.float32 else dtype
    return scale_for(x.float().abs().amax(), dtype).to(DEVICE)


def same(found, expected, dtype):
    """Equal, but where what is rounded lay near the middle between two numbers: there the next one."""
    data, transposed = found
    assert data.dtype == transposed.dtype == dtype
    assert torch.equal(transposed.float(), data.float().T)
    if dtype == torch.float32:
        torch.testing.assert_close(data, expected, rtol=2e-6, atol=1e-4)
        return
    steps = data.view(torch.uint8).int() - expected.view(torch.uint8).int()
    assert (steps.abs() <= 1).all()
    assert (steps != 0).float().mean() < 2e-3


@pytest.mark.parametrize("dtype, largest", [(E4M3, 448.0), (E5M2, 57344.0)])
def test_a_scale_is_the_power_of_two_that_just_fits(dtype, largest):
    for value, expected in (
        (largest, 1.0),
        (1.01 * largest, 2.0),
        (0.51 * largest, 1.0),
        (0.5 * largest, 0.5),
        (2.0**-100 * largest, 2.0**-100),
    ):
        scale = scale_for(torch.tensor(value), dtype)
        assert scale.dtype == torch.float32
        assert scale.item() == expected
        assert abs(plain_cast(torch.tensor(value), scale, dtype).float() * scale - value) <= value / 8


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(dtype):
    zeros = torch.zeros(4, 4)
    assert torch.equal(plain_cast(zeros, scale_for(zeros.abs().amax(), dtype), dtype).float(), zeros)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(4, 4)
        x[1, 2] = wrong
        scale = scale_for(x.abs().amax(), dtype)
        assert not scale.isfinite()
        assert plain_cast(x, scale, dtype).float()[1, 2].isnan()
        assert not (plain_cast(x, scale, dtype).float() * scale).isfinite().any()


def test_a_gradient_of_tiny_numbers_keeps_its_relative_error():
    x = 1e-7 * torch.randn(64, 64)  # a clamp of scales to 1e4 would make zeros of most
    scale = scale_for(x.abs().amax(), E5M2)
    error = (plain_cast(x, scale, E5M2).float() * scale - x).norm() / x.norm()
    assert error < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", WRITTEN)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_cast_with_its_transpose(shape, dtype, kind, by_kernels):
    if INTERPRETED and kind == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    x = torch.randn(shape, device=DEVICE).to(kind)
    scale = scale_of(x, dtype)
    found = float8_cast(x, scale, dtype, kind)
    same(found, plain_cast(x, scale, dtype), dtype)
    data, nothing = float8_cast(x, scale, dtype, kind, transposed=False)
    assert torch.equal(data.float(), found[0].float())
    assert nothing.numel() == 0
    assert torch.equal(float8_cast(x, scale, dtype, kind, untransposed=False)[1].float(), found[1].float())


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(wrong, by_kernels):
    x = torch.ones(32, 32, device=DEVICE)
    x[3, 4] = wrong
    data, transposed = float8_cast(x, scale_of(x, E4M3), WRITTEN[0], torch.float32)
    assert data.float()[3, 4].isnan()
    assert transposed.float()[4, 3].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_norm_and_cast_at_once(shape, kind, by_kernels):
    if INTERPRETED and kind == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    x, weight = torch.randn(shape, device=DEVICE).to(kind), torch.rand(shape[1], device=DEVICE)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)
    expected = (x.float() * rstd[:, None] * weight).to(kind)
    scale = scale_of(expected, E4M3)
    dtype = WRITTEN[0]
    same(cast_rms_norm(x, weight, rstd, scale, dtype, True), plain_cast(expected, scale, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, hidden, group", [(64, 256, 128), (48, 96, 32), (130, 128, 16)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_swiglu_and_cast_at_once_and_backward(rows, hidden, group, kind, by_kernels):
    if INTERPRETED and kind == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    gate_up = torch.randn(rows, 2 * hidden, device=DEVICE).to(kind)
    grad = torch.randn(rows, hidden, device=DEVICE).to(kind)
    expected = swiglu(gate_up.float(), group).to(kind)
    scale = scale_of(expected, E4M3)
    dtype = WRITTEN[0]
    same(cast_swiglu(gate_up, scale, group, dtype, True), plain_cast(expected, scale, dtype), dtype)
    for dtype in WRITTEN:
        expected = swiglu_gradient(grad, gate_up, group).to(kind)
        scale = scale_of(expected, dtype)
        same(float8_swiglu_backward(grad, gate_up, scale, group, dtype), plain_cast(expected, scale, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, hidden, group", [(64, 256, 128), (48, 96, 32), (130, 128, 16)])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf")])
def test_the_amax_of_swiglu_and_of_its_gradient(rows, hidden, group, wrong, by_kernels):
    gate_up, grad = torch.randn(rows, 2 * hidden, device=DEVICE), torch.randn(rows, hidden, device=DEVICE)
    if wrong is not None:
        gate_up[rows - 1, 5 + group] = wrong  # an up
    found = [*swiglu_amax(gate_up, group), swiglu_gradient_amax(grad, gate_up, group), tensor_amax(grad)]
    expected = [x.abs().amax() for x in (swiglu(gate_up, group), gate_up, swiglu_gradient(grad, gate_up, group), grad)]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [1, 8192, 8193, 100_000])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("-inf")])
def test_the_amax_of_any_number_of_elements(elements, wrong, by_kernels):
    x = torch.randn(elements, device=DEVICE)
    x[-1] = -50.0 if wrong is None else wrong
    assert tensor_amax(x).dtype == torch.float32
    torch.testing.assert_close(tensor_amax(x), x.abs().amax(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensor_amax(x[::2]), x[::2].abs().amax(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0, 100.0])
def test_the_bound_of_swiglu_s_gradient_holds_and_is_no_more_than_too_large(size):
    gate_up, grad = size * torch.randn(64, 256), torch.randn(64, 128)
    gate_up[3, 5], gate_up[3, 64 + 5], grad[3, 5] = 2.4, 5 * size, 5.0  # the steepest place of silu: a slope of 1.0998
    for dtype in (torch.float32, torch.bfloat16):
        exact = swiglu_gradient_amax(grad, gate_up, 64).to(dtype)
        bound = swiglu_gradient_amax_bound(grad, tensor_amax(gate_up))
        assert exact <= bound < 1000 * exact


def test_the_plain_gradient_of_swiglu_is_autograds():
    gate_up = torch.randn(6, 64, requires_grad=True)
    grad = torch.randn(6, 32)
    (expected,) = torch.autograd.grad(swiglu(gate_up, 16), gate_up, grad)
    torch.testing.assert_close(swiglu_gradient(grad, gate_up.detach(), 16), expected)
