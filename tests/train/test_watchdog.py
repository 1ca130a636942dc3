"""A process that stands still writes where it stands and ends, and one that is only busy does not."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swamla_titan.config.sections import FaultTolerance
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.ranks import FOLDER
from swamla_titan.system.process import STACKS, RunningTime, stopped
from swamla_titan.train.policies import watchdog as module
from swamla_titan.train.policies.watchdog import (
    Watchdog,
    place_of_main_thread,
    where_all_are,
    write_nccl_trace,
    write_stacks,
)
from swamla_titan.train.trainer import Trainer
from tests.distributed.job import OUTCOME, before_step, limit_of_a_second
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train
from tests.waiting import HANG, wait_until

SHORT = ("--training.steps", "6", "--data.num_workers", "0", "--validation.interval", "0", "--checkpoint.interval", "2")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the watchdog would have ended this process for, in place of ending it."""
    found: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, now, headline: found.append(headline))
    monkeypatch.setattr(
        "swamla_titan.train.policies.watchdog.BACKSTOP", 1000.0
    )  # nor is the backstop to end this process
    return found


def watch(traces: Path, step_timeout: float = 0.4, first_step_timeout: float = 60.0) -> Watchdog:
    config = FaultTolerance(step_timeout=step_timeout, first_step_timeout=first_step_timeout)
    return Watchdog(config, traces, World.alone())


# which limit applies


def test_the_start_the_first_step_and_pauses_have_the_long_limit_and_steps_the_short_one(tmp_path, ends):
    watchdog = watch(tmp_path, first_step_timeout=2 * HANG)
    time.sleep(0.8)
    watchdog.begin(7)
    time.sleep(0.8)
    watchdog.after_step(8, OUTCOME)
    slowest = 0.0  # on a busy machine a step may take too long indeed
    for step in range(9, 12):
        begin = time.monotonic()
        time.sleep(0.2)
        watchdog.after_step(step, OUTCOME)
        slowest = max(slowest, time.monotonic() - begin)
    with watchdog.pause("validation"):
        time.sleep(0.8)
        said_so_far = list(ends)
    wait_until(lambda: "no progress for 0.4 s (step) after step 11" in ends)
    watchdog.stop()
    assert slowest > 0.3 or said_so_far == []
    assert all("(step)" in headline for headline in ends)


@pytest.mark.parametrize(
    "enter, doing, step",
    [
        (lambda watchdog, stack: None, "starting", 0),
        (lambda watchdog, stack: watchdog.begin(3), "first step", 3),
        (lambda watchdog, stack: stack.enter_context(watchdog.pause("checkpoint")), "checkpoint", 0),
    ],
    ids=["start", "first step", "pause"],
)
def test_the_long_limit_is_a_limit_too(tmp_path, ends, enter, doing, step):
    watchdog = watch(tmp_path, step_timeout=2 * HANG, first_step_timeout=0.3)
    with ExitStack() as stack:
        enter(watchdog, stack)
        wait_until(lambda: f"no progress for 0.3 s ({doing}) after step {step}" in ends)
        watchdog.stop()


def test_with_0_nothing_is_watched_and_nothing_written(tmp_path, ends):
    watchdog = watch(tmp_path / "traces", step_timeout=0, first_step_timeout=0.1)
    watchdog.begin(0)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    time.sleep(0.3)
    watchdog.stop()
    assert ends == []
    assert not (tmp_path / "traces").exists()


def test_closed_it_leaves_neither_thread_nor_process_nor_handler_nor_file(tmp_path, ends):
    handler = signal.getsignal(STACKS)
    threads = threading.active_count()
    watchdog = watch(tmp_path / "traces")
    watchdog.begin(0)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["hang-rank-0.txt"]
    backstop = watchdog._backstop._process
    assert backstop.poll() is None
    watchdog.stop()
    assert backstop.returncode == 0
    assert threading.active_count() == threads
    assert signal.getsignal(STACKS) == handler
    assert not (tmp_path / "traces").exists()


def test_stacks_of_an_earlier_start_are_kept(tmp_path, ends):
    (tmp_path / "hang-rank-0.txt").write_text("stacks\n")
    watchdog = watch(tmp_path)
    watchdog.begin(0)
    watchdog.stop()
    assert (tmp_path / "hang-rank-0.txt").read_text() == "stacks\n"


# pauses


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock runs ahead of itself, as after a pause of the whole process: its threads see it all at once."""
    ahead = [0.0]
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    return ahead


@pytest.mark.parametrize("progress", ["before", "after"])
def test_a_pause_is_no_hang_in_the_moment_it_ends_and_a_hang_after_it_is_one(tmp_path, ends, clock, progress):
    watchdog = watch(tmp_path, step_timeout=2)
    watchdog.begin(0)
    watchdog.after_step(1, OUTCOME)
    for pause in (1000, 5):
        time.sleep(0.7)
        clock[0] += pause
        if progress == "after":
            watchdog.after_step(2, OUTCOME)
        time.sleep(0.7)
        watchdog.after_step(3, OUTCOME)
    assert ends == []
    clock[0] += 1000
    before = time.monotonic()
    wait_until(lambda: ends)
    watchdog.stop()
    assert ends[0] == "no progress for 2 s (step) after step 3"
    assert time.monotonic() - before < 20  # and not as much later as the pause was long


def test_a_pause_just_after_a_step_is_none_either(tmp_path, ends, clock):
    """The watchdog has not looked since: it sees one stretch of time, in which there was progress."""
    watchdog = watch(tmp_path, step_timeout=4)  # it looks every second
    watchdog.begin(0)
    for step in range(1, 5):
        watchdog.after_step(step, OUTCOME)
        clock[0] += 100
        time.sleep(1.2)
    assert ends == []
    watchdog.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_of_the_run_that_is_stopped_is_waited_for_and_named_once(tmp_path, ends, monkeypatch, caplog):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with subprocess.Popen(["sleep", "100"]) as other:
        try:
            (tmp_path / "1.pid").write_text(str(other.pid))
            (tmp_path / "0.pid").write_text(str(os.getpid()))
            other.send_signal(signal.SIGSTOP)
            wait_until(lambda: stopped(other.pid))
            watchdog = watch(tmp_path / "traces", step_timeout=1)
            watchdog.begin(0)
            watchdog.after_step(1, OUTCOME)
            time.sleep(2.5)
            assert ends == []
            other.send_signal(signal.SIGCONT)
            wait_until(lambda: ends)
            watchdog.stop()
        finally:
            other.kill()
    assert caplog.text.count(f"process {other.pid} of this run is stopped, and waited for") == 1
    assert not stopped(other.pid)  # gone


# What has Python's lock for 3 s at a time, and then is stopped from without for longer than its limit.
HOLDER = """
import ctypes, sys, time
from swamla_titan.system.process import Backstop
backstop = Backstop()
backstop.write_to(sys.stderr)
backstop.arm(float(sys.argv[1]))
print("armed", flush=True)
ctypes.PyDLL(None).sleep(int(sys.argv[2]))
backstop.close()
print("ended", flush=True)
"""


def hold(limit: str, seconds: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, limit, seconds]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    assert process.stdout.readline() == "armed\n"
    return process


def test_the_backstop_ends_a_process_that_keeps_pythons_lock_and_not_one_that_was_stopped():
    held = hold("1", "100")
    stopped_alone, stopped_with_it = hold("8", "1"), hold("8", "1")
    os.kill(stopped_alone.pid, signal.SIGSTOP)
    os.killpg(stopped_with_it.pid, signal.SIGSTOP)
    out, err = held.communicate(timeout=HANG)
    assert (held.returncode, out) == (1, "")
    assert 'File "<string>", line 8 in <module>' in err
    time.sleep(10)
    for process in (stopped_alone, stopped_with_it):
        os.killpg(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=HANG)
        assert (process.returncode, out, err) == (0, "ended\n", "")


def test_the_backstop_ends_with_its_process():
    process = hold("100", "100")
    (backstop,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(backstop, number)
    time.sleep(0.3)
    assert Path(f"/proc/{backstop}").exists()
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{backstop}").exists() or "Z" in Path(f"/proc/{backstop}/stat").read_text())


def test_running_time_leaves_pauses_out(clock):
    running = RunningTime(2.0)
    for ahead in (1, 2, 1000, 0.5):
        clock[0] += ahead
        running.update()
    assert running.seconds == pytest.approx(5.5, abs=0.4)


# real processes


def _stand_still(kind: str, config: str, *overrides: str) -> int:
    """Train, and stand still in step 4, which alone has a limit of a second: others take what the machine needs."""
    module.BACKSTOP = 1.0
    wait = {
        "asleep": lambda: time.sleep(2 * HANG),
        "with Python's lock": lambda: ctypes.PyDLL(None).sleep(int(2 * HANG)),  # unlike CDLL, it does not let go of it
    }[kind]

    def stand_still(trainer: Trainer) -> None:
        limit_of_a_second(trainer)
        wait()

    before_step(4, stand_still)
    return train(Path(config), *overrides)


def stand_still(kind: str, config: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    code = f"import sys, {__name__} as tests; sys.exit(tests._stand_still(*{(kind, str(config), *overrides)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)


def test_a_process_asleep_ends_with_1_its_stacks_in_traces_and_the_run_goes_on_as_if_nothing_had_been(tiny, tmp_path):
    traces = tmp_path / "run" / "traces"
    ended = stand_still("asleep", tiny, *SHORT)
    assert ended.returncode == 1, ended.stderr
    assert [path.name for path in traces.iterdir()] == ["hang-step-3-rank-0.txt"]
    stacks = (traces / "hang-step-3-rank-0.txt").read_text()
    assert stacks.startswith("rank 0: no progress for 1 s (step) after step 3\n")
    assert " in _stand_still" not in stacks.split("Thread")[0]
    assert "in stand_still" in stacks
    assert "in train_step" in stacks
    assert "raise fault_tolerance.step_timeout" in ended.stdout
    assert "rank 0 after step 3: <lambda> (test_watchdog.py:" in ended.stdout
    assert "called by run (trainer.py:" in ended.stdout
    assert ended.stdout.split("Where the ranks are")[1] in (tmp_path / "run/logs/rank-0.log").read_text()

    assert train(tiny, *SHORT) == 0
    assert train(tiny, *SHORT, "--job.dump_folder", str(tmp_path / "whole")) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_same_checkpoint(checkpoint(tmp_path / "run", 6), checkpoint(tmp_path / "whole", 6))


def test_a_process_that_keeps_pythons_lock_ends_with_1_and_its_stacks_in_traces(tiny, tmp_path):
    ended = stand_still("with Python's lock", tiny, *SHORT)
    assert ended.returncode == 1, ended.stderr
    stacks = (tmp_path / "run/traces/hang-rank-0.txt").read_text()
    assert stacks.startswith("Timeout (")
    assert "in train_step" in stacks
    assert max(metrics(tmp_path / "run")) == 3
    assert train(tiny, *SHORT) == 0
    assert (tmp_path / "run/traces/hang-rank-0.txt").read_text() == stacks


# what is written


def test_stacks_go_to_standard_error_where_no_file_can_be_written(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert not write_stacks(tmp_path / "file" / "stacks.txt", "stands still")
    err = capfd.readouterr().err
    assert "stands still" in err
    assert "in test_stacks_go_to_standard_error" in err


def test_the_place_of_the_main_thread_names_the_function_and_ours_that_called_it(tmp_path):
    places: list[str] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: places.append(place_of_main_thread()))
        thread.start()
        thread.join()

    look()
    assert "(threading.py:" in places[0]
    assert "called by" not in places[0]
    from swamla_titan.distributed.mesh import broadcast_from_rank_0

    broadcast_from_rank_0(World.alone(), look)
    assert ", called by broadcast_from_rank_0 (mesh.py:" in places[1]


def test_the_ranks_are_listed_by_place_those_behind_first_and_the_silent_named():
    text = where_all_are({0: (4, "a"), 1: (4, "a"), 2: (3, "b"), 4: (4, "a"), 6: (4, "c")}, 8)
    assert text.splitlines() == [
        "  rank 2 after step 3 (behind): b",
        "  rank 6 after step 4: c",
        "  ranks 0-1, 4 after step 4: a",
        "  ranks 3, 5, 7: no answer; stopped, cut off, or in code that does not let Python run",
    ]


def test_nccls_flight_recorder_is_written_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda **_: b"trace", raising=False)
    assert write_nccl_trace(tmp_path / "traces/hang-step-3-nccl-rank-1")
    assert (tmp_path / "traces/hang-step-3-nccl-rank-1").read_bytes() == b"trace"
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_nccl_trace")
    assert not write_nccl_trace(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_files_of_one_hang_bear_the_step_of_the_rank_that_noticed_first(tmp_path):
    watchdogs, store = [watch(tmp_path, step_timeout=0) for _ in range(3)], dist.HashStore()
    for watchdog in watchdogs:
        watchdog._store = store
    assert not watchdogs[1]._another_stopped()
    assert [watchdog._agree_on_step(step) for watchdog, step in zip(watchdogs, (4, 3, 5))] == [4, 4, 4]
    assert watchdogs[1]._another_stopped()
    alone = watch(tmp_path, step_timeout=0)
    alone._store = None
    assert alone._agree_on_step(7) == 7
