"""Norms and rotations against their formulas."""

import math

import pytest
import torch

from swamla_titan.model.layers import DynamicTanh, RMSNorm, rotate, rotation


def test_rms_norm_is_the_formula_in_float32():
    norm = RMSNorm(16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    x = torch.randn(3, 16).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected.bfloat16())
    # Squares of these would vanish in float16, and eps counts.
    small = torch.full((1, 16), 1e-3)
    torch.testing.assert_close(norm(small), small / math.sqrt(2e-6) * norm.weight)
    torch.testing.assert_close(norm(small.half()).float(), norm(small.half().float()), rtol=1e-3, atol=1e-5)


def test_dynamic_tanh_is_the_formula():
    norm = DynamicTanh(16)
    assert norm.alpha.item() == 0.5
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        norm.bias.copy_(torch.randn(16))
        norm.alpha.fill_(0.7)
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), torch.tanh(0.7 * x) * norm.weight + norm.bias)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_turns_each_pair_by_its_angle():
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    by = rotation(torch.tensor([[5]]), 8, theta=100.0, scaling=2.0, dtype=torch.float64)
    out = rotate(x, by)[0, 0, 0]
    for i in range(4):
        angle = 5 / 2 * 100.0 ** (-2 * i / 8)
        turned = torch.complex(x[0, 0, 0, i], x[0, 0, 0, i + 4]) * complex(math.cos(angle), math.sin(angle))
        torch.testing.assert_close(torch.complex(out[i], out[i + 4]), turned)


@pytest.mark.parametrize("dim, theta, scaling", [(128, 10000.0, 1.0), (64, 500000.0, 8.0), (6, 50.0, 3.0)])
def test_all_angles_are_exact_at_far_positions(dim, theta, scaling):
    """Against Python's own floats, one angle at a time; float32 anywhere on the way would be off by 1e-3 and more."""
    positions = [0, 1, 4095, 131_071, 1_000_003]
    by = rotation(torch.tensor([positions]), dim, theta, scaling, torch.float64)
    assert by.cos.shape == by.sin.shape == (1, len(positions), 1, dim // 2)
    for row, position in enumerate(positions):
        for i in range(dim // 2):
            angle = position / scaling / math.pow(theta, 2 * i / dim)
            assert by.cos[0, row, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-8), (position, i)
            assert by.sin[0, row, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-8), (position, i)


def test_rotation_keeps_far_positions_apart_and_activations_in_their_dtype():
    far = torch.tensor([[10_000_001]])
    exact = math.cos(10_000_001.0)
    by = rotation(far, 8, theta=100.0, scaling=1.0, dtype=torch.float32)
    assert abs(by.cos[0, 0, 0, 0].item() - exact) < 1e-6
    assert rotate(torch.randn(1, 1, 2, 8).bfloat16(), by).dtype == torch.bfloat16
