"""float8 by our own kernels, emulated on the CPU: matmuls, modules and what is applied to blocks besides."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swamla_titan.config.sections import Compile, Float8
from swamla_titan.errors import UserError
from swamla_titan.kernels.float8 import linear as float8_linears
from swamla_titan.kernels.float8.linear import Settings, float8_linear, float8_linear_swiglu, quantize, rms_norm
from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model.blocks import BLOCKS, Block
from swamla_titan.model.layers import Linear
from swamla_titan.model.swa import SlidingWindowAttention
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.quantization import coverage
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.quantization.native import (
    NativeGateUp,
    NativeHead,
    NativeLinear,
    NativeRMSNorm,
    cast_weights,
    forget_casts,
    save_transposed_weights,
)
from tests.parallel.plan import MODES, batch, gradients, small_model, watch

CPU = torch.device("cpu")
NATIVE = Float8(recipe="native", linear_layers="all")
E4M3 = Settings(torch.float8_e4m3fn)


def native_model(config=NATIVE, dtype=torch.float32, **changes):
    model = small_model(torch.float32, **changes)
    convert_to_float8(model, config, CPU)
    model.compute_dtype = dtype
    return model


def passes(function, *inputs):
    """Value, and gradients of the inputs under one upstream gradient."""
    inputs = [each.clone().requires_grad_() for each in inputs]
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings, of_gradients", [(Settings(), 0.07), (E4M3, 0.045)])
def test_a_matmul_is_as_exact_as_its_types(dtype, settings, of_gradients):
    """Of a random number, e4m3 with 3 bits behind the first is off by 2.6% (rms), e5m2 with 2 by 5.3%; two factors."""
    x, weight = torch.randn(3, 32, 64).to(dtype), torch.randn(48, 64)
    found = passes(lambda x, w: float8_linear(quantize(x), quantize(w, x.dtype), settings), x, weight)
    exact = passes(F.linear, x.double(), weight.double())
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32]
    errors = [error(*pair) for pair in zip(found, exact)]
    assert 0.02 < errors[0] < 0.045
    assert all(0.02 < each < of_gradients for each in errors[1:])


def test_a_matmul_is_near_torchaos():
    plain = small_model(torch.float32).blocks["0"].attention.wo
    results = []
    for recipe in ("tensorwise", "native"):
        model = small_model(torch.float32)
        convert_to_float8(model, replace(NATIVE, recipe=recipe), CPU)
        linear = model.blocks["0"].attention.wo
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        results.append(passes(lambda x, w, linear=linear: linear.matmul(x, w), x, plain.weight.detach()))
    assert all(error(ours, theirs) < 0.1 for ours, theirs in zip(*results))


def test_norm_and_cast_at_once_change_no_bit():
    x, gain = torch.randn(2, 16, 64, dtype=torch.bfloat16), torch.rand(64)
    exact = F.rms_norm(x.float(), (64,), gain, 1e-6).bfloat16()
    fused, apart = rms_norm(x, gain, 1e-6), quantize(exact)
    assert torch.equal(fused.data.float(), apart.data.float())
    assert torch.equal(fused.transposed.float(), apart.transposed.float())
    assert fused.scale == apart.scale


def test_gradients_pass_through_norm_and_swiglu_as_if_nothing_were_fused():
    weight, down = torch.randn(128, 64) / 8, torch.randn(48, 64) / 8
    x, gain = torch.randn(2, 16, 64), torch.rand(64)

    def fused(x, gain, weight, down):
        return float8_linear(
            float8_linear_swiglu(rms_norm(x, gain, 1e-6), quantize(weight), 16, E4M3), quantize(down), E4M3
        )

    def apart(x, gain, weight, down):
        normed = quantize(F.rms_norm(x, (64,), gain, 1e-6))
        return float8_linear(quantize(swiglu(float8_linear(normed, quantize(weight), E4M3), 16)), quantize(down), E4M3)

    for ours, theirs in zip(passes(fused, x, gain, weight, down), passes(apart, x, gain, weight, down)):
        assert error(ours, theirs) < 1e-6


def test_a_tensor_of_zeros_is_right():
    out, of_x, of_weight = passes(
        lambda x, w: float8_linear(quantize(x), quantize(w), Settings()), torch.zeros(16, 32), torch.randn(48, 32)
    )
    assert not out.any()
    assert not of_weight.any()
    assert of_x.isfinite().all()
    assert of_x.any()
    x, weight = torch.randn(16, 32).requires_grad_(), torch.randn(48, 32).requires_grad_()
    (0 * float8_linear(quantize(x), quantize(weight), Settings())).sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_bad_step_policy(where, wrong):
    tensors = {"x": torch.randn(16, 32), "weight": torch.randn(48, 32), "gradient": torch.randn(16, 48)}
    tensors[where][3, 5] = wrong
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    out = float8_linear(quantize(x), quantize(weight), Settings())
    out.backward(tensors["gradient"])
    assert out.isfinite().all() == (where == "gradient")
    assert not torch.cat([x.grad.flatten(), weight.grad.flatten()]).norm().isfinite()


def test_tiny_gradients_are_not_flushed():
    x, weight, grad = torch.randn(64, 32), torch.randn(48, 32), 1e-7 * torch.randn(64, 48)
    x.requires_grad_()
    float8_linear(quantize(x), quantize(weight), Settings()).backward(grad)
    assert error(x.grad, grad @ weight) < 0.08


def test_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(coverage, "has_triton", lambda: False)
    with pytest.raises(UserError, match="needs the package triton"):
        convert_to_float8(small_model(torch.float32), NATIVE, torch.device("cuda", 0))


class Skipping(SlidingWindowAttention):
    """Reads its input beside its linear layers."""

    linear_input = False

    def forward(self, x, context):
        return super().forward(x, context) + x


def test_a_branch_that_reads_its_input_itself_is_given_a_tensor(monkeypatch):
    monkeypatch.setitem(BLOCKS, "swa", Skipping)
    model, plain = native_model(), small_model(torch.float32)
    for block in model.blocks.values():
        assert isinstance(block.attention.wo, NativeLinear)
        assert isinstance(block.attention_norm, NativeRMSNorm) == (block.kind != "swa")
        assert isinstance(block.ffn_norm, NativeRMSNorm)
    losses = [each(batch(), batch()) for each in (model, plain)]
    losses[0].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    branches = {each.name: each.branch for each in coverage.survey(plain, NATIVE)}
    assert branches["blocks.0.attention.wqkv"] is None
    assert branches["blocks.0.feed_forward.gate_up"] == "blocks.0.feed_forward"


def test_which_modules_are_native():
    model = native_model(replace(NATIVE, output_head=True))
    assert sum(isinstance(module, NativeLinear) for module in model.modules()) == 4 + 4 + 6 + 1
    assert type(model.head) is NativeHead
    assert model.head.weight is model.embedding.weight
    for block in model.blocks.values():
        assert isinstance(block, Block)
        assert type(block.attention_norm) is type(block.ffn_norm) is NativeRMSNorm
        assert type(block.feed_forward.gate_up) is NativeGateUp
    assert not isinstance(model.norm, NativeRMSNorm)  # the head's, which a loss may read


def test_a_norm_with_a_reader_in_full_precision_stays_as_it_is():
    model = native_model(qk_rope_head_dim=8)  # wkv_a: 64 -> 16 + 8
    attention = model.blocks["2"].attention
    assert type(attention.wkv_a) is Linear
    assert isinstance(attention.wq, NativeLinear)
    assert not isinstance(model.blocks["2"].attention_norm, NativeRMSNorm)
    model(batch(), batch()).backward()
    assert gradients(model)["blocks.2.attention_norm.weight"].isfinite().all()


def test_one_cast_of_an_input_serves_all_its_readers(monkeypatch):
    casts = []
    real = float8_linears.float8_cast
    monkeypatch.setattr(
        float8_linears, "float8_cast", lambda x, *a, **k: casts.append(tuple(x.shape)) or real(x, *a, **k)
    )
    model = native_model(norm="dynamic_tanh")
    tokens = batch()
    with torch.no_grad():
        model(tokens)
    activations = [shape for shape in casts if shape[0] == tokens.numel()]
    # Per SWA block: norm, attention's result, norm; MLA: the latent too; SwiGLU's result in a kernel of its own.
    assert len(activations) == 3 + 3 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rmsnorm", "dynamic_tanh"])
def test_loss_and_gradients_are_near_those_of_the_plain_model(dtype, norm):
    plain, model = small_model(torch.float32, norm=norm), native_model(NATIVE, dtype, norm=norm)
    plain.compute_dtype = dtype
    losses = []
    for each in (plain, model):
        loss = each(batch(), batch())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    exact, found = (torch.cat([g.flatten() for g in gradients(each).values()]) for each in (plain, model))
    assert 0 < error(found, exact) < 0.16
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cast_once_for_all_micro_batches_are_cast_alike(dtype, monkeypatch):
    casts = []
    real = float8_linears.float8_cast
    monkeypatch.setattr(float8_linears, "float8_cast", lambda x, *a, **k: casts.append(x.shape) or real(x, *a, **k))
    model = native_model(NATIVE, dtype)
    tokens = batch(5)  # 320 rows: no weight has as many
    results = []
    for once in (False, True):
        model.zero_grad()
        casts.clear()
        if once:
            cast_weights(model, dtype)
            scales = [module.cast[2] for module in model.modules() if isinstance(module, NativeLinear)]
            assert len(scales) == 14
            assert not any(scale.data_ptr() % 16 for scale in scales)  # else cuBLASLt does not multiply
        model(tokens, tokens).backward()
        forget_casts(model)
        results.append(gradients(model))
        assert sum(shape[0] != tokens.numel() for shape in casts) == (0 if once else 14)
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())
    with torch.no_grad():
        before = model(tokens)
        model.blocks["0"].feed_forward.down.weight.mul_(2)
        assert not torch.equal(model(tokens), before)  # nothing is remembered


def test_names_shapes_and_values_stay_those_of_the_plain_model():
    plain = small_model(torch.float32)
    with torch.device("meta"):
        model = type(plain)(plain.config)
    convert_to_float8(model, NATIVE, CPU)
    model.to_empty(device=CPU)
    model.init_weights(0)
    fresh = type(plain)(plain.config).state_dict()
    assert model.state_dict().keys() == fresh.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in fresh.items())
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "mode, compiled",
    [
        *((mode, False) for mode in ("blocks", "operators", "full", "attention", "feed_forward", "both")),
        *(pytest.param(mode, True, marks=pytest.mark.slow) for mode in ("operators", "both")),
    ],
)
def test_checkpointing_changes_nothing(mode, compiled, tmp_path):
    torch._dynamo.reset()
    seen = []
    for each in ("none", mode):
        model = native_model()
        apply_activation_checkpointing(model, MODES[each])
        compile_model(model, Compile(enabled=compiled, cache_folder=str(tmp_path)), backend="aot_eager")
        loss = model(batch(), batch())
        loss.backward()
        seen.append((loss.item(), gradients(model)))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(gradient, seen[1][1][name]) for name, gradient in seen[0][1].items())


def test_less_is_kept_for_the_backward_pass():
    plain = small_model(torch.float32)
    plain.compute_dtype = torch.bfloat16
    kept = watch(plain, batch(8)).kept
    assert watch(native_model(NATIVE, torch.bfloat16), batch(8)).kept < 0.8 * kept


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_freed_are_not_kept_in_float8(compiled, tmp_path):
    torch._dynamo.reset()
    results, kept = [], []
    for keeps in (True, False):
        model = native_model()
        save_transposed_weights(model, keeps)
        compile_model(model, Compile(enabled=compiled, cache_folder=str(tmp_path)), backend="aot_eager")
        saved = set()
        weights = {tuple(w.shape) for w in model.parameters()} | {tuple(w.shape)[::-1] for w in model.parameters()}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.dtype == torch.float8_e4m3fn and tuple(tensor.shape) in weights:
                saved.add((tensor.data_ptr(), tuple(tensor.shape)))
            return tensor

        tokens = batch(5)  # 320 rows: no weight has as many
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, tokens)
        loss.backward()
        results.append(gradients(model))
        kept.append(len(saved))
    assert kept[0] >= 8
    assert kept[1] == 0
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


@pytest.mark.slow
def test_compiled_by_inductor_without_a_break(tmp_path):
    torch._dynamo.reset()
    eager, compiled = native_model(NATIVE, torch.bfloat16), native_model(NATIVE, torch.bfloat16)
    compile_model(compiled, Compile(cache_folder=str(tmp_path)))
    losses = []
    for model in (eager, compiled):
        loss = model(batch(), batch())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    found, expected = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (compiled, eager))
    assert error(found, expected) < 0.1


@pytest.mark.parametrize("key, value", [("gradient_dtype", "e4m3"), ("fast_accumulation", True)])
def test_keys_reach_the_matmuls(monkeypatch, key, value):
    seen = []
    real = float8_linears.scaled_matmul

    def watched(a, a_scale, b, b_scale, dtype, fast=False):
        seen.append((a.dtype, fast))
        return real(a, a_scale, b, b_scale, dtype, fast)

    monkeypatch.setattr(float8_linears, "scaled_matmul", watched)
    model = native_model(replace(NATIVE, **{key: value}))
    model(batch(), batch()).backward()
    forward, backward = seen[:14], seen[14:]
    assert set(forward) == {(torch.float8_e4m3fn, True)}
    gradients_in = torch.float8_e4m3fn if key == "gradient_dtype" else torch.float8_e5m2
    assert set(backward) == {(gradients_in, key == "fast_accumulation")}
    assert len(backward) == 28


def test_the_operators_declare_what_they_do():
    x, gain, weight = torch.randn(16, 32), torch.rand(32), torch.randn(64, 32)
    ops = torch.ops.swamla_titan
    a, b = quantize(x.requires_grad_()), quantize(weight.requires_grad_())
    scale = torch.ones(())
    gate_up = torch.randn(16, 64)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    parts = (x, a.transposed, a.scale, weight, b.transposed, b.scale)
    checks = ["test_faketensor"]  # the others subtract float8 numbers, which cannot be
    for operator, arguments in (
        (ops.float8_cast, (gate_up, scale, e4m3, torch.bfloat16)),
        (ops.float8_swiglu_backward, (torch.randn(16, 32), gate_up, scale, 16, e5m2)),
        (ops.float8_normalize, (x, gain, torch.ones(16), scale, True)),
        (ops.float8_product, (*a, *b, e5m2, False)),
        (ops.float8_gate_up, (*parts, gate_up, scale, scale, 16, e5m2, False, True)),
        (ops.float8_largest, (x,)),
        (ops.float8_swiglu_largest, (gate_up, 16)),
        (ops.float8_swiglu_gradient_largest, (torch.randn(16, 32), gate_up, 16)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_a_loss_that_is_one_with_a_converted_head_is_no_silent_matter():
    head = native_model(replace(NATIVE, output_head=True)).head
    assert isinstance(head, nn.Linear)
    with pytest.raises(AssertionError, match="contradict"):
        head(torch.randn(1, 2, 64), lambda x, weight: x)


@pytest.mark.parametrize("settings", [Settings(), E4M3], ids=["e5m2", "e4m3"])
def test_only_gradients_of_few_exponents_are_read_with_gate_up_for_their_largest(settings, monkeypatch):
    real, reads = float8_linears.swiglu_gradient_amax, []
    monkeypatch.setattr(float8_linears, "swiglu_gradient_amax", lambda *inputs: reads.append(1) or real(*inputs))
    x, weight = torch.randn(32, 64), torch.randn(128, 64)
    passes(lambda x, w: float8_linear_swiglu(quantize(x), quantize(w), 32, settings).placeholder, x, weight)
    assert len(reads) == (settings is E4M3)
