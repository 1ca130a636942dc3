"""The norm of gradients is torch's, bit for bit, and a step with clipping is the one that torch takes after its own."""

import copy

import pytest
import torch

from swamla_titan.config.sections import Optimizer
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.optim import build_optimizer, clip_divisor, gradient_norm, rules

SHAPES = ((64, 7), (5,), (), (0, 3), (33, 2))
SMALL = ModelConfig(vocab_size=64, dim=64, num_layers=3, num_heads=2, swa_window=8, ffn_hidden_dim=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.7, 1e6])
def test_alone_it_is_torchs(dtype, max_norm):
    """The norm bit for bit; quotients but for the last bit, as torch multiplies."""
    found = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in found]
    for parameter, gradient in zip(parameters, copy.deepcopy(found)):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = gradient_norm((gradient, 1.0) for gradient in found)
    assert norm.dtype == dtype
    assert torch.equal(norm, expected)
    for gradient, parameter in zip(found, parameters):
        quotient = gradient / clip_divisor(norm, max_norm)
        torch.testing.assert_close(quotient, parameter.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_shares_say_how_much_of_a_gradient_counts():
    """As if another rank held a copy of the second and a gradient of norm 2."""
    found = [torch.full((4,), 1.5), torch.full((9,), 4.0)]
    norm = gradient_norm(zip(found, (1.0, 0.5)), lambda square: square + 72 + 4)
    assert norm.item() == pytest.approx((9 + 144 + 4) ** 0.5)
    torch.testing.assert_close(found[1] / clip_divisor(norm, 1.0), torch.full((9,), 4.0 / 157**0.5))


def test_what_is_no_number_shows():
    for bad in (float("nan"), float("inf")):
        assert not gradient_norm([(torch.ones(3), 1.0), (torch.tensor([1.0, bad]), 1.0)]).isfinite()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adamw8bit"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6, 0.0])
def test_a_step_is_that_of_gradients_clipped_by_torch(name, max_norm, device):
    config = Optimizer(name=name, lr=1e-2)
    mine = SWAMLAModel(SMALL)
    mine.init_weights(0)
    mine.to(device)
    theirs = copy.deepcopy(mine)
    optimizers = [build_optimizer(model, config) for model in (mine, theirs)]
    for _ in range(2):
        theirs.load_state_dict(mine.state_dict())
        tokens = torch.randint(64, (2, 16), device=device)
        for model in (mine, theirs):
            model(tokens, tokens, loss_denominator=tokens.numel()).backward()
        norm = gradient_norm((weight.grad, 1.0) for weight in mine.parameters())
        divisors = [clip_divisor(norm, max_norm) if max_norm > 0 else None, None]
        if max_norm > 0:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        for weight, other in zip(mine.parameters(), theirs.parameters()):
            assert torch.equal(weight.grad, other.grad) == (max_norm != 0.05)
        before = copy.deepcopy(mine.state_dict())
        for optimizer, divisor in zip(optimizers, divisors):
            optimizer.step(config.lr, divisor)
        for (path, weight), other in zip(mine.named_parameters(), theirs.parameters()):
            if max_norm == 0.05:
                # Muon's bfloat16 makes more of a last bit: of single numbers as much as they move, 1e-3, but of few.
                by_muon = name == "muon" and path.startswith("blocks.") and weight.ndim == 2
                torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-3 if by_muon else 2e-4)
                assert (weight - other).norm() <= 0.1 * (weight - before[path]).norm()
            else:
                assert torch.equal(weight, other)
        for optimizer in optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adamw8bit", "adamw4bit", "adamw_fp8"])
def test_gradients_divided_in_the_rule_are_those_divided_before_it(name, compiled, monkeypatch):
    monkeypatch.setattr(rules, "_pays", lambda weight: weight.numel() >= 4096)
    models = []
    for before in (False, True):
        torch._dynamo.reset()  # it counts what the other optimizers' rules made it compile
        torch.manual_seed(0)
        model = SWAMLAModel(SMALL)
        model.init_weights(0)
        optimizer = build_optimizer(model, Optimizer(name=name, lr=1e-2), compiled=compiled)
        divisor = torch.tensor(3.7)
        for _ in range(3):
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
            if before:
                torch._foreach_div_([weight.grad for weight in model.parameters()], divisor)
            optimizer.step(1e-2, None if before else divisor)
        models.append(model)
    for weight, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(weight, other, rtol=1e-6 if compiled else 0, atol=1e-7 if compiled else 0)
