"""A disk that is full for a while, a folder that cannot be written, a clock that jumps: the run goes on or stops clean.

The limit on a file's size stands in for a full disk: the system takes a part of a line and refuses the rest. Where the
tests may mount one, a disk of a few pages is really full.
"""

import ast
import errno
import inspect
import json
import logging
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import swamla_titan
from swamla_titan.data import StepBatch
from swamla_titan.system import events
from swamla_titan.system.line_file import LineFile
from swamla_titan.train.step import StepOutcome, TrainStep
from tests.distributed.job import run as run_command
from tests.distributed.job import run_killed
from tests.distributed.ranks import on_ranks
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, snapshot, train

FAST = ("--data.num_workers", "0", "--training.steps", "8", "--validation.interval", "0", "--checkpoint.interval", "4")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes; Python ignores the signal, and writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Mounts a disk of a few pages on a folder, which it makes."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def at_steps(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Calls an action as a step (from 1) begins."""
    original = TrainStep.__call__

    def train_step(self: TrainStep, batch: StepBatch, step: int) -> StepOutcome:
        actions.get(step, lambda: None)()
        return original(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", train_step)
        yield


def fill(folder: Path) -> None:
    """Write to the disk of a folder until it is full."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# a file of lines


def test_what_the_disk_refuses_waits_and_follows_where_it_was_cut(tmp_path):
    path = tmp_path / "lines"
    file = LineFile(path)
    assert file.write("first") is None
    with file_limit(9):
        news = file.write("second")
        assert news == f"{path} cannot be written (File too large); its lines wait in memory until it can"
        assert path.read_text() == "first\nsec"
        assert file.write("third") is None  # told once
    assert file.write("fourth") == f"{path} can be written again, and holds all lines"
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    with file_limit(30):
        assert file.write("fifth") is not None  # anew
        assert file.write("sixth") is None
        assert file.close() == f"{path} lacks the last 2 lines (File too large)"


@pytest.mark.parametrize(
    "before, after", [("", "new\n"), ("a\n", "a\nnew\n"), ("a\nhal", "a\nhal\nnew\n"), ("\n", "\nnew\n")]
)
def test_a_line_cut_short_is_ended_before_the_next(tmp_path, before, after):
    path = tmp_path / "lines"
    path.write_text(before)
    file = LineFile(path)
    assert path.read_text() == before  # nothing is written for its own sake
    file.write("new")
    file.close()
    assert path.read_text() == after


@pytest.mark.parametrize("cut", [*(pytest.param(cut, marks=pytest.mark.slow) for cut in (1, 2, 40)), 200])
def test_a_metrics_file_cut_by_a_crash_keeps_its_whole_lines_and_gets_whole_ones(tiny, tmp_path, cut):
    """By the command in a process of its own, killed after step 5; the file loses its last bytes as in a power cut."""
    waited_for = ("--checkpoint.async_mode", "disabled")  # else the kill may come before the checkpoint of step 4
    with pytest.raises(AssertionError, match="rank 0 died"):
        on_ranks(1, run_killed, 6, str(tiny), *FAST, *waited_for)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    path.write_bytes(whole[:-cut])
    assert train(tiny, *FAST) == 0
    text = path.read_bytes()
    assert text.startswith(whole[:-cut])
    parsed = []
    for line in text.decode().splitlines():
        try:
            parsed.append(json.loads(line)["step"])
        except ValueError:
            assert whole[:-cut].endswith(line.encode())  # the half one, and nothing glued to it
    assert parsed == ([1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 4]) + [5, 6, 7, 8]


# a disk that is full in mid-run


def test_a_disk_full_for_some_steps_costs_no_line_and_no_number(tiny, tmp_path, monkeypatch, capsys):
    """Neither metrics.jsonl nor the log can grow in steps 2 and 3; both then hold all of it, in order."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(tiny, *FAST, "--job.dump_folder", str(whole)) == 0
    capsys.readouterr()
    free = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with at_steps(monkeypatch, {2: lambda: limit_files(100), 4: lambda: limit_files(free)}):
        assert train(tiny, *FAST) == 0
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in lines(run)] == list(range(1, 9))
    shown = capsys.readouterr().out
    for path in (run / "metrics.jsonl", run / "logs" / "rank-0.log"):
        assert shown.count(f"{path} cannot be written (File too large)") == 1
        assert shown.count(f"{path} can be written again, and holds all lines") == 1
    logged = (run / "logs" / "rank-0.log").read_text()
    assert [int(step) for step in re.findall(r": step (\d)/8 ", logged)] == list(range(1, 9))
    assert_same_checkpoint(checkpoint(run, 8), checkpoint(whole, 8))


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-0.log"])
def test_a_file_that_never_can_be_written_is_told_of_and_the_run_is_done(tiny, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    assert train(tiny, *FAST) == 0
    shown = capsys.readouterr().out
    assert shown.count("(No space left on device); its lines wait") == 1
    assert checkpoint(tmp_path / "run", 8).is_dir()
    if name == "metrics.jsonl":
        assert f"{path} lacks the last 8 lines (No space left on device)" in shown


# TensorBoard's thread, which met with it first, says so itself on standard error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_told_of_once(tiny, tmp_path, monkeypatch, small_disk, capsys):
    run = tmp_path / "run"
    small_disk(run / "tensorboard", "size=16k")

    with at_steps(monkeypatch, {3: lambda: fill(run / "tensorboard")}):
        # So many numbers that they leave the page that the file has already.
        assert train(tiny, *FAST, "--metrics.tensorboard", "true", "--training.steps", "40") == 0
    shown = capsys.readouterr().out
    assert shown.count("TensorBoard gets no more metrics until the next start ([Errno 28]") == 1
    assert shown.count("No space left on device") == 1
    assert sorted(metrics(run)) == list(range(1, 41))


def test_weights_and_biases_that_fail_are_told_of_once(tiny, tmp_path, wandb, monkeypatch, capsys):
    def fail(values: dict[str, float], step: int) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert step < 3

    monkeypatch.setattr(wandb, "log", fail)
    assert train(tiny, *FAST, "--metrics.wandb", "true") == 0
    assert capsys.readouterr().out.count("Weights & Biases gets no more metrics until the next start") == 1
    assert wandb.finished == 1
    assert sorted(metrics(tmp_path / "run")) == list(range(1, 9))


@pytest.mark.parametrize("where", ["a small disk", "a file in the way"])
def test_a_profile_that_cannot_be_written_is_told_of_and_leaves_no_half(tiny, tmp_path, small_disk, capsys, where):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(tiny, *FAST, "--job.dump_folder", str(whole)) == 0
    if where == "a small disk":
        small_disk(run / "traces", "size=64k")
    else:
        run.mkdir()
        (run / "traces").write_text("in the way")
    asked = ("--profiling.enabled", "true", "--profiling.start_step", "2", "--profiling.num_steps", "2")
    assert train(tiny, *FAST, *asked) == 0
    assert capsys.readouterr().out.count("steps-2-3.json could not be written (") == 1
    assert not list(run.glob("traces/steps*"))
    assert metrics(run) == metrics(whole)


@pytest.mark.slow
def test_a_console_that_is_full_or_gone_ends_no_run(tiny, tmp_path):
    command = f"{sys.executable} -m swamla_titan train {tiny} {' '.join(FAST)}"
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(metrics(tmp_path / "run")) == list(range(1, 9))
    gone = f"--job.dump_folder {tmp_path / 'gone'}"
    done = subprocess.run(
        ["bash", "-c", f"{command} {gone} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(metrics(tmp_path / "gone")) == list(range(1, 9))


# a folder that cannot be written at the start


def refused(capsys: pytest.CaptureFixture[str], config: Path) -> str:
    """The only line on standard error of a run that is refused."""
    assert train(config, *FAST) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_read_only_folder_is_refused_and_left_as_it_is(tiny, tmp_path, small_disk, capsys):
    run = tmp_path / "run"
    small_disk(run, "size=16m")
    # in a process that leaves no file open
    assert on_ranks(1, run_command, str(tiny), *FAST, "--training.steps", "4") == [0]
    before = snapshot(run)
    subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
    assert refused(capsys, tiny) == f"error: job.dump_folder = {run}: cannot be written (Read-only file system)\n"
    assert snapshot(run) == before
    subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
    assert train(tiny, *FAST) == 0


def test_a_disk_full_at_the_start_is_refused_and_nothing_whole_is_lost(tiny, tmp_path, small_disk, capsys):
    run = tmp_path / "run"
    small_disk(run, "size=16m")
    assert train(tiny, *FAST, "--training.steps", "4") == 0
    fill(run)
    before = snapshot(run)
    assert refused(capsys, tiny) == f"error: job.dump_folder = {run}: cannot be written (No space left on device)\n"
    assert snapshot(run) == before  # config.toml too
    (run / "filler").unlink()
    assert train(tiny, *FAST) == 0
    assert [line["step"] for line in lines(run)] == list(range(1, 9))


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_whatever_first_fails_in_the_folder_is_one_message(tiny, tmp_path, monkeypatch, capsys, call):
    """Where nothing can be mounted: the system's answer for a folder that is read-only, to each kind of call."""
    original = getattr(Path, call)

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.is_relative_to(tmp_path / "run"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, call, refuse)
    message = f"error: job.dump_folder = {tmp_path}/run: cannot be written (Read-only file system)\n"
    assert refused(capsys, tiny) == message


# clocks


@pytest.mark.parametrize("direction", [1, -1])
def test_a_clock_that_jumps_changes_nothing(tiny, tmp_path, monkeypatch, capsys, direction):
    """By up to a year at each look, and by a day at least: numbers, times, the watchdog and retention."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*FAST, "--checkpoint.interval", "2", "--checkpoint.keep_latest", "2", "--metrics.tensorboard", "true")
    assert train(tiny, *settings, "--job.dump_folder", str(whole)) == 0
    capsys.readouterr()
    real, looks, drawn = time.time, 0, random.Random(direction)

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + direction * (86_400 * looks + drawn.uniform(0, 3e7))

    limits = ("--fault_tolerance.step_timeout", "3600", "--fault_tolerance.first_step_timeout", "3600")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        for steps in ("4", "8"):  # and a resume
            assert train(tiny, *settings, *limits, "--training.steps", steps) == 0
            # What was written in which order shows in no file's time.
            for number, path in enumerate(sorted((run / "checkpoints").iterdir(), reverse=True)):
                os.utime(path, (1e9 + number, 1e9 + number))
    assert looks > 8  # of logging at least
    assert metrics(run) == metrics(whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    for name in ("step_seconds", "data_seconds"):
        assert all(0 < value < 3600 for value in metrics(run, name).values()), name
    assert re.findall(r"ETA (\S+)", capsys.readouterr().out)[:2] != []
    assert "day" not in "".join(re.findall(r"ETA .*", (run / "logs" / "rank-0.log").read_text()))


def test_nothing_here_looks_at_a_clock_that_can_be_set_nor_at_the_times_of_files():
    """Only the lines of the log, metrics and events bear the time of day; what is measured is by monotonic clocks."""
    forbidden = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today", "time.localtime"}
    found = []
    for path in Path(swamla_titan.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if ".".join(name.split(".")[-2:]) in forbidden or node.attr in {"st_mtime", "st_ctime", "getmtime"}:
                    found.append(f"{path.name}:{node.lineno}: {name}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                found += [f"{path.name}:{node.lineno}: {each.name}" for each in node.names if each.name == "time"]
    line = next(n for n, text in enumerate(inspect.getsource(events).splitlines(), 1) if "time.time()" in text)
    assert found == [f"events.py:{line}: time.time"]


def test_the_log_of_a_run_is_written_by_one_handler_of_its_own(tiny, tmp_path):
    """A log line whose arguments do not fit its text is logging's to tell, and ends nothing."""
    assert train(tiny, *FAST, "--training.steps", "1") == 0
    handlers = logging.getLogger("swamla_titan").handlers
    assert [type(handler).__name__ for handler in handlers] == ["_Console", "LineFileHandler"]
