"""The average of weights under each plan: the one of one process, for validation, in checkpoints, after a rewind."""

from pathlib import Path

import pytest
import torch

from tests.distributed.job import run, run_and_listen
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.faults import Fault, run_with_faults
from tests.train.runs import checkpoint, metrics, tensors

COMMON = (
    *("--data.num_workers", "0", "--model.dropout", "0", "--lr_schedule.warmup_steps", "0", "--optimizer.lr", "3e-3"),
    *("--training.local_batch_size", "1", "--validation.interval", "1", "--validation.use_ema", "true"),
    *("--ema.decay", "0.8", "--training.steps", "4", "--checkpoint.interval", "2"),
)
PLANS = {
    # Gathered weights are kept through a validation, and after it.
    "fsdp-2-kept": (2, ("--parallel.reshard_after_forward", "never")),
    "fsdp-3-freed": (3, ("--parallel.reshard_after_forward", "always")),
    "ddp-2": (2, ("--parallel.data_parallel", "ddp")),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "pp-2": (2, ("--parallel.pipeline", "2")),
    "zbv-2": (
        2,
        ("--parallel.pipeline", "2", "--parallel.pipeline_schedule", "ZBVZeroBubble", "--model.num_layers", "4"),
    ),
}
SLOW = {"fsdp-3-freed", "ddp-2", "tp-2", "pp-2", "zbv-2"}


def written(folder: Path) -> str:
    return str(tiny_config(folder))


@pytest.mark.parametrize("plan", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PLANS])
def test_every_plan_validates_and_keeps_the_average_of_one_process(tmp_path, plan):
    ranks, parallel = PLANS[plan]
    config, whole = written(tmp_path), tmp_path / "whole"
    layers = parallel[-2:] if "--model.num_layers" in parallel else ()
    assert run(config, *COMMON, *layers, "--job.dump_folder", str(whole)) == 0
    assert on_ranks(ranks, run, config, *COMMON, *parallel) == [0] * ranks
    for name in ("loss", "val_loss"):
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(whole, name), rel=1e-5), name
    found, expected = (tensors(checkpoint(folder, 4)) for folder in (tmp_path / "run", whole))
    averages = {name for name in expected if name.startswith("ema.")}
    assert {name.replace("ema.", "model.", 1) for name in averages} == {n for n in expected if n.startswith("model.")}
    for name in averages:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_other_ranks_go_on_with_it_and_a_run_that_had_none_begins_with_its_weights(tmp_path):
    config, whole = written(tmp_path), tmp_path / "whole"
    constant = (*COMMON, "--lr_schedule.min_lr_ratio", "1")
    assert run(config, *constant, "--job.dump_folder", str(whole)) == 0
    assert on_ranks(2, run, config, *constant, "--training.steps", "2") == [0, 0]
    assert run(config, *constant) == 0
    found, expected = (tensors(checkpoint(folder, 4)) for folder in (tmp_path / "run", whole))
    for name in (name for name in expected if name.startswith("ema.")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    none = ("--ema.decay", "0", "--validation.use_ema", "false")
    without = tmp_path / "without"
    assert run(config, *COMMON, *none, "--training.steps", "2", "--job.dump_folder", str(without)) == 0
    ended = run_and_listen(config, *COMMON, "--optimizer.lr", "0", "--job.dump_folder", str(without))
    assert "holds no average of the weights: it begins with the weights themselves" in ended.out + ended.err
    found = tensors(checkpoint(without, 4))
    for name in found:
        if name.startswith("ema."):
            assert torch.equal(found[name], found[name.replace("ema.", "model.", 1)])
    ended = run_and_listen(config, *COMMON, *none, "--training.steps", "5", "--job.dump_folder", str(without))
    assert "holds an average of the weights, which ema.decay = 0 drops" in ended.out + ended.err


def test_a_bad_step_and_a_rewind_take_it_along(tmp_path):
    """Steps 3 and 4 are bad; at the end of 5 weights and average become those from before the row's, of step 1."""
    faults = (Fault(3, "nan gradient"), Fault(4, "nan gradient"))
    policy = (
        "--fault_tolerance.max_bad_steps",
        "2",
        "--fault_tolerance.max_rewinds",
        "1",
        "--checkpoint.interval",
        "1",
    )
    settings = (*COMMON, *policy, "--checkpoint.keep_latest", "0", "--training.steps", "7")
    ended = run_with_faults(faults, (), written(tmp_path), *settings)
    assert ended.code == 0, ended.err
    at = {step: tensors(checkpoint(tmp_path / "run", step)) for step in range(1, 8)}
    for name in (name for name in at[2] if name.startswith("ema.")):
        assert torch.equal(at[3][name], at[2][name]), "a bad step"
        assert not torch.equal(at[2][name], at[1][name])
        assert torch.equal(at[5][name], at[1][name]), "the rewind"
        assert not torch.equal(at[6][name], at[5][name])
