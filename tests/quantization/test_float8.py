"""float8 conversion, emulated on the CPU."""

import functools
import logging

import pytest
import torch
from torchao.float8.float8_linear import Float8Linear

from swamla_titan.config.sections import Float8
from swamla_titan.errors import UserError
from swamla_titan.model.layers import Head, Linear
from swamla_titan.parallel.tensor import sides_on_a_rank
from swamla_titan.quantization.coverage import validate_coverage
from swamla_titan.quantization.float8 import convert_to_float8
from tests.parallel.plan import batch, gradients, small_model

CPU = torch.device("cpu")
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_of_the_blocks_is_converted_and_the_head_is_not(recipe: str, caplog: pytest.LogCaptureFixture):
    model = small_model(torch.float32)
    with caplog.at_level(logging.INFO, logger="swamla_titan"):
        convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), CPU)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 4 + 4 + 6
    assert type(model.head) is Head
    assert model.head.weight is model.embedding.weight
    assert f"float8 ({recipe}, emulated): 14 of 15 linear layers" in caplog.text
    assert caplog.text.count("as it was") == 1  # the head


def test_a_layer_that_does_not_fit_is_left_and_named(caplog: pytest.LogCaptureFixture):
    model = small_model(torch.float32, qk_rope_head_dim=8)  # wkv_a: 64 -> 16 + 8; wq: 64 -> 2 * 40
    with caplog.at_level(logging.INFO, logger="swamla_titan"):
        convert_to_float8(model, Float8(recipe="rowwise", linear_layers="all"), CPU)
    assert type(model.blocks["2"].attention.wkv_a) is Linear
    assert isinstance(model.blocks["2"].attention.wq, Float8Linear)
    assert "13 of 15 linear layers" in caplog.text
    assert "attention.wkv_a          1 x 64 -> 24        as it was: 24 is no multiple of 16" in caplog.text


def test_a_layer_that_tensor_parallelism_makes_too_narrow_is_left(caplog: pytest.LogCaptureFixture):
    """wq's 2 x 24 rows are 24 on each of two ranks, wkv_b's 2 x 32 are 32, and wkv_a is not divided."""
    model = small_model(torch.float32, qk_nope_head_dim=8, v_head_dim=24, qk_rope_head_dim=16)
    attention = model.blocks["2"].attention
    whole = {
        name: (module.out_features, module.in_features)
        for name, module in attention.named_children()
        if isinstance(module, Linear)
    }
    assert whole["wq"][0] == 48
    assert all(side % 16 == 0 for sides in whole.values() for side in sides)
    with caplog.at_level(logging.INFO, logger="swamla_titan"):
        convert_to_float8(
            model, Float8(recipe="rowwise", linear_layers="all"), CPU, functools.partial(sides_on_a_rank, 2)
        )
    assert type(attention.wq) is Linear
    assert type(attention.wo) is Linear
    assert isinstance(attention.wkv_a, Float8Linear)
    assert isinstance(attention.wkv_b, Float8Linear)
    assert "1 x 64 -> 24        as it was: 24 is no multiple of 16" in caplog.text
    assert "1 x 24 -> 64        as it was: 24 is no multiple of 16" in caplog.text


def test_a_recipe_that_converts_nothing_is_refused():
    model = small_model(torch.float32, num_layers=2, dim=72)
    config = Float8(recipe="rowwise", linear_layers="all")
    coverage = convert_to_float8(model, config, CPU)  # which may be a stage of a pipeline
    with pytest.raises(UserError, match="would convert none of 8 linear layers"):
        validate_coverage(coverage, config)


def test_off_changes_nothing():
    model = small_model(torch.float32)
    convert_to_float8(model, Float8(), CPU)
    assert not any(isinstance(module, Float8Linear) for module in model.modules())


def test_a_gpu_without_float8_units_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A40")
    with pytest.raises(UserError, match=r"A40 has 8\.6"):
        convert_to_float8(
            small_model(torch.float32), Float8(recipe="rowwise", linear_layers="all"), torch.device("cuda", 0)
        )


def test_on_the_meta_device_names_shapes_and_values_stay_those_of_the_plain_model():
    plain = small_model(torch.float32)
    with torch.device("meta"):
        model = type(plain)(plain.config)
    convert_to_float8(model, Float8(recipe="tensorwise", linear_layers="all"), CPU)
    model.to_empty(device=CPU)
    model.init_weights(0)
    fresh = type(plain)(plain.config).state_dict()
    state = model.state_dict()
    assert state.keys() == fresh.keys()
    for name, value in fresh.items():
        assert state[name].dtype == value.dtype == torch.float32
        assert torch.equal(state[name], value), name
    model.load_state_dict(plain.state_dict())  # and a checkpoint of a run without float8 fits
    assert type(model.blocks["0"].attention.wo.weight) is torch.nn.Parameter


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_near_those_of_the_plain_model(recipe: str, dtype: torch.dtype):
    plain, model = small_model(torch.float32), small_model(torch.float32)
    convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), CPU)
    losses = []
    for each in (plain, model):
        each.compute_dtype = dtype
        loss = each(batch(), batch())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    exact, found = (torch.cat([g.flatten() for g in gradients(each).values()]) for each in (plain, model))
    # Errors of a few percent a matmul (below) add up over three blocks with large weights.
    assert 0 < (found - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("recipe, off_by", [("tensorwise", 0.08), ("rowwise", 0.05), ("rowwise_with_gw_hp", 0.05)])
def test_a_matmul_is_as_exact_as_its_type(recipe: str, off_by: float):
    plain, model = small_model(torch.float32), small_model(torch.float32)
    convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), CPU)
    x, grad = torch.randn(64, 64), torch.randn(64, 64)
    results = []
    for each in (plain, model):
        linear, given = each.blocks["0"].attention.wo, x.clone().requires_grad_()
        out = linear(given)
        out.backward(grad)
        results.append((out, given.grad, linear.weight.grad))
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*results)]
    assert all(0.01 < error < off_by for error in errors[:2])
    assert (errors[2] < 1e-6) == (recipe == "rowwise_with_gw_hp")  # its gradients of weights are in full precision
    assert errors[2] < off_by


@pytest.mark.parametrize("recipe", RECIPES)
def test_float32_weights_under_bfloat16_activations_are_what_bfloat16_weights_are(recipe: str):
    # as FSDP2 with bfloat16 parameters would have it
    master, gathered = small_model(torch.float32), small_model(torch.float32)
    for model in (master, gathered):
        convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), CPU)
    linear, low = master.blocks["0"].feed_forward.down, gathered.blocks["0"].feed_forward.down.bfloat16()
    x = torch.randn(2, 16, linear.in_features, dtype=torch.bfloat16)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outs = [linear(inputs[0]), low(inputs[1])]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(outs[0], outs[1])
    for out in outs:
        out.float().pow(2).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(linear.weight.grad, low.weight.grad.float())
