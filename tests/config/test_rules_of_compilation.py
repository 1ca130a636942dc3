"""Keys of [activation_checkpoint] and [float8] that cannot hold together with others."""

import pytest

from swamla_titan.config.rules import conflicts
from swamla_titan.config.sections import (
    ActivationCheckpoint,
    Config,
    FaultTolerance,
    Float8,
    Kernels,
    Parallel,
    Training,
)


@pytest.mark.parametrize(
    "config, keys",
    [
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
        (
            Config(float8=Float8(recipe="tensorwise", fsdp_all_gather="always"), parallel=Parallel(tensor=2)),
            {"float8.fsdp_all_gather", "parallel.tensor"},
        ),
        (
            Config(float8=Float8(recipe="tensorwise", fsdp_all_gather="always"), parallel=Parallel(cpu_offload=True)),
            {"float8.fsdp_all_gather", "parallel.cpu_offload"},
        ),
        (
            Config(float8=Float8(recipe="native", output_head=True), kernels=Kernels(loss="fused")),
            {"float8.output_head", "kernels.loss"},
        ),
        (
            Config(
                float8=Float8(recipe="native", loss_scaling=True),
                fault_tolerance=FaultTolerance(skip_bad_steps=False),
            ),
            {"float8.loss_scaling", "fault_tolerance.skip_bad_steps"},
        ),
    ],
)
def test_refused(config: Config, keys: set[str]):
    # nothing of these configurations' defaults but what is tested
    found = [set(each.keys) for each in conflicts(config) if each.keys[0].partition(".")[0] != "data"]
    assert found == [keys]


def test_allowed():
    config = Config(
        float8=Float8(recipe="rowwise"),
        training=Training(seq_len=1024),
        parallel=Parallel(context=2),
        activation_checkpoint=ActivationCheckpoint(memory_budget=0.5),
    )
    assert [each for each in conflicts(config) if each.keys[0].partition(".")[0] != "data"] == []
