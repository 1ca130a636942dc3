"""Dynamic loss scaling: the scale itself, and runs with it."""

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Float8, Training
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train import loss_scale as module
from swamla_titan.train.loss_scale import LossScale
from swamla_titan.train.policy import StepOutcome
from tests.parallel.plan import SMALL, batch
from tests.train.faults import Fault, run_with_faults
from tests.train.runs import checkpoint, metrics, tensors, train


def outcome(grad_norm: float) -> StepOutcome:
    return StepOutcome(torch.tensor(1.0), torch.tensor(grad_norm), 0.1)


def test_it_halves_at_once_and_doubles_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 3)
    scale = LossScale(torch.device("cpu"))
    values = []
    for norm in (1.0, float("nan"), 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0, 1.0):
        scale.after_step(1, outcome(norm))
        values.append(scale.value.item() / 2**16)
    assert values == [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]


def test_it_stays_a_number_whatever_happens():
    scale = LossScale(torch.device("cpu"))
    for _ in range(200):
        scale.after_step(1, outcome(float("nan")))
    assert scale.value == 2.0**-60


@pytest.mark.parametrize("scale", [2.0**10, None])
def test_backward_passes_are_of_the_scaled_loss_and_gradients_are_not(scale):
    config = Config(
        model=ModelConfig(**SMALL),
        float8=Float8(recipe="native", linear_layers="all"),
        training=Training(seq_len=64),
        compile=Compile(enabled=False),
    )
    model = ParallelModel(config, World.alone())
    model.init_weights(0)
    if scale is not None:
        model.loss_scaling = LossScale(torch.device("cpu"))
        model.loss_scaling.value.fill_(scale)
    weight, seen = model.parts[0].blocks["0"].feed_forward.down.weight, []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.norm().item()))
    tokens = batch()
    loss = model.train_step([MicroBatch(tokens, tokens, None, len(tokens))], tokens.numel())
    assert 2 < loss.item() < 6  # some targets are none
    assert seen[0] == pytest.approx((scale or 1.0) * weight.grad.norm().item(), rel=1e-5)


SCALED = ("--float8.recipe", "native", "--float8.linear_layers", "all", "--float8.loss_scaling", "true")
SHORT = ("--training.steps", "6", "--checkpoint.interval", "3", "--validation.interval", "0")


def test_a_run_with_it_learns_what_one_without_does(tiny, tmp_path):
    """Powers of two round nothing, in the scales of float8 either."""
    runs = {}
    for name, options in (("scaled", SCALED), ("plain", SCALED[:-2])):
        folder = tmp_path / name
        assert train(tiny, "--job.dump_folder", str(folder), *SHORT, *options) == 0
        runs[name] = metrics(folder), metrics(folder, "grad_norm")
        assert set(metrics(folder, "loss_scale").values()) == ({2.0**16} if name == "scaled" else set())
    assert runs["scaled"] == runs["plain"]


def test_an_overflow_is_skipped_and_halves_it_and_a_resumed_run_goes_on_with_that(tiny, tmp_path):
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    fault = (Fault(2, "inf gradient"),)
    for folder, steps in ((whole, "6"), (cut, "3")):
        options = "--job.dump_folder", str(folder), *SHORT, *SCALED, "--training.steps", steps
        ended = run_with_faults(fault, (), str(tiny), *options)
        assert ended.code == 0, ended.err
        assert metrics(folder, "skipped_steps")[2] == 1
        assert metrics(folder, "loss_scale")[1] == 2.0**16
        assert metrics(folder, "loss_scale")[2] == 2.0**15
    stored = tensors(checkpoint(cut, 3))
    assert stored["loss_scale.value"] == 2.0**15
    assert stored["loss_scale.good_steps"] == 1


def test_a_checkpoint_without_it_loads(tiny, tmp_path):
    assert train(tiny, *SHORT, "--training.steps", "3") == 0
    assert train(tiny, *SHORT, *SCALED) == 0
    assert metrics(tmp_path / "run", "loss_scale").keys() == {4, 5, 6}
