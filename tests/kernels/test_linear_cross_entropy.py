"""Head and loss as one, against the head and kernels/cross_entropy.py; and the Triton kernel against plain PyTorch.

The kernel's tests run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from swamla_titan.kernels import cross_entropy as fused
from swamla_titan.kernels.cross_entropy import cross_entropy, linear_cross_entropy, plain_rows

VOCAB, PADDED, WIDTH = 50, 64, 24
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OPTIONS = [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 1e-2, "label_smoothing": 0.1}]


def example(tokens, dtype=torch.float64, weight_dtype=None, device="cpu", scale=1.0):
    x = torch.randn(tokens, WIDTH, device=device, dtype=dtype).requires_grad_()
    weight = (scale * torch.randn(PADDED, WIDTH, device=device)).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), device=device)
    targets[torch.rand(tokens, device=device) < 0.3] = -100
    return x, weight, targets


def apart(x, weight, targets, denominator, **options):
    return cross_entropy(x @ weight.to(x.dtype).T, targets, VOCAB, **options) / denominator


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 256, 700])  # in stretches of 256
def test_equals_head_and_loss(monkeypatch, tokens, options):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 256 * PADDED * 8)
    x, weight, targets = example(tokens)
    ours = linear_cross_entropy(x, weight, targets, VOCAB, torch.tensor(7), **options)
    theirs = apart(x, weight, targets, 7, **options)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(3 * ours, (x, weight)), torch.autograd.grad(3 * theirs, (x, weight))):
        torch.testing.assert_close(a, b)


def test_float32_weights_under_bfloat16_activations_get_float32_gradients():
    x, weight, targets = example(600, torch.bfloat16, torch.float32)
    wide = x.detach().double().requires_grad_(), weight.detach().to(torch.bfloat16).double().requires_grad_()
    ours, exact = linear_cross_entropy(x, weight, targets, VOCAB, 100.0), apart(*wide, targets, 100.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)
    gradients = torch.autograd.grad(ours, (x, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    for a, b in zip(gradients, torch.autograd.grad(exact, wide)):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    x, weight, targets = example(30)
    expected = linear_cross_entropy(x, weight, targets, VOCAB, 1.0)
    monkeypatch.setattr(fused, "_add_matmul", None)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, VOCAB, 1.0)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    assert not linear_cross_entropy(x.detach(), weight.detach(), targets, VOCAB, 1.0).requires_grad


@pytest.mark.parametrize(
    "tokens, rows", [(0, 0), (1, 1), (100, 100), (10240, 10240), (10600, 5376), (32768, 8192), (65536, 9472)]
)
def test_parts_are_even_and_no_more_than_fit(tokens, rows):
    assert fused.tokens_per_chunk(tokens, 50304, 2) == rows  # 10,496 fit


def test_no_tokens_have_no_loss():
    x, weight, targets = example(0)
    loss = linear_cross_entropy(x, weight, targets, VOCAB, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_second_backward_pass_is_refused():
    x, weight, targets = example(30)
    loss = linear_cross_entropy(x, weight, targets, VOCAB, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab, padded", [(50, 64), (8192, 8192), (20000, 20096)])
def test_the_kernel_equals_plain_pytorch(vocab, padded, options, gradient):
    logits = 3 * torch.randn(9, padded, device=DEVICE)
    logits[:, vocab:] = float("nan")  # padding takes no part
    targets = torch.randint(0, vocab, (9,), device=DEVICE)
    targets[[2, 5]] = -100
    rest = torch.tensor(0.25, device=DEVICE), vocab, options.get("z_loss", 0.0), options.get("label_smoothing", 0.0)
    plain = logits.clone()
    expected = plain_rows(plain, targets, *rest, gradient)
    losses = fused._triton_rows(logits, targets, *rest, gradient)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits, plain, rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16")
@pytest.mark.parametrize("options", [{"z_loss": 0.0, "label_smoothing": 0.0}, OPTIONS[-1]], ids=str)
def test_the_kernel_on_bfloat16_logits(options):
    logits = (3 * torch.randn(9, 20096, device=DEVICE)).bfloat16()
    targets = torch.randint(0, 20000, (9,), device=DEVICE)
    rest = torch.tensor(0.25, device=DEVICE), 20000, options["z_loss"], options["label_smoothing"], True
    wide = logits.float()
    expected = plain_rows(wide, targets, *rest)
    torch.testing.assert_close(fused._triton_rows(logits, targets, *rest), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, wide.bfloat16(), rtol=8e-3, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16")
def test_on_a_gpu_it_equals_head_and_loss_up_to_rounding_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 256 * PADDED * 2)
    x, weight, targets = example(700, torch.bfloat16, torch.float32, DEVICE)
    wide = x.detach().double().requires_grad_(), weight.detach().to(torch.bfloat16).double().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = linear_cross_entropy(x, weight, targets, VOCAB, 100.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = apart(*wide, targets, 100.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(exact, wide)):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="measures the memory of a GPU")
def test_no_more_than_one_stretch_of_logits_is_held_beside_the_gradients(monkeypatch):
    """What tools/memory.py counts for it."""
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 2048 * 8192 * 2)
    x = torch.randn(16 * 2048, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.randn(8192, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 8192, (len(x),), device=DEVICE)
    linear_cross_entropy(x, weight, targets, 8192, 1.0).backward()  # cuBLAS' workspace
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, targets, 8192, 1.0)
    counted = 2 * 2048 * 8192 + 2 * x.numel() + 2 * 4 * weight.numel()
    assert 0.9 * counted < torch.cuda.max_memory_allocated() - before < 1.1 * counted
