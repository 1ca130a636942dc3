"""kill -9 at random moments, through ./run_train.sh: the run ends as one that nobody hurt, bit for bit."""

import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos_compare import differences
from benchmarks.chaos_job import Job, Moments, Progress, unfinished
from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.waiting import HANG

# A micro-batch a sequence: slow enough that most kills come in time. Saves are most of the time.
SETTINGS = (
    *("--training.local_batch_size", "1", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "2"),
    *("--validation.interval", "20", "--validation.max_tokens", "1024"),
)
LONG = (*SETTINGS, "--training.steps", "120")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name, see Job."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_config(tmp_path)


def assert_no_trace(folder: Path, config: Path, processes: int, steps: int, *overrides: str) -> None:
    """Train the same undisturbed, without a launcher, and compare metrics, tensors, counters and cursors."""
    whole = folder.with_name("whole")
    assert on_ranks(processes, run, str(config), "--job.dump_folder", str(whole), *overrides) == [0] * processes
    assert differences(folder, whole, steps) == []


def kill_ranks(job: Job, moments: list[str], draw: random.Random, enough: int | None = None) -> int:
    """SIGKILL to a rank at each of these moments, and again to its end; returns how many fell into a save.

    The list is done with once `enough` did.

    A command that ends by a kill, as that of a single process does, is given again.
    """
    moment = Moments(draw)
    within_saves = 0
    job.start()
    for number, name in enumerate(moments):
        while not getattr(moment, name)(job):
            assert job.code() not in (0, 2), f"ended before kill {number} ({name}): {job.described()}"
            job.start()
        victim = draw.choice(job.find("rank"))
        saving = unfinished(job.folder)
        job.kill(victim)
        within_saves += name != "starting" and bool(saving & unfinished(job.folder))
        if job.processes == 1:
            assert job.end() == -signal.SIGKILL
            job.start()
        if within_saves == enough:
            break
    assert job.end() == 0, job.described()
    return within_saves


# Each starts the program four times. In CI ranks are killed without a launcher (test_reshard.py and others), workers of
# a launcher crash (tests/launch), and checkpoints are left unfinished (tests/checkpoint).
@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, moments", [(1, ["first_step", "saving", "starting"]), (2, ["saving"]), (2, ["saving"] * 4)]
)
def test_a_few_kills_around_a_save_leave_no_trace(
    tmp_path: Path, config: Path, temporary: Path, processes: int, moments: list[str]
) -> None:
    with Job(config, tmp_path / "run", temporary, processes, *SETTINGS) as job:
        within_saves = kill_ranks(job, moments, random.Random(7), enough=1 if processes == 2 else None)
    assert within_saves >= 1 or processes == 1  # that one of a single process does is for the twenty to show
    assert Progress.of(tmp_path / "run").starts >= 2
    assert_no_trace(tmp_path / "run", config, processes, 30, *SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_twenty_kills_at_random_moments_leave_no_trace(
    tmp_path: Path, config: Path, temporary: Path, processes: int
) -> None:
    draw = random.Random(2024)
    moments = ["starting"] * 4 + ["first_step"] * 4 + ["stepping"] * 6 + ["saving"] * 6
    draw.shuffle(moments)
    with Job(config, tmp_path / "run", temporary, processes, *LONG) as job:
        assert kill_ranks(job, moments, draw) >= 4
    assert_no_trace(tmp_path / "run", config, processes, 120, *LONG)


@pytest.mark.slow
def test_after_kills_of_the_launcher_of_torchrun_and_of_all_at_once_the_same_command_goes_on(
    tmp_path: Path, config: Path, temporary: Path
) -> None:
    """What the launcher leaves behind ends by itself, and lets go of the dump folder."""
    moment = Moments(random.Random(3))
    with Job(config, tmp_path / "run", temporary, 2, *LONG) as job:
        for victim, code in (("launcher", -signal.SIGKILL), ("agent", 1), ("all", -signal.SIGKILL)):
            for wait in (moment.stepping, moment.saving):
                job.start()
                assert wait(job), job.described()
                job.kill(*(job.find() if victim == "all" else job.find(victim)))
                assert job.end() == code, job.described()
                job.wait_until_gone(HANG)
        job.start()
        assert job.end() == 0, job.described()
    assert Progress.of(tmp_path / "run").starts == 7
    assert_no_trace(tmp_path / "run", config, 2, 120, *LONG)
