"""training.stages under every plan, and on other numbers of ranks from one part of a run to the next."""

import json
from pathlib import Path

import pytest

from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.train.runs import checkpoint, metrics, tensors, train
from tests.train.test_stages import STAGES

COMMON = (
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--model.dropout", "0"),
    *("--model.num_layers", "4", "--data.num_workers", "0", "--data.streams", "7"),
    *("--validation.interval", "7", "--checkpoint.interval", "100"),
)
PLANS = {
    "fsdp-3": (3, ()),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "cp-2": (2, ("--parallel.context", "2")),
    "pp-2": (2, ("--parallel.pipeline", "2")),
    "zbv-2": (2, ("--parallel.pipeline", "2", "--parallel.pipeline_schedule", "ZBVZeroBubble")),
    "tp-2-cp-2": (4, ("--parallel.tensor", "2", "--parallel.context", "2")),
}


@pytest.fixture
def ramp(tiny: Path) -> Path:
    tiny.write_text(tiny.read_text() + STAGES)
    return tiny


@pytest.fixture
def whole(ramp: Path, tmp_path: Path) -> Path:
    """The folder of a run of one process."""
    assert train(ramp, *COMMON, "--training.steps", "14", "--job.dump_folder", str(tmp_path / "whole")) == 0
    return tmp_path / "whole"


def assert_alike(found: Path, expected: Path) -> None:
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(found, name) == pytest.approx(metrics(expected, name), rel=1e-4)
    assert metrics(found, "tokens") == metrics(expected, "tokens")
    one, other = (json.loads((checkpoint(each, 14) / "train.json").read_text()) for each in (found, expected))
    assert one["cursors"] == other["cursors"]
    of_one, of_other = tensors(checkpoint(found, 14)), tensors(checkpoint(expected, 14))
    for name in (name for name in of_one if name.startswith("model.")):
        assert (of_one[name] - of_other[name]).abs().max() < 2e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_stages_train_alike_under_every_plan(ramp: Path, tmp_path: Path, whole: Path, plan: str):
    ranks, keys = PLANS[plan]
    assert set(on_ranks(ranks, run, str(ramp), *COMMON, "--training.steps", "14", *keys)) == {0}
    assert_alike(tmp_path / "run", whole)


@pytest.mark.slow
def test_one_rank_then_four_then_three_in_mid_ramp(ramp: Path, tmp_path: Path, whole: Path):
    for ranks, steps in ((1, 6), (4, 11), (3, 14)):
        assert set(on_ranks(ranks, run, str(ramp), *COMMON, "--training.steps", str(steps))) == {0}
    # The last steps of the parts were validated too.
    found = {step: loss for step, loss in metrics(tmp_path / "run", "val_loss").items() if step in (7, 14)}
    assert found == pytest.approx(metrics(whole, "val_loss"), rel=1e-4)
    for name in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(whole, name), rel=1e-4)
    one, other = (json.loads((checkpoint(each, 14) / "train.json").read_text()) for each in (tmp_path / "run", whole))
    assert (one["cursors"], one["tokens"], one["sequences"]) == (other["cursors"], other["tokens"], other["sequences"])
