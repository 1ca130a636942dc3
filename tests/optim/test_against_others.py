"""Each optimizer takes the steps of an independent implementation: torchao's, lion-pytorch's, torch's own."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swamla_titan.config.sections import Optimizer
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.optim import build_optimizer, rules, updates

STEPS = 20
HYPER = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.3}
QUANTIZED = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit", "adamw_fp8": "AdamWFp8"}
EVERY = [{"name": name} for name in ("adamw", "lion", "muon", *QUANTIZED)] + [
    {"name": name, "moments": "bfloat16"} for name in ("adamw", "lion", "muon")
]


def layers() -> nn.Module:
    """Matrices of rows that blocks of 128 and 256 divide, tall and wide, one of few elements, and vectors."""
    return nn.Sequential(nn.Linear(256, 96), nn.Linear(512, 32), nn.Linear(8, 40))


def learning_rates() -> list[float]:
    return [HYPER["lr"] * (1 + math.cos(step)) for step in range(STEPS)]


def gradients(model: nn.Module) -> Iterator[None]:
    """Give the model new gradients, of sizes that differ by orders of magnitude; the same in each run."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise * 10 ** (torch.randn(parameter.shape, generator=generator) - step / 10)
        yield


def trained(model: nn.Module, settings: dict, flag: Tensor | None = None, compiled: bool = False) -> nn.Module:
    optimizer = build_optimizer(model, Optimizer(**{**HYPER, **settings}), compiled=compiled)
    for lr, _ in zip(learning_rates(), gradients(model)):
        optimizer.step(lr, bad=flag)
    return model


def trained_by(model: nn.Module, make: Callable[[list], torch.optim.Optimizer], which: int) -> nn.Module:
    """By another implementation, the matrices (2 axes) or vectors (1) alone, as they decay differently."""
    optimizer = make([parameter for parameter in model.parameters() if parameter.ndim == which])
    for lr, _ in zip(learning_rates(), gradients(model)):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        optimizer.step()
    return model


def two(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    torch.manual_seed(seed)
    one, other = layers(), layers()
    other.load_state_dict(one.state_dict())
    return one, other


def matrices(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters() if parameter.ndim == 2]


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_adamw_is_torchaos_bit_for_bit(name):
    import torchao.optim

    ours, theirs = two()
    kind = getattr(torchao.optim, QUANTIZED[name])
    betas = (HYPER["beta1"], HYPER["beta2"])
    trained(ours, {"name": name})
    with torch.compiler.set_stance("force_eager"):  # torchao compiles each shape by itself
        trained_by(theirs, lambda them: kind(them, HYPER["lr"], betas, HYPER["eps"], HYPER["weight_decay"]), 2)
    one, another, small = zip(matrices(ours), matrices(theirs))
    assert torch.equal(*one)
    assert torch.equal(*another)
    # Of few elements, so that neither quantizes it; by torch's fused kernel here.
    torch.testing.assert_close(*small, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [s for s in EVERY if s["name"] not in ("muon", "lion")], ids=str)
def test_a_step_is_about_that_of_adamw(settings):
    """What is lost to few bits shows as an error of moments, not of the formula: one step has exact ones."""
    ours, theirs = two()
    for model, hyper in ((ours, {**HYPER, **settings}), (theirs, HYPER)):
        optimizer = build_optimizer(model, Optimizer(**hyper))
        next(gradients(model))
        optimizer.step(HYPER["lr"])
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled, pays, by_rule", [(True, True, True), (True, False, False), (False, True, False)])
def test_adamw_is_torchs(compiled, pays, by_rule, monkeypatch):
    """By the rule that is compiled for large weights on GPUs, and by the kernel for the others."""
    monkeypatch.setattr(rules, "_pays", lambda weight: pays)
    calls, rule = [], updates.adamw
    monkeypatch.setattr(updates, "adamw", lambda *arguments: calls.append(rule(*arguments)))
    ours, theirs = two()
    betas = (HYPER["beta1"], HYPER["beta2"])
    with torch.compiler.set_stance("force_eager"):
        trained(ours, {}, compiled=compiled)
    assert len(calls) == (STEPS * len(list(ours.parameters())) if by_rule else 0)
    for axes, decay in ((2, HYPER["weight_decay"]), (1, 0.0)):
        make = functools.partial(torch.optim.AdamW, lr=HYPER["lr"], betas=betas, eps=HYPER["eps"], weight_decay=decay)
        trained_by(theirs, make, axes)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit", "adamw_fp8", "lion", "muon"])
def test_a_model_of_the_family_moves_as_by_other_implementations_with_its_groups(name, tied, decays):
    """Matrices of the blocks decay; embedding, head and norms do not, or only norms do not."""
    import torchao.optim

    shape = replace(FLAVORS["debug"], num_layers=1, dim=256, num_heads=2, ffn_hidden_dim=256, vocab_size=128)
    shape = replace(shape, tie_embeddings=tied)
    ours, theirs = SWAMLAModel(shape), SWAMLAModel(shape)
    for model in (ours, theirs):
        model.init_weights(0)
    betas, lr = (HYPER["beta1"], HYPER["beta2"]), HYPER["lr"]
    own = [p for p in theirs.blocks.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if all(p is not each for each in own)]
    groups = [(own, 0.3), ([p for p in rest if p.ndim == 2], 0.3 if decays else 0.0)]
    groups += [([p for p in rest if p.ndim < 2], 0.0)]
    made = [{"params": each, "weight_decay": decay} for each, decay in groups]
    if name == "lion":
        others = [pytest.importorskip("lion_pytorch").Lion(made, lr, betas)]
    elif name == "muon":
        others = [torch.optim.AdamW(made[1:], lr, betas)]
    else:
        kind = getattr(torchao.optim, QUANTIZED[name]) if name in QUANTIZED else torch.optim.AdamW
        # torchao's quantize an embedding too, where ours keeps float32 if it is not tied.
        apart = [made[1] | {"params": [theirs.embedding.weight]}] if name in QUANTIZED and not tied else []
        if apart:
            made[1] = made[1] | {"params": [theirs.head.weight]}
        others = [kind(made, lr, betas), *(torch.optim.AdamW([each], lr, betas) for each in apart)]
    optimizer = build_optimizer(ours, Optimizer(**{**HYPER, "name": name, "decay_embeddings": decays}))
    for _, _, _ in zip(gradients(ours), gradients(theirs), range(2)):
        with torch.compiler.set_stance("force_eager"):
            optimizer.step(lr)
            for each in others:
                each.step()
    for (key, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters()):
        # Of the blocks' matrices Muon's are fused, and blocks of moments are cut as ranks may cut rows.
        if name in ("adamw", "lion") or all(other is not each for each in own):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def lion_of_the_paper(model: nn.Module, beta1: float, beta2: float, weight_decay: float) -> None:
    """Algorithm 2 of arXiv:2302.06675, in float64."""
    weights = [parameter.detach().double() for parameter in model.parameters()]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for lr, _ in zip(learning_rates(), gradients(model)):
        for weight, momentum, parameter in zip(weights, momenta, model.parameters()):
            gradient = parameter.grad.double()
            update = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
            decay = weight_decay if weight.ndim == 2 else 0.0
            weight -= lr * (update + decay * weight)
            momentum.copy_(beta2 * momentum + (1 - beta2) * gradient)
    for parameter, weight in zip(model.parameters(), weights):
        parameter.data.copy_(weight)


def test_lion_is_that_of_the_paper():
    ours, theirs = two()
    trained(ours, {"name": "lion"})
    lion_of_the_paper(theirs, HYPER["beta1"], HYPER["beta2"], HYPER["weight_decay"])
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_lion_is_lion_pytorchs_bit_for_bit(axes):
    lion_pytorch = pytest.importorskip("lion_pytorch")
    ours, theirs = two()
    decay = HYPER["weight_decay"] if axes == 2 else 0.0
    trained(ours, {"name": "lion"})
    make = lambda them: lion_pytorch.Lion(them, HYPER["lr"], (HYPER["beta1"], HYPER["beta2"]), decay)  # noqa: E731
    trained_by(theirs, make, axes)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        assert one.ndim != axes or torch.equal(one, other)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_to_the_last_bits(adjust, nesterov):
    """The orthogonalized updates are equal; they are taken off the weight with other roundings."""
    ours, theirs = two()
    trained(ours, {"name": "muon", "muon_adjust_lr_fn": adjust, "muon_nesterov": nesterov, "muon_ns_steps": 4})
    keys = {"lr": HYPER["lr"], "weight_decay": HYPER["weight_decay"], "nesterov": nesterov}
    trained_by(theirs, lambda them: torch.optim.Muon(them, adjust_lr_fn=adjust, ns_steps=4, **keys), 2)
    for one, other in zip(matrices(ours), matrices(theirs)):
        torch.testing.assert_close(one, other, rtol=0, atol=STEPS * torch.finfo(torch.float32).eps)


def test_muon_moves_vectors_and_the_vocabulary_as_adamw_does():
    ours, theirs = two()
    for model, name in ((ours, "muon"), (theirs, "adamw")):
        model.embedding = nn.Embedding(30, 16)
        nn.init.ones_(model.embedding.weight)
        trained(model, {"name": name})
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.equal(one, other) == (one.ndim == 1 or name == "embedding.weight"), name


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_learning_rate_may_be_a_tensor(settings):
    ours, theirs = two()
    trained(ours, settings)
    optimizer = build_optimizer(theirs, Optimizer(**{**HYPER, **settings}))
    for lr, _ in zip(learning_rates(), gradients(theirs)):
        optimizer.step(torch.tensor(lr, dtype=torch.float64))
    for one, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(one, other)


# Bad steps


def held(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_bad_step_changes_no_bit_whatever_the_gradients_hold(settings):
    model = layers()
    with torch.no_grad():
        model[0].weight[0] = -0.0
    optimizer = build_optimizer(model, Optimizer(**HYPER | settings))
    steps = gradients(model)
    next(steps)
    optimizer.step(HYPER["lr"])  # a good one before, so that there are moments
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, 1e30):
        next(steps)
        before = held(optimizer, model)
        for parameter in model.parameters():
            parameter.grad.view(-1)[::3] = value
        optimizer.step(HYPER["lr"], bad=torch.ones(()))
        assert_same_bits(held(optimizer, model), before)
    optimizer.zero_grad()
    next(steps)
    optimizer.step(HYPER["lr"], bad=torch.zeros(()))
    assert not any(torch.equal(one, other) for one, other in zip(held(optimizer, model), before) if one.ndim == 2)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_flag_that_says_good_changes_nothing(settings):
    one, other = two()
    trained(one, settings)
    trained(other, settings, torch.zeros(()))
    assert_same_bits(list(one.parameters()), list(other.parameters()))
