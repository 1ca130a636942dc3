"""Optimizers on a GPU, compiled as in training: the steps of a CPU, and no step waits for the device."""

import pytest
import torch
from torch import nn

from swamla_titan.config.sections import Optimizer
from swamla_titan.optim import AveragedWeights, build_optimizer, rules
from tests.optim.test_against_others import EVERY

pytestmark = pytest.mark.gpu


def moved(settings: dict, device: str, compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 384), nn.Linear(256, 640)).to(device)
    generator = torch.Generator().manual_seed(0)
    optimizer = build_optimizer(model, Optimizer(**settings), compiled=compiled)
    ema = AveragedWeights([model], 0.9, compiled)
    ema.restart()
    flags = [torch.tensor(float(step == 2), device=device) for step in range(4)]
    gradients = [[torch.randn(p.shape, generator=generator).to(device) for p in model.parameters()] for _ in flags]
    for step, (flag, of_step) in enumerate(zip(flags, gradients)):
        for parameter, gradient in zip(model.parameters(), of_step):
            parameter.grad = gradient
        # The first step compiles; later ones, of other learning rates, must only submit work.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(1e-3 * (step + 1), bad=flag)
            ema.update(step + 1, flag)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    adamw = optimizer.rules.get("adamw")  # none with lion
    model.averages, model.by_rule = list(ema.of_part(model).values()), len(adamw.large) if adamw else 0
    return model


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_gpu_takes_the_steps_of_a_cpu_without_waiting(settings, compiled, monkeypatch):
    monkeypatch.setattr(rules, "_LARGE", 1000)
    found, expected = moved(settings, "cuda", compiled), moved(settings, "cpu", False)
    assert found.by_rule == (2 if compiled and settings["name"].startswith("adamw") else 0)
    assert expected.by_rule == 0
    for one, other in zip(found.parameters(), expected.parameters()):
        assert_near(one.cpu(), other)
    for one, other in zip(found.averages, expected.averages):
        assert_near(one.cpu(), other)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the few elements whose roundings tip a code or a sign, and so a step of at most two learning rates."""
    off = (found - expected).abs()
    assert off.max() < 1e-2
    assert (off > 2e-4).sum() <= 1e-4 * off.numel()
