"""Compiled rules: one kernel for all rows, no new compilation for another learning rate, the same steps."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from swamla_titan.config.sections import Optimizer
from swamla_titan.optim import AveragedWeights, build_optimizer, rules


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(64, 96, bias=False), nn.Linear(64, 256, bias=False))


def steps(name: str, compiled: bool) -> nn.Module:
    weights = model()
    generator = torch.Generator().manual_seed(0)
    optimizer = build_optimizer(weights, Optimizer(name=name), compiled=compiled)
    for step in range(4):
        for parameter in weights.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1e-3 * (step + 1), bad=torch.tensor(float(step == 2)))
    return weights


# Each compiles for seconds. Moments of few bits jump where a last bit differs.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, graphs", [("adamw", 1), ("lion", 1), ("muon", 2), ("adamw8bit", 1), ("adamw4bit", 1), ("adamw_fp8", 1)]
)
def test_a_rule_is_compiled_once_and_takes_the_same_steps(name, graphs, monkeypatch):
    monkeypatch.setattr(rules, "_pays", lambda weight: True)
    torch._dynamo.reset()
    counters.clear()
    compiled = steps(name, compiled=True)
    assert counters["stats"]["unique_graphs"] == graphs
    for one, other in zip(compiled.parameters(), steps(name, compiled=False).parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_average_is_compiled_once():
    torch._dynamo.reset()
    counters.clear()
    averages = []
    for compiled in (True, False):
        weights = model()
        ema = AveragedWeights([weights], 0.9, compiled)
        for step in range(1, 5):
            ema.update(step, torch.zeros(()))
        averages.append(ema.of_part(weights))
    assert counters["stats"]["unique_graphs"] == 1
    for name, mean in averages[0].items():
        torch.testing.assert_close(mean, averages[1][name])
