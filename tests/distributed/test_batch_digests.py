"""The log of batches: what it says is the same for runs that trained on the same data, and only for these."""

import json
from pathlib import Path

import pytest

from swamla_titan.train.policies.batch_digests import NAME
from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import train

SETTINGS = ("--metrics.batch_digests", "true", "--data.num_workers", "0", "--validation.interval", "0")


def digests(folder: Path) -> dict[int, set[str]]:
    """step -> the digests of its lines; a step that was taken twice has two lines."""
    found: dict[int, set[str]] = {}
    for line in (folder / NAME).read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], set()).add(entry["digest"])
    return found


@pytest.fixture
def alone(tmp_path: Path) -> tuple[str, dict[int, set[str]]]:
    """A configuration, and what a process alone trains on in six steps."""
    config = tiny_config(tmp_path)
    assert train(config, *SETTINGS, "--training.steps", "6", "--job.dump_folder", str(tmp_path / "alone")) == 0
    return str(config), digests(tmp_path / "alone")


def test_a_resumed_run_has_the_digests_of_one_that_was_not_stopped_and_other_data_have_others(tmp_path, alone):
    config, whole = alone
    assert len(set.union(*whole.values())) == len(whole) == 6
    for steps in ("3", "6"):
        assert train(Path(config), *SETTINGS, "--training.steps", steps) == 0
    assert digests(tmp_path / "run") == whole
    folder = tmp_path / "other"
    settings = ("--training.steps", "2", "--job.seed", "9", "--job.dump_folder", str(folder))
    assert train(Path(config), *SETTINGS, *settings) == 0
    assert not set.union(*digests(folder).values()) & set.union(*whole.values())


def test_where_it_cannot_be_written_nothing_is_trained(tmp_path, alone, capsys):
    (tmp_path / "run" / NAME).mkdir(parents=True)
    assert train(Path(alone[0]), *SETTINGS) == 2
    assert "metrics.batch_digests: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, plan",
    [(3, ()), (4, ("--parallel.tensor", "2")), (2, ("--parallel.pipeline", "2", "--training.local_batch_size", "1"))],
    ids=str,
)
def test_the_number_of_ranks_and_the_plan_change_no_digest(tmp_path, alone, ranks, plan):
    config, whole = alone
    assert on_ranks(ranks, run, config, *SETTINGS, "--training.steps", "6", *plan) == [0] * ranks
    assert digests(tmp_path / "run") == whole
