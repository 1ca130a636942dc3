"""float8 by our kernels on a GPU: against float64, compiled, and in a model."""

import functools

import pytest
import torch
import torch.nn.functional as F

from swamla_titan.config.sections import ActivationCheckpoint, Compile, Float8
from swamla_titan.kernels.float8.linear import Settings, float8_linear, float8_linear_swiglu, quantize, rms_norm
from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.quantization.native import cast_weights, forget_casts, save_transposed_weights
from swamla_titan.train.precision import set_precision_and_determinism

pytestmark = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn
CUDA = torch.device("cuda")


def passes(function, inputs, upstream):
    inputs = [each.detach().requires_grad_() for each in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def layer(x, gain, weight, down, settings):
    """Norm, product with SwiGLU, product."""
    hidden = float8_linear_swiglu(rms_norm(x, gain, 1e-6), quantize(weight, x.dtype), 64, settings)
    return float8_linear(hidden, quantize(down, x.dtype), settings)


def plain_layer(x, gain, weight, down):
    return layer(x, gain, weight, down, Settings())


@functools.cache
def compiled_layer():
    return torch.compile(plain_layer, fullgraph=True, dynamic=False)


def exact_layer(x, gain, weight, down):
    return F.linear(swiglu(F.linear(F.rms_norm(x, gain.shape, gain, 1e-6), weight), 64), down)


def inputs_of(dtype=torch.bfloat16, tokens=256, dim=512, hidden=768):
    torch.manual_seed(0)
    x, gain = torch.randn(4, tokens // 4, dim, device=CUDA, dtype=dtype), torch.rand(dim, device=CUDA) + 0.5
    weight, down = torch.randn(2 * hidden, dim, device=CUDA) / dim**0.5, torch.randn(dim, hidden, device=CUDA) / 16
    return (x, gain, weight, down), torch.randn(4, tokens // 4, dim, device=CUDA, dtype=dtype)


@pytest.mark.parametrize("settings", [Settings(), Settings(E4M3), Settings(fast=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_is_as_exact_as_its_types(settings, dtype):
    inputs, upstream = inputs_of(dtype)
    found = passes(lambda *each: layer(*each, settings), inputs, upstream)
    exact = passes(exact_layer, [each.double() for each in inputs], upstream.double())
    errors = [error(*pair) for pair in zip(found, exact)]
    assert 0.01 < errors[0] < 0.07
    assert all(0.01 < each < 0.16 for each in errors[1:]), errors
    assert found[3].dtype == torch.float32


def test_a_gpu_gives_what_the_emulation_gives():
    inputs, upstream = inputs_of()
    found = passes(plain_layer, inputs, upstream)
    expected = passes(plain_layer, [each.cpu() for each in inputs], upstream.cpu())
    for ours, theirs in zip(found, expected):
        assert error(ours.cpu(), theirs) < 0.02


@pytest.mark.parametrize("dim", [48, 80, 1536])
def test_widths_that_tiles_do_not_divide(dim):
    inputs, upstream = inputs_of(dim=dim, hidden=192, tokens=272)
    found = passes(plain_layer, inputs, upstream)
    exact = passes(exact_layer, [each.double() for each in inputs], upstream.double())
    assert all(error(*pair) < 0.16 for pair in zip(found, exact))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(where, wrong, compiled):
    inputs, upstream = inputs_of()
    inputs[where].view(-1)[7] = wrong
    out, *gradients = passes(compiled_layer() if compiled else plain_layer, inputs, upstream)
    assert not out.isfinite().all()
    assert not torch.stack([each.float().norm() for each in gradients]).isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), -float("inf")])
def test_what_is_not_finite_in_a_gradient_is_seen(wrong, compiled):
    inputs, upstream = inputs_of()
    upstream[1, 2, 3] = wrong
    out, *gradients = passes(compiled_layer() if compiled else plain_layer, inputs, upstream)
    assert out.isfinite().all()
    assert not any(each.isfinite().all() for each in gradients)


def test_zeros_are_right():
    inputs, upstream = inputs_of()
    out, *gradients = passes(plain_layer, inputs, torch.zeros_like(upstream))
    assert out.isfinite().all()
    assert not any(each.any() for each in gradients)


def test_compiled_it_is_the_same_without_a_break():
    torch._dynamo.reset()
    inputs, upstream = inputs_of()
    found, expected = (passes(each, inputs, upstream) for each in (compiled_layer(), plain_layer))
    assert all(error(*pair) < 0.02 for pair in zip(found, expected))


@pytest.mark.parametrize("recipe", ["native", "tensorwise", "rowwise"])
def test_a_compiled_model_is_near_bfloat16_under_tf32(recipe, tmp_path):
    """float8 beside float32 products in TF32, which the compiler asks about."""
    from swamla_titan.config import Config

    torch._dynamo.reset()
    set_precision_and_determinism(Config(), CUDA)
    assert torch.get_float32_matmul_precision() == "high"
    shape = ModelConfig(num_layers=3, dim=256, num_heads=2, vocab_size=500, max_seq_len=256)
    tokens = torch.randint(500, (4, 256), device=CUDA)
    results = []
    for each in ("off", recipe):
        with torch.device("meta"):
            model = SWAMLAModel(shape)
        convert_to_float8(model, Float8(recipe=each, linear_layers="all"), CUDA)
        model.to_empty(device=CUDA)
        model.init_weights(0)
        model.compute_dtype = torch.bfloat16
        compile_model(model, Compile(cache_folder=str(tmp_path)))
        loss = model(tokens, tokens)
        loss.backward()
        results.append((loss.item(), torch.cat([w.grad.flatten() for w in model.parameters()])))
    assert results[1][0] == pytest.approx(results[0][0], rel=5e-3)
    assert 0 < error(results[1][1], results[0][1]) < 0.2


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_cast_once_serve_all_micro_batches(compiled, tmp_path):
    """Where the casts of a step, their scales beside each other, are given to every pass."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = SWAMLAModel(ModelConfig(num_layers=3, dim=256, num_heads=2, vocab_size=500, max_seq_len=256))
    convert_to_float8(model, Float8(recipe="native", linear_layers="all"), CUDA)
    model.to_empty(device=CUDA)
    model.init_weights(0)
    model.compute_dtype = torch.bfloat16
    if compiled:
        compile_model(model, Compile(cache_folder=str(tmp_path)))
    tokens = torch.randint(500, (4, 256), device=CUDA)
    results = []
    for once in (False, True):
        if once:
            cast_weights(model, torch.bfloat16)
        for _ in range(2):
            loss = model(tokens, tokens)
            loss.backward()
        with torch.no_grad():
            evaluated = model(tokens, tokens)
        results.append((loss.item(), evaluated.item(), torch.cat([w.grad.flatten() for w in model.parameters()])))
        model.zero_grad()
        forget_casts(model)
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-6)
    assert error(results[1][2], results[0][2]) < 0.02


@pytest.mark.parametrize(
    "kept",
    [ActivationCheckpoint(mode="full"), ActivationCheckpoint(mode="selective", selective="operators"), 0.5, 0.0],
    ids=["full", "operators", "half the memory", "no memory"],
)
def test_what_is_computed_again_is_the_same(kept, tmp_path):
    """The compiler sees through our operators here, and a checkpoint or a budget decides on what it sees."""
    torch._dynamo.reset()
    tokens = torch.randint(500, (4, 256), device=CUDA)
    results = []
    for each in (1.0, kept):
        with torch.device("meta"):
            model = SWAMLAModel(ModelConfig(num_layers=3, dim=256, num_heads=2, vocab_size=500, max_seq_len=256))
        convert_to_float8(model, Float8(recipe="native", linear_layers="all"), CUDA)
        model.to_empty(device=CUDA)
        model.init_weights(0)
        model.compute_dtype = torch.bfloat16
        budget = each if isinstance(each, float) else 1.0
        if isinstance(each, ActivationCheckpoint):
            apply_activation_checkpointing(model, each)
        compile_model(model, Compile(cache_folder=str(tmp_path)), budget)
        model(tokens, tokens).backward()  # compiles
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, tokens)
        kept_bytes = torch.cuda.memory_allocated() - before
        loss.backward()
        results.append((loss.item(), torch.cat([w.grad.flatten() for w in model.parameters()]), kept_bytes))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error(results[1][1], results[0][1]) < 0.02
    assert results[1][2] < results[0][2]


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_freed_are_cast_again_and_not_kept(compiled, tmp_path):
    """As FSDP2 frees them: neither they nor their casts are among what a forward pass keeps."""
    torch._dynamo.reset()
    tokens = torch.randint(500, (1, 16), device=CUDA)  # weights outweigh activations
    results = []
    for keeps in (True, False):
        with torch.device("meta"):
            model = SWAMLAModel(ModelConfig(num_layers=3, dim=256, num_heads=2, vocab_size=500, max_seq_len=256))
        convert_to_float8(model, Float8(recipe="native", linear_layers="all"), CUDA)
        model.to_empty(device=CUDA)
        model.init_weights(0)
        model.compute_dtype = torch.bfloat16
        save_transposed_weights(model, keeps)
        if compiled:
            compile_model(model, Compile(cache_folder=str(tmp_path)))
        model(tokens, tokens).backward()
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, tokens)
        kept_bytes = torch.cuda.memory_allocated() - before
        loss.backward()
        results.append((loss.item(), torch.cat([w.grad.flatten() for w in model.parameters()]), kept_bytes))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert error(results[1][1], results[0][1]) < 0.02
    weights = sum(each.numel() for each in model.blocks.parameters() if each.ndim == 2)
    assert results[0][2] - results[1][2] > 0.9 * weights  # a byte for each number
