"""kill -9 at random moments, through ./run_train.sh: the run ends as one that nobody hurt, bit for bit."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos_job import Job, Moments, Progress, unfinished
from tests.distributed.chaos import SETTINGS, assert_same_run, undisturbed, write_config


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name, see Job."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def kill_ranks(job: Job, moments: list[str], draw: random.Random) -> int:
    """SIGKILL to a rank at each of these moments, and again to its end; returns how many fell into a save.

    A command that ends by a kill, as that of a single process does, is given again.
    """
    moment = Moments(draw)
    within_saves = 0
    job.start()
    for number, name in enumerate(moments):
        wait = getattr(moment, name)
        while not wait(job):
            assert job.code() not in (0, 2), f"at its end before kill {number} ({name}): {job.described()}"
            job.start()
        victim = draw.choice(job.find("rank"))
        saving = unfinished(job.folder)
        job.kill(victim)
        within_saves += bool(saving & unfinished(job.folder)) and name != "starting"
        if job.processes == 1:
            assert job.end() == -9
            job.start()
    assert job.end() == 0, job.described()
    return within_saves


@pytest.mark.parametrize("processes", [1, 2])
def test_three_kills_one_of_them_inside_a_save_leave_no_trace(tmp_path: Path, temporary: Path, processes: int) -> None:
    config = write_config(tmp_path)
    whole = undisturbed(config, tmp_path / "whole", temporary, processes, *SETTINGS)
    with Job(config, tmp_path / "run", temporary, processes, *SETTINGS) as job:
        assert kill_ranks(job, ["stepping", "starting", "saving"], random.Random(7)) >= 1
    assert Progress.of(tmp_path / "run").starts >= 3
    assert_same_run(tmp_path / "run", whole, 30)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path: Path, temporary: Path, processes: int) -> None:
    draw = random.Random(2024)
    names = ["starting"] * 4 + ["first_step"] * 4 + ["stepping"] * 6 + ["saving"] * 6
    draw.shuffle(names)
    config = write_config(tmp_path)
    longer = (*SETTINGS, "--training.steps", "240")
    whole = undisturbed(config, tmp_path / "whole", temporary, processes, *longer)
    with Job(config, tmp_path / "run", temporary, processes, *longer) as job:
        assert kill_ranks(job, names, draw) >= 4
    assert_same_run(tmp_path / "run", whole, 240)
