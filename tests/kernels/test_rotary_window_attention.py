"""Split, rotate and attend as one operator, against the same steps apart in float64.

Run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.hopper_window import why_not_hopper_window
from swamla_titan.kernels.attention.masks import dense_mask, document_starts
from swamla_titan.kernels.attention.rotary_window import rotary_window_attention
from swamla_titan.model.layers import rotate, rotation

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


def apart(qkv, by, starts, window, sink, scale):
    query, key, value = qkv.split([qkv.shape[3] - 2, 1, 1], dim=3)
    query, key = rotate(query.flatten(2, 3), by), rotate(key.squeeze(3), by)
    parts = (x.transpose(1, 2) for x in (query, key, value.squeeze(3)))
    return reference_attention(*parts, dense_mask(starts, window, sink), scale).transpose(1, 2)


@pytest.mark.parametrize(
    "dtype, kernel", [*((dtype, "triton") for dtype in TOLERANCE), (torch.bfloat16, "cuda")], ids=str
)
@pytest.mark.parametrize(
    "tokens, groups, per_key, width, documents",
    [(150, 2, 1, 96, 0), (150, 2, 1, 64, 5), (70, 2, 3, 64, 3), (33, 1, 2, 96, 0), (1, 1, 1, 64, 0)],
)
def test_value_and_gradient_equal_the_steps_apart(tokens, groups, per_key, width, documents, dtype, kernel):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    if kernel == "cuda" and (
        why := why_not_hopper_window(torch.device("cuda"), torch.bfloat16, width, 4, documents > 0)
    ):
        pytest.skip(why)
    qkv = torch.randn(2, tokens, groups, per_key + 2, width, device=DEVICE).to(dtype).requires_grad_()
    starts = document_starts((torch.rand(2, tokens, device=DEVICE) < documents / tokens).cumsum(dim=1))
    places = torch.arange(tokens, device=DEVICE)[None]
    positions = places - starts if documents else places  # of each row its own, or the same for all
    by, exact_by = (rotation(positions, width, 10000.0, 1.0, kind) for kind in (torch.float32, torch.float64))
    rule = 40, 4, width**-0.5
    own = starts.to(torch.int32) if documents else None
    ours = rotary_window_attention(qkv, *by, own, *rule, kernel)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = apart(exact_qkv, exact_by, starts, *rule)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() < TOLERANCE[dtype] * exact.norm()
    upstream = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, qkv, upstream)
    (expected,) = torch.autograd.grad(exact, exact_qkv, upstream.double())
    for part in range(per_key + 2):
        a, b = gradient[..., part, :].double(), expected[..., part, :]
        assert (a - b).norm() < 2 * TOLERANCE[dtype] * b.norm().clamp(min=0.1 * b.numel() ** 0.5), part


def test_the_operators_declare_what_they_do():
    qkv = torch.randn(2, 20, 1, 3, 64, device=DEVICE, requires_grad=True)
    by = rotation(torch.arange(20, device=DEVICE)[None], 64, 10000.0, 1.0, torch.float32)
    torch.library.opcheck(
        torch.ops.swamla_titan.rotary_window_attention.default, (qkv, *by, None, 16, 4, 0.3), atol=1e-5, rtol=1e-5
    )
