"""The average of weights: its formula, what it leaves alone, and that it takes the weights' place and gives it back."""

import pytest
import torch
from torch import nn

from swamla_titan.optim import AveragedWeights


def averaged(decay: float) -> tuple[nn.Module, AveragedWeights]:
    model = nn.Linear(3, 2)
    ema = AveragedWeights([model], decay)
    ema.restart()
    return model, ema


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9999])
def test_it_follows_its_formula_and_forgets_the_beginning_at_any_decay(decay):
    model, ema = averaged(decay)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step in range(1, 30):
        share = 1 - min(decay, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            weight.data.normal_()
            expected[name] = expected[name] + share * (weight.detach().double() - expected[name])
        ema.update(step, torch.zeros(()) if step % 2 else None)
    found = ema.of_part(model)
    assert found.keys() == expected.keys()
    for name, mean in found.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_bad_step_leaves_it_as_it_is_whatever_the_weights_hold():
    model, ema = averaged(0.9)
    ema.of_part(model)["weight"].fill_(-0.0)
    before = {name: mean.clone() for name, mean in ema.of_part(model).items()}
    for value in (torch.nan, torch.inf, 1.0):
        nn.init.constant_(model.weight, value)
        ema.update(5, torch.ones(()))
        for name, mean in ema.of_part(model).items():
            assert torch.equal(mean.view(torch.int32), before[name].view(torch.int32))


def test_it_takes_the_place_of_the_weights_and_gives_it_back_also_after_an_error():
    model, ema = averaged(0.9)
    weight, mean = model.weight.detach().clone(), ema.of_part(model)["weight"]
    mean.fill_(2.0)

    def fail() -> None:
        assert (model.weight == 2).all()
        raise KeyError

    with pytest.raises(KeyError), ema.in_place_of_weights():
        fail()
    assert torch.equal(model.weight, weight)
    assert (mean == 2).all()
