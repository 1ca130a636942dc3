"""Whole runs in float8 beside the same run in bfloat16, emulated."""

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Float8, Training
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig
from swamla_titan.parallel.model_parts import ParallelModel
from tests.parallel.plan import SMALL, batch
from tests.train.runs import metrics, train


@pytest.mark.parametrize(
    "recipe", ["native", *(pytest.param(each, marks=pytest.mark.slow) for each in ("tensorwise", "rowwise"))]
)
def test_twenty_steps_stay_near_those_in_bfloat16(recipe, tiny, tmp_path):
    same = ("--training.steps", "20", "--training.compute_dtype", "bfloat16", "--model.dropout", "0")
    losses = {}
    for name in ("off", recipe):
        folder = tmp_path / name
        options = ("--job.dump_folder", str(folder), *same, "--optimizer.lr", "1e-3", "--validation.interval", "0")
        chosen = ("--float8.recipe", name, "--float8.linear_layers", "all") if name != "off" else ()
        assert train(tiny, *options, *chosen) == 0
        losses[name] = list(metrics(folder).values())
    assert len(losses["off"]) == 20
    assert losses["off"][-1] < losses["off"][0] - 0.7  # something was learnt
    assert losses[recipe] == pytest.approx(losses["off"], rel=0.01)
    assert losses[recipe] != losses["off"]


def test_what_is_cast_once_for_a_step_is_cast_anew_when_weights_have_changed():
    config = Config(
        model=ModelConfig(**SMALL),
        float8=Float8(recipe="native", linear_layers="all"),
        training=Training(seq_len=64),
        compile=Compile(enabled=False),
    )
    tokens = batch()
    micro_batch = MicroBatch(tokens, tokens, None, len(tokens))
    models = [ParallelModel(config, World.alone()) for _ in range(2)]
    for model in models:
        model.init_weights(0)
    models[0].train_step([micro_batch, micro_batch], 2 * tokens.numel())
    for model in models:
        with torch.no_grad():
            for parameter in model.parts[0].parameters():
                parameter.mul_(3)
    for count in (1, 2):  # alone a micro-batch casts for itself
        first, second = (model.evaluate([micro_batch] * count) for model in models)
        assert torch.equal(first, second)
