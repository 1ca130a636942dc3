import copy

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Optimizer
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.optim import GroupedOptimizer, build_optimizer, muon, rules
from swamla_titan.parallel.model_parts import build_parts


def test_a_step_follows_the_formula_of_adamw():
    layer = torch.nn.Linear(3, 2)
    layer.weight.grad = torch.randn_like(layer.weight)
    layer.bias.grad = torch.randn_like(layer.bias)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer(layer, Optimizer(lr=1.0, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5))
    optimizer.step(0.1)
    # At the first step the corrected moments are the gradient and its square.
    for name, decay in (("weight", 0.5), ("bias", 0.0)):
        grad = getattr(layer, name).grad
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * grad / (grad.abs() + 1e-3)
        torch.testing.assert_close(getattr(layer, name).detach(), expected)


@pytest.mark.parametrize("by_rule", [True, False])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_one_that_is_given_anothers_state_goes_on_as_it_does(name, by_rule, monkeypatch):
    monkeypatch.setattr(rules, "_pays", lambda weight: by_rule)
    model = SWAMLAModel(FLAVORS["debug"])
    model.init_weights(0)
    optimizer = build_optimizer(model, Optimizer(name=name), compiled=True)

    def step(model: SWAMLAModel, optimizer: GroupedOptimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(3e-4)

    with torch.compiler.set_stance("force_eager"):
        step(model, optimizer, 0)
        other = copy.deepcopy(model)
        follower = build_optimizer(other, Optimizer(name=name), compiled=True)
        follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for seed in (1, 2):
            step(model, optimizer, seed)
            step(other, follower, seed)
    for one, another in zip(model.parameters(), other.parameters()):
        assert torch.equal(one, another)


def test_muons_set_up_looks_at_the_parts_of_owned_matrices_alone(monkeypatch):
    """Of all parts of all matrices it took seconds on a thousand ranks."""
    asked = []
    real = muon.slices_at
    monkeypatch.setattr(muon, "slices_at", lambda tensor, place: asked.append(tensor) or real(tensor, place))
    ranks = 40
    config = Config(model=FLAVORS["debug"], optimizer=Optimizer(name="muon"), compile=Compile(enabled=False))
    with fake_world(Degrees(shard=ranks), "fsdp", rank=3) as world:
        [part] = build_parts(config, world)
        optimizer = build_optimizer(part.to_empty(device="cpu"), config.optimizer, torch.distributed.group.WORLD)
        mine = [each[3].weight for each in optimizer.rules["muon"].orthogonalizer._rounds]
    assert len(asked) == ranks * len(mine)
    assert {id(tensor) for tensor in asked} == {id(weight) for weight in mine}
