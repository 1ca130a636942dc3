"""Which form of mask "auto" takes, decided on a CPU for a GPU; and the rotations' dtype."""

import pytest
import torch

from swamla_titan.kernels import device as kernel_device
from swamla_titan.kernels.attention import dispatch, masks
from swamla_titan.kernels.attention.dispatch import ATTENTION_BACKENDS, FLEX, LATENT, Heads, Request, choose
from swamla_titan.kernels.attention.masks import MaskSpec
from swamla_titan.model import ModelConfig
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.branch import Attention, FusedAttention
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.context import FullSequences
from tests.model.tiny import TINY, build, random_tokens

build_context = FullSequences().context


@pytest.mark.parametrize(
    "dtype, widths, taken",
    [
        (torch.bfloat16, (192, 128), True),
        (torch.float16, (192, 128), True),
        (torch.float32, (192, 128), False),  # out of shared memory
        (torch.float32, (128, 192), False),
        (torch.float32, (128, 128), True),
        (torch.float64, (128, 128), False),
        (torch.bfloat16, (16, 16), True),
        (torch.bfloat16, (15, 16), False),
        (torch.bfloat16, (16, 15), False),
    ],
)
def test_what_flex_takes(dtype, widths, taken):
    request = Request(torch.device("cuda"), dtype, Heads(4, 4, *widths), MaskSpec(), 20, True)
    assert (FLEX.why_not(request) is None) == taken


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "config, dtype, swa, mla",
    [
        (ModelConfig(swa_window=8), torch.bfloat16, "flex", "flex"),
        (ModelConfig(swa_window=8), torch.float32, "flex", "dense"),
        (ModelConfig(swa_window=8), torch.float64, "dense", "dense"),
        (TINY, torch.bfloat16, "dense", "dense"),  # heads of 8, 16 and 9
        (ModelConfig(swa_window=8, v_head_dim=8), torch.bfloat16, "flex", "dense"),
        (ModelConfig(swa_window=8, dim=128, num_heads=16), torch.bfloat16, "dense", "flex"),
    ],
)
def test_auto_takes_flex_where_it_runs_and_booleans_elsewhere(monkeypatch, config, dtype, documents, swa, mla):
    """The device is a CUDA device in name only: what would be made on it is recorded, not made."""
    made = {"block_mask": "flex", "block_mask_of_one_document": "flex", "dense_mask": "dense"}
    for name, form in made.items():
        monkeypatch.setattr(masks, name, lambda *args, form=form: form)
    monkeypatch.setattr(Attention, "rotation", lambda *args: None)
    for name in ("zeros", "arange"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **keys: real(*args, **keys | {"device": "cpu"}))
    ids = (torch.arange(20) > 7).long()[None] if documents else None
    for name in ("why_not_window_kernel", "why_not_document_kernel"):
        monkeypatch.setattr(dispatch, name, lambda *args: "no")
    built = build_context(config, 20, ids, torch.device("cuda"), dtype)
    assert built["swa"].mask == swa
    assert built["mla"].mask == (mla if documents else None)


@pytest.mark.parametrize(
    "backend, dtype, rows, capability, path",
    [
        ("auto", torch.bfloat16, "whole", (9, 0), "triton"),
        ("auto", torch.bfloat16, "whole", (8, 0), "flex"),  # nobody has timed it there
        ("auto", torch.float32, "whole", (9, 0), "flex"),
        ("auto", torch.bfloat16, "parts", (9, 0), "flex"),
        ("triton", torch.float32, "whole", (8, 0), "triton"),
        ("flex", torch.bfloat16, "whole", (9, 0), "flex"),
    ],
)
def test_where_windows_go_to_our_kernel(monkeypatch, backend, dtype, rows, capability, path):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, gpu = ModelConfig(dim=1536, num_heads=16, swa_window=8), torch.device("cuda")
    request = BLOCKS["swa"].request(config, 64, True, gpu, dtype, chunk=None if rows == "whole" else 16)
    assert choose(request, backend).implementation.label == path


@pytest.mark.parametrize(
    "backend, dtype, rows, v_width, capability, path",
    [
        ("auto", torch.bfloat16, "whole", 128, (9, 0), "triton"),
        ("auto", torch.bfloat16, "whole", 64, (9, 0), "flex"),  # not timed
        ("triton", torch.bfloat16, "whole", 64, (9, 0), "triton"),
        ("auto", torch.bfloat16, "whole", 128, (8, 0), "flex"),
        ("auto", torch.bfloat16, "parts", 128, (9, 0), "flex"),
        ("triton", torch.bfloat16, "whole", 128, (8, 0), "triton"),
        ("triton", torch.bfloat16, "parts", 128, (9, 0), "flex"),
        ("triton", torch.bfloat16, "whole", 96, (9, 0), "flex"),
        ("triton", torch.float32, "whole", 128, (9, 0), "sdpa"),
        ("flex", torch.bfloat16, "whole", 128, (9, 0), "flex"),
    ],
)
def test_where_documents_of_mla_go_to_our_kernel(monkeypatch, backend, dtype, rows, v_width, capability, path):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, gpu = ModelConfig(v_head_dim=v_width), torch.device("cuda")
    request = BLOCKS["mla"].request(config, 64, True, gpu, dtype, chunk=None if rows == "whole" else 16)
    assert choose(request, backend).implementation.label == path


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_of_one_token_need_no_mask_and_no_kernel_that_takes_masks(monkeypatch, device, backend, documents):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Attention, "rotation", lambda *args: None)
    for name in ("zeros", "arange"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **keys: real(*args, **keys | {"device": "cpu"}))
    ids = torch.tensor([[3], [5]]) if documents else None
    built = build_context(ModelConfig(swa_window=1), 1, ids, torch.device(device), torch.bfloat16, backend)
    for kind in ("swa", "mla"):
        assert built[kind].mask is None
        assert (built[kind].implementation.name == "reference") == (backend == "reference")
    assert built["mla"].positions.tolist() == ([[0], [0]] if documents else [[0]])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "length, window, sink",
    [(1, 1, 0), (1, 8, 4), (2, 1, 0), (2, 1, 8), (3, 2, 1), (3, 256, 4), (5, 1, 1), (5, 5, 0), (5, 4, 64)],
)
def test_the_smallest_rows_in_value_and_gradient(length, window, sink, documents):
    """Shorter than window and sink, windows of the query alone, no sinks, one key head: SDPA against the reference."""
    model = build(num_kv_heads=1, swa_window=window, swa_sink_size=sink)
    tokens = random_tokens(2, length)
    ids = (torch.arange(length) > length // 2).long().expand(2, -1) if documents else None
    found = []
    for backend in ("auto", "reference"):
        model.attention_backend = backend
        loss = model(tokens, tokens.roll(1, 0), ids)
        found.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)


def test_our_kernel_s_rule_of_documents_says_where_they_begin_and_end(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_document_kernel", lambda *args: None)
    ids = torch.tensor([[0, 0, 0, 1, 1], [4, 4, 4, 4, 4]])
    rule = build_context(TINY, 5, ids, torch.device("cpu"), torch.bfloat16, "triton")["mla"].mask
    assert rule.starts.tolist() == [[0, 0, 0, 3, 3], [0] * 5]
    assert rule.ends.tolist() == [[3, 3, 3, 5, 5], [5] * 5]
    assert rule.starts.dtype == rule.ends.dtype == torch.int32
    assert build_context(TINY, 5, None, torch.device("cpu"), torch.bfloat16, "triton")["mla"].mask is None


@pytest.mark.parametrize("documents", [False, True])
def test_mla_hands_the_rule_of_documents_to_what_does_all_at_once(monkeypatch, documents):
    monkeypatch.setattr(dispatch, "why_not_document_kernel", lambda *args: None)
    attention = next(
        block.attention for block in build(torch.float32).blocks.values() if hasattr(block.attention, "wkv_b")
    )
    given = []

    def all_at_once(query, keys_values, rope_key, cos, sin, scale, *bounds):
        given.extend(bounds)
        return query.new_zeros(*query.shape[:3], TINY.v_head_dim)

    monkeypatch.setattr(dispatch, "latent_attention", all_at_once)
    attention.fused_attention = FusedAttention(LATENT)
    ids = torch.tensor([[0, 0, 1, 1, 1]]) if documents else None
    shared = build_context(TINY, 5, ids, torch.device("cpu"), torch.float32, "triton")["mla"]
    attention(torch.randn(1, 5, TINY.dim), shared)
    expected = [shared.mask.starts, shared.mask.ends] if documents else []
    assert len(given) == len(expected)
    assert all(a is b for a, b in zip(given, expected))


@pytest.mark.parametrize(
    "activations, wide",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rotations_are_float32_or_wider_whatever_the_activations(activations, wide):
    built = build_context(TINY, 60, None, torch.device("cpu"), activations)
    exact = build_context(TINY, 60, None, torch.device("cpu"), torch.float64)
    for kind in ("swa", "mla"):
        for ours, theirs in zip(built[kind].rotation, exact[kind].rotation):
            assert ours.dtype == wide
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-7)


def test_decoding_s_rotations_are_float32_under_bfloat16_activations():
    model = build(torch.float32)
    model.compute_dtype = torch.bfloat16
    cache = DecodeCache(model, 1, 10)
    model.prefill(random_tokens(1, 5), cache)
    following = cache.next_context("auto")
    for kind in ("swa", "mla"):
        rotation = following[kind].rotation
        assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
