"""How near values and gradients of an attention operator are to the reference in float64."""

import torch

from swamla_titan.kernels.attention.dispatch import reference_attention


def relative_error(ours, exact):
    least = 0.1 * exact.numel() ** 0.5  # the gradients of a document of one token are nothing but rounding
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=least)).item()


def assert_equals_reference(ours, ours_in, mask, scale, tolerance):
    """`ours` [B, T, H, E] of queries, keys and values `ours_in`, and what autograd gives for them."""
    exact_in = [x.detach().double().requires_grad_() for x in ours_in]
    exact = reference_attention(*(x.transpose(1, 2) for x in exact_in), mask, scale).transpose(1, 2)
    assert relative_error(ours, exact) < tolerance
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, ours_in, upstream)
    exact_gradients = torch.autograd.grad(exact, exact_in, upstream.double())
    for name, a, b in zip("qkv", gradients, exact_gradients):
        assert relative_error(a, b) < 2 * tolerance, f"gradient of {name}"
