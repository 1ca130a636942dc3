"""What holds of the toy optimizer; run in a copy of the package to which toy.patch was applied."""

import pytest
import torch
from torch import nn

from swamla_titan.cli import main
from swamla_titan.config.sections import Optimizer
from swamla_titan.model import FLAVORS
from swamla_titan.optim import build_optimizer, group_table, state_bytes
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train

SGD = ("--optimizer.name", "sgd", "--optimizer.lr", "0.05", "--training.steps", "4", "--validation.interval", "0")
SHORT = (
    "--checkpoint.interval",
    "2",
    "--data.num_workers",
    "0",
    "--model.dropout",
    "0",
    "--lr_schedule.min_lr_ratio",
    "1",
)


def test_it_takes_the_steps_of_torchs_and_none_that_are_bad():
    torch.manual_seed(0)
    model, weight = nn.Linear(8, 4, bias=False), nn.Parameter(torch.empty(4, 8))
    weight.data.copy_(model.weight)
    optimizer = build_optimizer(model, Optimizer(name="sgd", weight_decay=0.0))
    other = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for step in range(5):
        model.weight.grad = torch.randn(4, 8)
        weight.grad = model.weight.grad / 2
        bad = step == 3
        optimizer.step(0.1, torch.tensor(2.0), torch.tensor(float(bad)))
        if not bad:
            other.step()
        torch.testing.assert_close(model.weight, weight)
    assert state_bytes(model, Optimizer(name="sgd")) == 4 * 8 * 4
    assert {row.kind.rule for row in group_table(FLAVORS["debug"], Optimizer(name="sgd"))} == {"sgd"}


def run(config: str, *overrides: str) -> int:
    return main(["train", config, *overrides])


def test_it_trains_alone_and_sharded_and_resumes(tmp_path, capsys):
    tiny = tiny_config(tmp_path)
    for name, steps in (("whole", "4"), ("cut", "2"), ("cut", "4")):
        folder = ("--job.dump_folder", str(tmp_path / name))
        assert train(tiny, *SGD, *SHORT, *folder, "--training.steps", steps) == 0
    assert_same_checkpoint(checkpoint(tmp_path / "cut", 4), checkpoint(tmp_path / "whole", 4))
    sharded = ("--job.dump_folder", str(tmp_path / "sharded"))
    assert on_ranks(2, run, str(tiny), *SGD, *SHORT, *sharded) == [0, 0]
    losses = [list(metrics(tmp_path / name).values()) for name in ("whole", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    capsys.readouterr()
    assert main(["plan", str(tiny), *SGD]) == 0
    assert train(tiny, "--optimizer.name", "sdg") == 2
    assert '"muon", "sgd", "auto"' in capsys.readouterr().err
