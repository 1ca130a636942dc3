"""The GPU's paths against the float64 reference, in value and gradient. Run with -m gpu."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from swamla_titan.kernels.attention.dispatch import CAUSAL
from swamla_titan.kernels.attention.masks import block_mask, document_starts
from swamla_titan.kernels.cross_entropy import cross_entropy
from swamla_titan.model import ModelConfig
from swamla_titan.model.context import FullSequences

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]
# Norm of the error over norm of the result. float32 leaves room for TF32 products inside a kernel.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 3e-3}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # each case has shapes of its own; together they would exceed the recompilation limit


def context(seq_len, window, sink, documents, backend, dtype=torch.bfloat16):
    config = ModelConfig(swa_window=window, swa_sink_size=sink)
    return FullSequences().context(config, seq_len, documents, torch.device("cuda"), dtype, backend)


def random_documents(batch, seq_len):
    return (torch.rand(batch, seq_len, device="cuda") < 5 / seq_len).cumsum(dim=1)


def relative_error(ours, exact):
    scale = exact.norm().item() or exact.numel() ** 0.5  # of rows of one token queries and keys get no gradient
    return (ours.double() - exact).norm().item() / scale


def check(inputs, fast, reference, scale):
    """inputs in their dtype through the fast path against float64 copies through the reference."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours = fast.attend(*inputs, scale)
    exact = reference.attend(*exact_inputs, scale)
    assert ours.dtype == inputs[0].dtype
    tolerance = TOLERANCE[ours.dtype]
    assert relative_error(ours, exact) < tolerance
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, upstream.double())
    for name, a, b in zip("qkv", gradients, exact_gradients):
        assert relative_error(a, b) < 2 * tolerance, f"gradient of {name}"


def random_inputs(shapes, dtype):
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "seq_len, head_dim, heads, key_heads, window, sink",
    [
        (512, 64, 4, 4, 128, 4),
        (512, 96, 4, 4, 128, 4),
        (512, 128, 4, 4, 128, 4),
        (512, 128, 4, 2, 128, 4),
        (700, 96, 4, 1, 100, 4),  # not a multiple of the tile
        (333, 128, 2, 2, 64, 0),
        (333, 64, 2, 2, 1, 40),
        (90, 128, 2, 2, 256, 4),  # shorter than window and tile
    ],
)
def test_swa(dtype, documents, seq_len, head_dim, heads, key_heads, window, sink):
    ids = random_documents(2, seq_len) if documents else None
    fast = context(seq_len, window, sink, ids, "flex", dtype)["swa"]
    exact = context(seq_len, window, sink, ids, "reference")["swa"]
    if documents or window < seq_len:
        assert isinstance(fast.mask, BlockMask)
    shapes = [(2, seq_len, heads, head_dim)] + 2 * [(2, seq_len, key_heads, head_dim)]
    check(random_inputs(shapes, dtype), fast, exact, head_dim**-0.5)


@pytest.mark.parametrize("documents", [False, True])
def test_bare_calls_take_more_lengths_than_dynamo_s_limit(documents):
    for seq_len in range(130, 130 + 12 * 37, 37):
        ids = random_documents(2, seq_len) if documents else None
        fast = context(seq_len, 128, 4, ids, "flex")["swa"]
        assert isinstance(fast.mask, BlockMask)
        exact = context(seq_len, 128, 4, ids, "reference")["swa"]
        shapes = [(2, seq_len, 4, 64)] + 2 * [(2, seq_len, 2, 64)]
        check(random_inputs(shapes, torch.bfloat16), fast, exact, 64**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("seq_len", [512, 333])
def test_mla(dtype, documents, seq_len):
    ids = random_documents(2, seq_len) if documents else None
    fast = context(seq_len, 64, 4, ids, "flex", dtype)["mla"]
    exact = context(seq_len, 64, 4, ids, "reference")["mla"]
    if documents:
        assert isinstance(fast.mask, BlockMask) == (dtype == torch.bfloat16)
    else:
        assert fast.mask is None
    shapes = [(2, seq_len, 4, 192), (2, seq_len, 4, 192), (2, seq_len, 4, 128)]
    check(random_inputs(shapes, dtype), fast, exact, 192**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton", "flex", "sdpa"])
@pytest.mark.parametrize("batch, seq_len", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_the_smallest_rows(dtype, documents, backend, batch, seq_len):
    """One token, with and without documents, which cuDNN does not take; windows without a neighbour; one key head."""
    ids = torch.arange(batch * seq_len, device="cuda").view(batch, seq_len) // 2 if documents else None
    for window, sink in ((1, 0), (2, 1), (256, 4)):
        built, exact = (context(seq_len, window, sink, ids, how, dtype) for how in (backend, "reference"))
        for head_dim, heads, key_heads in ((64, 4, 1), (128, 2, 2), (256, 2, 1)):
            if head_dim == 256 and not isinstance(built["swa"].mask, (torch.Tensor, type(None))):
                continue  # chosen for another width
            shapes = [(batch, seq_len, heads, head_dim)] + 2 * [(batch, seq_len, key_heads, head_dim)]
            check(random_inputs(shapes, dtype), built["swa"], exact["swa"], head_dim**-0.5)
        shapes = [(batch, seq_len, 4, 192), (batch, seq_len, 4, 192), (batch, seq_len, 4, 128)]
        check(random_inputs(shapes, dtype), built["mla"], exact["mla"], 192**-0.5)


def test_mla_takes_cudnn():
    query, key, value = random_inputs([(2, 512, 4, 192), (2, 512, 4, 192), (2, 512, 4, 128)], torch.bfloat16)
    with torch.profiler.profile() as profile:
        CAUSAL.call(query, key, value, None, 192**-0.5)
    assert any("cudnn" in event.key for event in profile.key_averages()), [e.key for e in profile.key_averages()]


def test_document_tiles_on_the_gpu_equal_those_of_the_cpu():
    ids = random_documents(3, 700)
    gpu = context(700, 100, 4, ids, "flex")
    for mask, window, sink in ((gpu["swa"].mask, 100, 4), (gpu["mla"].mask, None, 0)):
        cpu = block_mask(document_starts(ids.cpu()), window, sink)
        assert torch.equal(mask.to_dense().cpu(), cpu.to_dense())
        assert torch.equal(mask.full_kv_num_blocks.cpu(), cpu.full_kv_num_blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_cross_entropy_needs_no_float32_copy_of_the_logits(dtype):
    logits = torch.randn(4096, 50304, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(0, 50257, (4096,), device="cuda")
    targets[::7] = -100
    compiled = torch.compile(cross_entropy, fullgraph=True)
    compiled(logits, targets, 50257, z_loss=1e-4).backward()  # compile first: tuning takes memory too
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = compiled(logits, targets, 50257, z_loss=1e-4)
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The gradient itself is as large as the logits. A float32 copy would add 4 bytes an element.
    assert extra < 1.3 * logits.numel() * logits.element_size()
    exact_logits = logits.detach().double().requires_grad_()
    exact = cross_entropy(exact_logits, targets, 50257, z_loss=1e-4)
    exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-5
    assert relative_error(logits.grad, exact_logits.grad) < TOLERANCE[dtype]
