"""./run_train.sh with two processes on the CPU: real torchrun, real trainer, the shipped debug configuration."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.test_launched_workers import assert_gone
from tests.train.runs import checkpoint, kill_groups, metrics, wait_for
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 8
SETTINGS = (
    *("--training.steps", str(STEPS), "--lr_schedule.warmup_steps", "4", "--checkpoint.interval", "3"),
    *("--training.seq_len", "64", "--validation.interval", "4", "--validation.max_tokens", "2048"),
    *("--metrics.log_interval", "1", "--metrics.tensorboard", "false"),
)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name: loader processes are reached through sockets in it, whose paths have 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def start(tmp_path: Path, temporary: Path) -> Iterator[Start]:
    """Starts run_train.sh on the debug configuration in tmp_path/run; what it left running is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if name not in ("LOG_RANK", "NNODES")}
        environment |= {"PYTHON": sys.executable, "NGPU": "0", "NPROC": "2", "TMPDIR": str(temporary)}
        environment["MAX_RESTARTS"] = "1"  # the first restart must succeed
        command = [str(ROOT / "run_train.sh"), "debug", "--job.dump_folder", str(tmp_path / "run"), *SETTINGS]
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    kill_groups(started)


def end(process: "subprocess.Popen[str]", code: int) -> str:
    """Wait for the end, which must be with `code`; returns standard output."""
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == code, out + err
    return out


def worker(temporary: Path, rank: int) -> int:
    """The process id of a worker, which the launcher's folder has."""
    (file,) = temporary.glob(f"swamla-titan.*/{rank}.pid")
    return int(file.read_text())


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    wait_for(folder / "metrics.jsonl", process)

    def taken() -> bool:
        assert process.poll() is None, process.communicate()
        return max(metrics(folder), default=0) >= step

    wait_until(taken)


def assert_finished(folder: Path) -> None:
    assert checkpoint(folder, STEPS).is_dir()
    assert sorted(metrics(folder)) == list(range(1, STEPS + 1))
    assert sorted(metrics(folder, "val_loss")) == [4, 8]


def test_a_job_of_two_processes_is_done(tmp_path: Path, start: Start) -> None:
    out = end(start(), 0)
    assert_finished(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert out.count(f"step {STEPS}/{STEPS}") == 1
    assert out.count("on 2 x CPU, ") == 1
    for rank in range(2):
        assert f"step-{STEPS:08d}" in (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()


# Five micro-batches in place of one: slow enough for a signal to come in time.
SLOW = ("--training.local_batch_size", "1", "--training.seq_len", "256")


def everything(temporary: Path) -> list[int]:
    """The processes of the job: launcher, torchrun, workers, loaders and their servers."""
    (folder,) = temporary.glob("swamla-titan.*")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SWAMLA_TITAN_LAUNCH_FOLDER={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except (OSError, ProcessLookupError):  # it has ended
            continue
    return found


@pytest.mark.slow  # each starts the program twice, under torchrun: 30 s and more on a busy machine
@pytest.mark.parametrize(
    "number, to",
    [
        (signal.SIGTERM, "the launcher"),
        (signal.SIGUSR1, "the launcher"),
        (signal.SIGTERM, "rank 1"),
        (signal.SIGUSR1, "everything"),  # as SLURM does
    ],
)
def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(
    tmp_path: Path, temporary: Path, start: Start, number: signal.Signals, to: str
) -> None:
    process = start(*SLOW)
    wait_for_step(tmp_path / "run", 2, process)
    told = {"the launcher": [process.pid]}
    if to == "rank 1":
        told[to] = [worker(temporary, 1)]
    elif to == "everything":
        told[to] = [process.pid, *everything(temporary)]
        assert len(told[to]) >= 7  # launcher, torchrun, two workers, two loaders, a server of theirs
    for pid in told[to]:
        os.kill(pid, number)
    out = end(process, 75)
    assert f"stopped by {number.name} after step " in out
    stopped = max(metrics(tmp_path / "run"))
    assert stopped < STEPS
    assert checkpoint(tmp_path / "run", stopped).is_dir()
    assert f"resumed from {checkpoint(tmp_path / 'run', stopped)}" in end(start(*SLOW), 0)
    assert_finished(tmp_path / "run")


# rank 1 of the first start takes a nap in the step after SIGUSR2: the first signal must wait for it.
NAP = """
import os, signal, time
if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(1200))
"""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_the_same_command_goes_on(
    tmp_path: Path, temporary: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NAP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    process = start(*SLOW)
    wait_for_step(tmp_path / "run", 4, process)
    pids = everything(temporary)
    os.kill(worker(temporary, 1), signal.SIGUSR2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    end(process, 128 + signal.SIGTERM)  # in half the time that rank 1 sleeps
    assert not (tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}").exists()
    assert len(pids) >= 7
    monkeypatch.delenv("PYTHONPATH")
    assert "resumed from " in end(start(*SLOW), 0)
    assert_finished(tmp_path / "run")


@pytest.mark.slow
def test_torchrun_itself_is_killed_and_no_worker_is_left_behind(tmp_path: Path, temporary: Path, start: Start) -> None:
    process = start(*SLOW)
    wait_for_step(tmp_path / "run", 4, process)
    pids = [worker(temporary, rank) for rank in range(2)]
    (torchrun,) = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
    os.kill(torchrun, signal.SIGKILL)
    end(process, 1)
    for pid in pids:
        assert_gone(pid)
    assert f"resumed from {checkpoint(tmp_path / 'run', 3)}" in end(start(*SLOW), 0)
    assert_finished(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_is_replaced_and_the_run_goes_on(
    tmp_path: Path, temporary: Path, start: Start, rank: int
) -> None:
    process = start(*SLOW)
    wait_for_step(tmp_path / "run", 4, process)
    os.kill(worker(temporary, rank), signal.SIGKILL)
    out = end(process, 0)
    assert f"resumed from {checkpoint(tmp_path / 'run', 3)}" in out
    assert_finished(tmp_path / "run")


# Python imports it at its start, from PYTHONPATH: rank 1 of the first start falls asleep for ever at SIGUSR2.
ASLEEP = """
import os, signal, time
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(10_000))
"""


@pytest.mark.slow
def test_a_rank_asleep_for_ever_is_noticed_stacks_of_all_are_kept_and_the_run_goes_on(
    tmp_path: Path, temporary: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ASLEEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    # The long limit for the case that the signal comes during the checkpoint of step 6.
    limit = ("--fault_tolerance.step_timeout", "20", "--fault_tolerance.first_step_timeout", "100")
    process = start(*SLOW, *limit)
    wait_for_step(tmp_path / "run", 5, process)
    os.kill(worker(temporary, 1), signal.SIGUSR2)
    out = end(process, 0)
    stopped = next(step for step in range(STEPS, 0, -1) if f"after step {step}; this process ends" in out)
    assert f"resumed from {checkpoint(tmp_path / 'run', stopped - stopped % 3)}" in out
    assert_finished(tmp_path / "run")
    zero, one = sorted((tmp_path / "run" / "traces").iterdir())
    assert zero.name.endswith("-rank-0.txt")
    assert one.name == zero.name.replace("rank-0", "rank-1")
    assert "sitecustomize.py" in one.read_text()
    assert "sitecustomize.py" not in zero.read_text()
    assert "rank 1 after step " in out
    whole = ("--job.dump_folder", str(tmp_path / "whole"))
    end(start(*SLOW, *limit, *whole), 0)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
