"""Whole runs in float8 beside the same run in bfloat16, emulated."""

import pytest

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
        chosen = ("--float8.recipe", name, "--float8.products", "all") if name != "off" else ()
        assert train(tiny, *options, *chosen) == 0
        losses[name] = list(metrics(folder).values())
    assert len(losses["off"]) == 20
    assert losses["off"][-1] < losses["off"][0] - 0.7  # something was learnt
    assert losses[recipe] == pytest.approx(losses["off"], rel=0.01)
    assert losses[recipe] != losses["off"]
