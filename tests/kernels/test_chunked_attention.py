"""Chunks of queries over a whole row, merged from two kernel calls each, against attention of the whole row."""

import pytest
import torch

from swamla_titan.kernels.attention.causal import chunked_causal_attention, why_not_cudnn_heads
from swamla_titan.kernels.attention.dispatch import REFERENCE

STARTS = [[0], [0, 24], [8, 16], [16], [24, 0]]
CHUNK = 8


def inputs(dtype, starts, device="cpu", batch=2, row=32, chunk=CHUNK, heads=3, width=12, v_width=7):
    """Queries of the chunks, keys and values of the row; the values are a slice of something wider, as in MLA."""
    queries = torch.randn(batch, row, heads, width, device=device, dtype=dtype)
    mine = torch.cat([queries[:, a : a + chunk] for a in starts], dim=1)
    key = torch.randn(batch, row, heads, width, device=device, dtype=dtype)
    value = torch.randn(batch, row, heads, v_width + 8, device=device, dtype=dtype)[..., 8:]
    return [x.detach().requires_grad_() for x in (mine, key, value)]


def exact(query, key, value, starts, scale):
    """Float64, every pair: [B, chunks, H, E]."""
    length = query.shape[1] // len(starts)
    positions = torch.cat([torch.arange(a, a + length, device=query.device) for a in starts])
    mask = positions[:, None] >= torch.arange(key.shape[1], device=query.device)
    return REFERENCE.call(query, key, value, mask, scale)


def check(dtype, starts, attend, tolerance, kernel, device="cpu", **shape):
    ours_in = inputs(dtype, starts, device, **shape)
    exact_in = [x.detach().double().requires_grad_() for x in ours_in]
    scale = ours_in[0].shape[-1] ** -0.5
    ours = attend(*ours_in, starts, scale, kernel)
    assert ours.dtype == dtype
    reference = exact(*exact_in, starts, scale)
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, ours_in, upstream)
    exact_gradients = torch.autograd.grad(reference, exact_in, upstream.double())
    pairs = {"out": (ours, reference)} | {n: p for n, *p in zip("qkv", gradients, exact_gradients)}
    for name, (a, b) in pairs.items():
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_merged_chunks_equal_attention_of_the_row(dtype, tolerance, starts):
    check(dtype, starts, chunked_causal_attention, tolerance, "plain")


def test_compiled_without_a_break():
    compiled = torch.compile(chunked_causal_attention, fullgraph=True, dynamic=False)
    check(torch.float64, [8, 16], compiled, 1e-13, "plain")


def test_the_operators_declare_what_they_do():
    query, key, value = inputs(torch.float64, [8, 16])
    torch.library.opcheck(
        torch.ops.swamla_titan.chunked_causal_attention.default, (query, key, value, [8, 16], 0.3, "plain")
    )


def test_a_score_far_above_all_others_does_not_overflow_the_merge():
    query, key, value = inputs(torch.float32, [8, 16])
    with torch.no_grad():
        key[:, 3] *= 1000
    out = chunked_causal_attention(query, key, value, [8, 16], 1.0, "plain")
    reference = exact(query.double(), key.double(), value.double(), [8, 16], 1.0)
    torch.testing.assert_close(out.double(), reference, rtol=1e-4, atol=1e-4)


def test_no_cudnn_on_a_cpu():
    assert why_not_cudnn_heads(torch.device("cpu"), torch.bfloat16, 128, 64, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("starts", [[0, 1536], [512, 1024], [512]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128)])
def test_cudnn_equals_the_reference(dtype, starts, compiled, widths):
    device = torch.device("cuda", torch.cuda.current_device())
    assert why_not_cudnn_heads(device, dtype, 2048, 512, *widths) is None
    torch._dynamo.reset()
    attend = torch.compile(chunked_causal_attention, fullgraph=True) if compiled else chunked_causal_attention
    shape = {"batch": 2, "row": 2048, "chunk": 512, "heads": 4, "width": widths[0], "v_width": widths[1]}
    check(dtype, starts, attend, 1e-2, "cudnn", device, **shape)


@pytest.mark.gpu
def test_cudnn_does_not_take_float32():
    assert why_not_cudnn_heads(torch.device("cuda", torch.cuda.current_device()), torch.float32, 2048, 512, 192, 128)
