"""Our kernels of sliding-window attention against the float64 reference. Run with -m gpu.

With TRITON_INTERPRET=1 they run on a CPU, slowly (Triton 3.6 does it with NumPy before 2.4, and not in bfloat16).
"""

import os

import pytest
import torch

from swamla_titan.kernels.attention import window as window_attention_file
from swamla_titan.kernels.attention.dispatch import WINDOW
from swamla_titan.kernels.attention.hopper_window import why_not_hopper_window
from swamla_titan.kernels.attention.masks import WindowRule, dense_mask, document_starts
from swamla_titan.kernels.attention.window import why_not_window_kernel, window_attention
from swamla_titan.kernels.limits import WINDOW_SINKS
from tests.kernels.nearness import assert_equals_reference

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}  # norm of the error over the result's
SHAPES = {
    "one document": (400, 96, 2, 2, 128, 4, 0),
    "heads of 64": (300, 64, 2, 2, 40, 4, 6),
    "heads of 128, grouped": (300, 128, 4, 2, 100, 4, 6),
    "one key head": (257, 96, 4, 1, 64, 4, 3),
    "shorter than the window": (90, 128, 2, 2, 256, 4, 0),
    "shorter than a tile": (5, 96, 1, 1, 3, 4, 0),
    "a single token": (1, 64, 1, 1, 256, 4, 0),
    "a window of 1": (333, 64, 2, 2, 1, 40, 3),
    "sinks fill a window": (300, 64, 1, 1, 33, 33, 2),
    "more sinks than the window": (300, 96, 1, 1, 16, 64, 2),
    "no sinks": (257, 64, 2, 1, 64, 0, 4),
    "many documents": (300, 96, 2, 2, 64, 4, 60),
}


def inputs(shape, dtype):
    """Queries, keys and values as views of one tensor, as the model has them, and document starts or None."""
    seq_len, width, heads, key_heads, _, _, documents = shape
    together = torch.randn(2, seq_len, heads + 2 * key_heads, width, device=DEVICE, dtype=dtype)
    query, key, value = together.split([heads, key_heads, key_heads], dim=2)
    ids = (torch.rand(2, seq_len, device=DEVICE) < documents / seq_len).cumsum(dim=1)
    return [x.detach().requires_grad_() for x in (query, key, value)], document_starts(ids)


def check(shape, dtype, attend=window_attention):
    _, width, _, _, window, sink, documents = shape
    ours_in, starts = inputs(shape, dtype)
    scale = width**-0.5
    ours = attend(*ours_in, starts.to(torch.int32) if documents else None, window, sink, scale)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    mask = dense_mask(starts, window, sink)
    assert_equals_reference(ours, ours_in, mask, scale, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_equal_the_reference(shape, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    check(shape, dtype)


def by_hopper_s_kernels(*given):
    return window_attention(*given, kernel="cuda")


HOPPER_SHAPES = SHAPES | {
    "far sinks in two tiles": (520, 96, 1, 1, 100, 20, 2),
    "heads of 64 of real size": (2048, 64, 4, 4, 256, 4, 0),
    "heads of 96 of real size": (1999, 96, 8, 2, 300, 17, 3),
    "heads of 128 of real size": (2048, 128, 4, 2, 256, 4, 12),
}


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA C++")
@pytest.mark.parametrize("shape", HOPPER_SHAPES.values(), ids=HOPPER_SHAPES)
def test_hopper_s_kernels_equal_the_reference(shape):
    if why := why_not_hopper_window(torch.device("cuda"), torch.bfloat16, shape[1], shape[5], shape[6] > 0):
        pytest.skip(why)
    check(shape, torch.bfloat16, by_hopper_s_kernels)
    (query, key, value), starts = inputs(shape, torch.bfloat16)
    upstream = torch.randn_like(query)
    found = []
    for _ in range(2):
        out = by_hopper_s_kernels(query, key, value, starts.to(torch.int32) if shape[6] else None, *shape[4:6], 0.1)
        found.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*found)), "differs from run to run"


@pytest.mark.tedious
@pytest.mark.parametrize(
    "shape", ["one document", "sinks fill a window", "more sinks than the window", "many documents"]
)
@pytest.mark.parametrize("of_queries, of_keys", [((16, 64), (64, 16)), ((64, 16), (16, 64)), ((128, 64), (32, 32))])
def test_tiles_of_any_size(of_queries, of_keys, shape, monkeypatch):
    of_queries, of_keys = (window_attention_file.Tiles(*rows, 4, 2) for rows in (of_queries, of_keys))
    monkeypatch.setattr(window_attention_file, "forward_tiles", lambda dtype, width: of_queries)
    monkeypatch.setattr(window_attention_file, "backward_tiles", lambda dtype, width: (of_queries, of_keys))
    check(SHAPES[shape], torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes there")
@pytest.mark.parametrize("documents", [0, 12])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_of_real_size(width, documents):
    check((2048, width, 4, 2, 256, 4, documents), torch.bfloat16)


@pytest.mark.tedious
def test_gradients_arrive_in_any_layout():
    (query, key, value), _ = inputs(SHAPES["one document"], torch.float32)
    out = window_attention(query, key, value, None, 128, 4, 0.1)
    batch, seq_len, heads, width = out.shape
    for upstream in (
        torch.randn(batch, seq_len, width, heads, device=DEVICE).transpose(2, 3),
        torch.randn(batch, heads, seq_len, width, device=DEVICE).transpose(1, 2),
        torch.randn(batch, 1, 1, width, device=DEVICE).expand(out.shape),
        torch.randn(batch, seq_len, heads * width + 1, device=DEVICE)[..., 1:].unflatten(-1, (heads, width)),
        torch.randn(out.numel() + 1, device=DEVICE)[1:].view(out.shape),  # contiguous, but for where it begins
    ):
        gradients = torch.autograd.grad(out, (query, key, value), upstream, retain_graph=True)
        expected = torch.autograd.grad(
            out, (query, key, value), upstream.clone(memory_format=torch.contiguous_format), retain_graph=True
        )
        for a, b in zip(gradients, expected):
            assert torch.equal(a, b)


@pytest.mark.tedious
def test_every_run_gives_the_same_bits():
    (query, key, value), starts = inputs(SHAPES["heads of 128, grouped"], torch.float16)
    upstream = torch.randn_like(query)
    found = []
    for _ in range(3):
        out = window_attention(query, key, value, starts.to(torch.int32), 100, 4, 0.1)
        found.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_operators_declare_what_they_do():
    (query, key, value), starts = inputs((40, 64, 2, 1, 16, 4, 3), torch.float32)
    for each in (None, starts.to(torch.int32)):
        torch.library.opcheck(
            torch.ops.swamla_titan.window_attention.default, (query, key, value, each, 16, 4, 0.3), atol=1e-5, rtol=1e-5
        )


@pytest.mark.skipif(DEVICE == "cpu", reason="generates code for a GPU")
@pytest.mark.parametrize("documents", [0, 5])
def test_compiled_without_a_break(documents):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda query, key, value, starts, window, sink, scale: WINDOW.call(
            query, key, value, WindowRule(starts, window, sink), scale
        ),
        fullgraph=True,
        dynamic=False,
    )
    check((300, 96, 2, 2, 64, 4, documents), torch.bfloat16, compiled)


def test_what_the_kernel_does_not_take():
    gpu = torch.device("cuda")
    assert why_not_window_kernel(gpu, torch.bfloat16, 96, 4) is None
    assert why_not_window_kernel(gpu, torch.float32, 128, 4) is None
    for width, sink, dtype in (
        (80, 4, torch.bfloat16),
        (96, WINDOW_SINKS + 1, torch.bfloat16),
        (96, 4, torch.float64),
    ):
        assert why_not_window_kernel(gpu, dtype, width, sink)
    assert why_not_window_kernel(torch.device("cpu"), torch.bfloat16, 96, 4)
