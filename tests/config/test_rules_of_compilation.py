"""Keys of [activation_checkpoint] and [float8] that cannot hold together with others."""

import pytest

from swamla_titan.config.rules import contradictions
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Config, Float8, Parallel, Training


@pytest.mark.parametrize(
    "config, keys",
    [
        (
            Config(activation_checkpoint=ActivationCheckpoint(mode="full", memory_budget=0.5)),
            {"activation_checkpoint.memory_budget", "activation_checkpoint.mode"},
        ),
        (
            Config(activation_checkpoint=ActivationCheckpoint(memory_budget=0.5), compile=Compile(enabled=False)),
            {"activation_checkpoint.memory_budget", "compile.enabled"},
        ),
        (
            Config(float8=Float8(recipe="rowwise"), training=Training(seq_len=1000)),
            {"training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"},
        ),
        (
            Config(float8=Float8(recipe="rowwise"), training=Training(seq_len=1008), parallel=Parallel(context=2)),
            {"training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"},
        ),
        (
            Config(float8=Float8(recipe="rowwise"), training=Training(seq_len=1040), parallel=Parallel(tensor=2)),
            {"training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"},
        ),
    ],
)
def test_refused(config: Config, keys: set[str]):
    # nothing of these configurations' defaults but what is tested
    found = [set(each.keys) for each in contradictions(config) if each.keys[0].partition(".")[0] != "data"]
    assert found == [keys]


def test_allowed():
    config = Config(
        float8=Float8(recipe="rowwise"),
        training=Training(seq_len=1024),
        parallel=Parallel(context=2),
        activation_checkpoint=ActivationCheckpoint(memory_budget=0.5),
    )
    assert [each for each in contradictions(config) if each.keys[0].partition(".")[0] != "data"] == []
