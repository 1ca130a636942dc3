"""Our kernels of attention inside documents against the float64 reference. Run with -m gpu.

With TRITON_INTERPRET=1 they run on a CPU, slowly (Triton 3.6 does it with NumPy before 2.4, and not in bfloat16).
"""

import os

import pytest
import torch

from swamla_titan.kernels.attention import document as document_attention_file
from swamla_titan.kernels.attention.dispatch import DOCUMENT
from swamla_titan.kernels.attention.document import document_attention, why_not_document_kernel
from swamla_titan.kernels.attention.masks import DocumentRule, dense_mask, document_ends, document_starts
from swamla_titan.kernels.device import Tiles
from tests.kernels.nearness import assert_equals_reference

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # norm of the error over the result's
SHAPES = {  # tokens, heads, width, width of values, mean length of documents
    "as base has them": (400, 2, 192, 128, 90),
    "one document": (300, 2, 192, 128, 0),
    "narrow heads": (300, 2, 48, 32, 40),
    "equal widths": (257, 3, 128, 128, 30),
    "tiny documents": (200, 2, 96, 64, 2),
    "a single token": (1, 1, 192, 128, 0),
    "shorter than a tile": (7, 1, 80, 16, 3),
    "a multiple of the tile": (256, 1, 192, 128, 128),
}


def inputs(shape, dtype):
    """Queries, keys and values, those as views of what the keys' parts lie in as well, and document starts."""
    seq_len, heads, width, v_width, documents = shape
    query = torch.randn(2, seq_len, heads, width, device=DEVICE, dtype=dtype)
    key = torch.randn(2, seq_len, heads, width, device=DEVICE, dtype=dtype)
    value = torch.randn(2, seq_len, heads, v_width + 32, device=DEVICE, dtype=dtype)[..., 32:]
    ids = (torch.rand(2, seq_len, device=DEVICE) < (1 / documents if documents else 0)).cumsum(dim=1)
    return [x.detach().requires_grad_() for x in (query, key, value)], document_starts(ids)


def rule_of(starts):
    return starts.to(torch.int32), document_ends(starts).to(torch.int32)


def check(shape, dtype, attend=document_attention):
    ours_in, starts = inputs(shape, dtype)
    scale = shape[2] ** -0.5
    ours = attend(*ours_in, *rule_of(starts), scale)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    mask = dense_mask(starts, None, 0)
    assert_equals_reference(ours, ours_in, mask, scale, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_equal_the_reference(shape, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    check(shape, dtype)


@pytest.mark.tedious
@pytest.mark.parametrize("shape", ["narrow heads", "tiny documents"])
@pytest.mark.parametrize("of_queries, of_keys", [((16, 64), (64, 16)), ((64, 16), (16, 64)), ((128, 32), (32, 128))])
def test_tiles_of_any_size(of_queries, of_keys, shape, monkeypatch):
    of_queries, of_keys = (Tiles(*rows, 4, 2) for rows in (of_queries, of_keys))
    monkeypatch.setattr(document_attention_file, "FORWARD", of_queries)
    monkeypatch.setattr(document_attention_file, "BACKWARD", (of_queries, of_keys))
    check(SHAPES[shape], torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes there")
@pytest.mark.parametrize("documents", [0, 500])
def test_of_real_size(documents):
    check((2048, 4, 192, 128, documents), torch.bfloat16)


@pytest.mark.tedious
def test_every_run_gives_the_same_bits():
    (query, key, value), starts = inputs(SHAPES["as base has them"], torch.float16)
    upstream = torch.randn_like(value)
    found = []
    for _ in range(3):
        out = document_attention(query, key, value, *rule_of(starts), 0.07)
        found.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_operators_declare_what_they_do():
    (query, key, value), starts = inputs((40, 2, 48, 32, 10), torch.float16)
    torch.library.opcheck(
        torch.ops.swamla_titan.document_attention.default,
        (query, key, value, *rule_of(starts), 0.2),
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="generates code for a GPU")
def test_compiled_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda query, key, value, starts, ends, scale: DOCUMENT.call(
            query, key, value, DocumentRule(starts, ends), scale
        ),
        fullgraph=True,
        dynamic=False,
    )
    check(SHAPES["as base has them"], torch.bfloat16, compiled)


def test_what_the_kernel_does_not_take():
    gpu = torch.device("cuda")
    assert why_not_document_kernel(gpu, torch.bfloat16, 192, 128) is None
    for width, v_width, dtype in ((224, 128, torch.bfloat16), (192, 96, torch.bfloat16), (192, 128, torch.float32)):
        assert why_not_document_kernel(gpu, dtype, width, v_width)
    assert why_not_document_kernel(torch.device("cpu"), torch.bfloat16, 192, 128)
