"""Clipping by a process alone is torch's, bit for bit."""

import copy

import pytest
import torch

from swamla_titan.optim import clip_gradients

SHAPES = ((64, 7), (5,), (), (0, 3), (33, 2))


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.7, 1e6])
def test_alone_it_is_torchs(dtype, max_norm):
    found = gradients(dtype)
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in found]
    for parameter, gradient in zip(parameters, copy.deepcopy(found)):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = clip_gradients(((gradient, 1.0) for gradient in found), max_norm)
    assert norm.dtype == dtype
    assert torch.equal(norm, expected)
    for gradient, parameter in zip(found, parameters):
        assert torch.equal(gradient, parameter.grad)


def test_zero_leaves_them_as_they_are_and_tells_the_norm():
    found = gradients(torch.float64)
    before = copy.deepcopy(found)
    norm = clip_gradients(((gradient, 1.0) for gradient in found), 0.0)
    assert norm.item() == pytest.approx(torch.cat([gradient.flatten() for gradient in before]).norm().item())
    assert all(map(torch.equal, found, before))


def test_shares_say_how_much_of_a_gradient_counts():
    """As if another rank held a copy of the second and a gradient of norm 2."""
    found = [torch.full((4,), 1.5), torch.full((9,), 4.0)]
    norm = clip_gradients(zip(found, (1.0, 0.5)), 1.0, lambda square: square + 72 + 4)
    assert norm.item() == pytest.approx((9 + 144 + 4) ** 0.5)
    torch.testing.assert_close(found[1], torch.full((9,), 4.0 / 157**0.5))


def test_what_is_no_number_shows():
    for bad in (float("nan"), float("inf")):
        found = [torch.ones(3), torch.tensor([1.0, bad])]
        assert not clip_gradients(((gradient, 1.0) for gradient in found), 1.0).isfinite()
