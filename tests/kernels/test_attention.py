"""The reference against arithmetic by hand, and the CPU's fast path against the reference."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend

from swamla_titan.kernels.attention import dispatch as module
from swamla_titan.kernels.attention import latent as latent_module
from swamla_titan.kernels.attention.causal import why_not_cudnn_heads
from swamla_titan.kernels.attention.dispatch import FLEX, REFERENCE, SDPA, reference_attention
from swamla_titan.kernels.attention.masks import block_mask, block_mask_of_one_document, dense_mask, document_starts


def test_reference_is_a_softmax_average_of_the_keys_seen():
    query = torch.randn(2, 4, 7, 8, dtype=torch.float64)  # [B, H, T, D]
    key = torch.randn(2, 2, 7, 8, dtype=torch.float64)  # [B, G, S, D]
    value = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    mask = dense_mask(document_starts(torch.tensor([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])), 2, 1)
    out = reference_attention(query, key, value, mask, 0.3)
    for b in range(2):
        for h in range(4):
            for t in range(7):
                seen = [s for s in range(7) if mask[b, 0, t, s]]
                weights = torch.stack([(0.3 * query[b, h, t] @ key[b, h // 2, s]).exp() for s in seen])
                expected = sum(w * value[b, h // 2, s] for w, s in zip(weights, seen)) / weights.sum()
                torch.testing.assert_close(out[b, h, t], expected)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("widths", [(16, 16), (24, 16)])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "window+documents"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_sdpa_equals_the_reference_in_value_and_gradient(heads, key_heads, widths, kind, dtype, tolerance):
    qk, v = widths
    shapes = [(2, 37, heads, qk), (2, 37, key_heads, qk), (2, 37, key_heads, v)]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    ids = (torch.rand(2, 37) < 0.1).cumsum(dim=1) if "documents" in kind else torch.zeros(1, 37)
    mask = None if kind == "causal" else dense_mask(document_starts(ids), 6 if "window" in kind else None, 2)
    fast = SDPA.call(*inputs, mask, qk**-0.5)
    plain = REFERENCE.call(*inputs, mask, qk**-0.5)
    assert fast.shape == (2, 37, heads, v)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(plain, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_reference_softmax_is_float32_for_bfloat16_inputs():
    # 300 equal scores: in bfloat16 the weights 1/300 and their sum would be rounded to 3 digits.
    query = torch.zeros(1, 1, 300, 8, dtype=torch.bfloat16)
    value = torch.ones(1, 1, 300, 8, dtype=torch.bfloat16)
    out = reference_attention(query, query, value, None, 1.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, torch.ones_like(out), rtol=4e-3, atol=0)


@pytest.fixture
def eager_flex(monkeypatch):
    """Bare flex calls as on a GPU, but that the traced graph is run as it is: the CPU has no kernel to wait for."""
    torch._dynamo.reset()
    compiled = module._compiled_flex.__wrapped__("eager")
    monkeypatch.setattr(module, "_compiled_flex", lambda: compiled)
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*unfused.*")
@pytest.mark.parametrize("documents", [False, True])
@torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3)
def test_bare_flex_calls_take_any_number_of_lengths(eager_flex, documents):
    for seq_len in range(40, 46):
        query, key, value = (torch.randn(2, seq_len, heads, 16) for heads in (4, 2, 2))
        if documents:
            starts = document_starts((torch.rand(2, seq_len) < 0.1).cumsum(dim=1))
            mask = block_mask(starts, 9, 2)
        else:
            starts = torch.zeros(1, seq_len, dtype=torch.int64)
            mask = block_mask_of_one_document(seq_len, 9, 2, torch.device("cpu"))
        plain = REFERENCE.call(query, key, value, dense_mask(starts, 9, 2), 0.3)
        torch.testing.assert_close(FLEX.call(query, key, value, mask, 0.3), plain)
    assert torch._dynamo.config.recompile_limit == 2  # other functions keep theirs


def test_cudnn_is_not_asked_under_a_mask():
    assert module._CUDA_BACKENDS[0] == SDPBackend.CUDNN_ATTENTION
    asked = []

    class OnAGpu(torch.Tensor):
        """A CPU tensor that says it is on a GPU."""

        is_cuda = True

    def recorded(backends, set_priority):
        asked.append(backends)
        return contextlib.nullcontext()

    inputs = [torch.randn(1, 2, 5, 16).as_subclass(OnAGpu) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sdpa_kernel", recorded)
        module._sdpa(*inputs, None, 1.0)
        module._sdpa(*inputs, torch.ones(5, 5, dtype=torch.bool), 1.0)
        module._sdpa(*(each[:, :, :1] for each in inputs), None, 1.0)  # rows of one token
    assert SDPBackend.CUDNN_ATTENTION in asked[0]
    assert asked[1] == [backend for backend in asked[0] if backend != SDPBackend.CUDNN_ATTENTION]
    assert asked[2] == asked[1]
    assert asked[2][-1] == SDPBackend.MATH, "which takes every shape"


@pytest.mark.parametrize(
    "queries, keys, is_masked, is_deterministic, why",
    [
        (2, 2, False, False, None),
        (2048, 2048, False, False, None),
        (1, 1, False, False, "a sequence of one token"),
        (1, 2048, False, False, "a sequence of one token"),
        (2048, 1, False, False, "a sequence of one token"),
        (2048, 2048, True, False, "a mask"),
        (16384, 16384, False, False, None),
        (16384, 16384, False, True, "deterministic algorithms"),
        (16383, 16383, False, True, None),
    ],
)
def test_the_lengths_that_cudnn_is_given(monkeypatch, queries, keys, is_masked, is_deterministic, why):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)
    said = module.why_not_cudnn(queries, keys, is_masked)
    assert said == why if why is None else said.startswith(why)
    assert (SDPBackend.CUDNN_ATTENTION in module.sdpa_backends(queries, keys, is_masked)) == (why is None)


@pytest.mark.parametrize("row, chunk", [(1, 1), (4, 1), (2, 1)])
def test_cudnn_is_not_given_chunks_of_one_token(row, chunk):
    assert why_not_cudnn_heads(torch.device("cuda"), torch.bfloat16, row, chunk, 192, 128)  # asks no GPU


def test_rows_of_one_token_leave_cudnn_where_rotation_and_attention_are_one(monkeypatch):
    kernels = []
    monkeypatch.setattr(latent_module, "_forward", lambda *inputs: kernels.append(inputs[-1]) or [None])
    for length in (1, 2, 300):
        heads, angles = torch.zeros(2, length, 4, 24), torch.zeros(1, length, 1, 4)
        latent_module.latent_attention(heads, heads, torch.zeros(2, length, 8), angles, angles, 1.0)
    assert kernels == ["plain", "cudnn", "cudnn"]
