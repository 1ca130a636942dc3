"""MLA's rotation, expansion and attention as one operator, against the same steps apart in float64.

Run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.latent import latent_attention
from swamla_titan.kernels.attention.latent_hopper import latent_hopper_attention
from swamla_titan.kernels.attention.masks import dense_mask, document_ends, document_starts
from swamla_titan.model.layers import rotate, rotation

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [  # B, T, H, nope, rope, v
    (2, 70, 3, 32, 16, 32),
    (1, 33, 20, 24, 8, 40),  # heads that fill no tile, widths that are no powers of two
    (2, 1, 1, 16, 16, 16),
]
CASES = [("plain", torch.float32, shape) for shape in SHAPES]
if not INTERPRETED:
    CASES += [("cudnn", torch.bfloat16, shape) for shape in ((2, 300, 4, 128, 64, 128), (2, 256, 2, 64, 32, 64))]
    CASES += [("cudnn", torch.bfloat16, (batch, tokens, 4, 128, 64, 128)) for batch, tokens in ((1, 1), (3, 1), (2, 2))]


if not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    CASES += [("hopper", torch.bfloat16, (batch, tokens, 4, 128, 64, 128)) for batch, tokens in ((2, 300), (1, 1))]

CASES += [("documents", torch.float16, (2, 70, 3, 32, 16, 32)), ("documents", torch.float16, (1, 200, 2, 128, 64, 128))]


def apart(query, keys_values, rope_key, by, scale, mask=None):
    nope = query.shape[-1] - rope_key.shape[-1]
    q_nope, q_rope = query.split([nope, rope_key.shape[-1]], dim=-1)
    k_nope, value = keys_values.split([nope, keys_values.shape[-1] - nope], dim=-1)
    query = torch.cat([q_nope, rotate(q_rope, by)], dim=-1)
    key = torch.cat([k_nope, rotate(rope_key[:, :, None], by).expand(-1, -1, query.shape[2], -1)], dim=-1)
    return reference_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask, scale).transpose(1, 2)


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("kernel, dtype, shape", CASES, ids=str)
def test_value_and_gradients_equal_the_steps_apart(kernel, dtype, shape, own_positions):
    batch, tokens, heads, nope, rope, width = shape
    query = torch.randn(batch, tokens, heads, nope + rope, device=DEVICE).to(dtype).requires_grad_()
    keys_values = torch.randn(batch, tokens, heads, nope + width, device=DEVICE).to(dtype).requires_grad_()
    beside = (
        torch.randn(batch, tokens, 24 + rope, device=DEVICE).to(dtype).requires_grad_()
    )  # the latent lies there too
    positions = torch.arange(tokens, device=DEVICE)[None]
    if own_positions:
        positions = (positions * torch.arange(1, batch + 1, device=DEVICE)[:, None]).contiguous()
    by, exact_by = (rotation(positions, rope, 10000.0, 1.0, kind) for kind in (torch.float32, torch.float64))
    scale = (nope + rope) ** -0.5
    how, mask = {"kernel": kernel}, None
    if kernel == "documents":
        starts = document_starts((torch.rand(batch, tokens, device=DEVICE) < 0.05).cumsum(1))
        how, mask = (
            dict(zip(("starts", "ends"), (starts.int(), document_ends(starts).int()))),
            dense_mask(starts, None, 0),
        )
    attend = latent_attention
    if kernel == "hopper":
        how, attend = {}, latent_hopper_attention
    ours = attend(query, keys_values, beside[..., 24:], *by, scale, **how)
    inputs = query, keys_values, beside
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = apart(exact_inputs[0], exact_inputs[1], exact_inputs[2][..., 24:], exact_by, scale, mask)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}[dtype]
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() < tolerance * exact.norm()
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(exact, exact_inputs, upstream.double())
    for name, a, b in zip(("query", "keys_values", "rope_key"), gradients, expected):
        floor = 0.1 * b.numel() ** 0.5  # one token has no gradient but the value's
        assert (a.double() - b).norm() < 2 * tolerance * b.norm().clamp(min=floor), name


def test_the_operators_declare_what_they_do():
    query, keys_values = (torch.randn(2, 20, 2, 48, device=DEVICE, requires_grad=True) for _ in range(2))
    rope_key = torch.randn(2, 20, 16, device=DEVICE, requires_grad=True)
    by = rotation(torch.arange(20, device=DEVICE)[None], 16, 10000.0, 1.0, torch.float32)
    inputs = query, keys_values, rope_key, *by, 0.3, None, None, "plain"
    torch.library.opcheck(torch.ops.swamla_titan.latent_attention.default, inputs, atol=1e-5, rtol=1e-5)
