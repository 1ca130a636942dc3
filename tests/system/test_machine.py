"""What this machine lacks: told in one message, and whether it is worth another start."""

import errno
import multiprocessing.context
import os
import resource
import subprocess
import sys

import pytest

from swamla_titan import cli
from swamla_titan.cli import main
from swamla_titan.data import worker
from swamla_titan.errors import UserError
from swamla_titan.launch import worker as launcher
from swamla_titan.system.machine import REMEDIES, allow_open_files, explain, lack, needed
from swamla_titan.train.trainer import Trainer
from tests.train.runs import train

FAST = ("--training.steps", "1", "--validation.interval", "0", "--data.num_workers", "0")


def system_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, number",
    [
        *((system_error(number), number) for number in REMEDIES),
        (BlockingIOError(errno.EAGAIN, "fork"), errno.EAGAIN),
        (MemoryError(), errno.ENOMEM),
        (RuntimeError("can't start new thread"), errno.EAGAIN),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), errno.ENOMEM),
        (ImportError("libtorch.so: failed to map segment from shared object"), errno.ENOMEM),
        (RuntimeError("NCCL: failed to extend /dev/shm/nccl-a: No space left on device (28)"), errno.ENOSPC),
        (caused(ValueError("no parquet"), system_error(errno.EMFILE)), errno.EMFILE),
        (system_error(errno.ENOENT), None),
        (system_error(errno.EIO), None),
        (OSError("Corrupt snappy compressed data"), None),
        (RuntimeError("shapes do not match"), None),
        (ValueError("No space left on device"), None),
    ],
)
def test_what_was_lacking(error, number):
    assert lack(error) == number
    assert (explain(error) is None) == (number is None)


def test_the_explanation_names_file_place_and_way_out():
    text = explain(system_error(errno.EMFILE, "/data/a"))
    assert text is not None
    assert text.startswith("Too many open files: /data/a (")
    assert "ulimit -n" in text
    for error in (system_error(errno.ENOSPC, "/dev/shm/sem.x"), RuntimeError("/dev/shm/y: No space left on device")):
        assert "docker run --shm-size=1g" in str(explain(error))
    assert "Set TMPDIR" in str(explain(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['a']")))


def test_needed_passes_on_what_is_about_else():
    with pytest.raises(UserError, match=r"workers: Too many open files"), needed("workers"):
        raise system_error(errno.EMFILE)
    for error in (ValueError("else"), UserError("mine"), system_error(errno.ENOENT)):
        with pytest.raises(type(error)) as passed, needed("workers"):
            raise error
        assert passed.value is error


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("error", [system_error(errno.EMFILE), MemoryError(), RuntimeError("can't start new thread")])
def test_a_command_that_meets_it_anywhere_ended_for_bad_input(monkeypatch, capsys, error):
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["config", "ls"]) == 2
    assert one_message(capsys).startswith("error: ")


def test_what_is_a_fault_of_the_program_is_not_explained_away(monkeypatch):
    def fail(*_: object) -> int:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["config", "ls"])


def test_no_worker_is_left_where_a_later_one_cannot_be_started(tiny, monkeypatch, capsys):
    """The interpreter's end would wait for ever: workers ignore its SIGTERM."""
    started: list[object] = []
    start = multiprocessing.context.ForkServerProcess.start

    def start_one(self: multiprocessing.context.ForkServerProcess) -> None:
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(self)
        start(self)

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start_one)
    assert train(tiny, *FAST[:4], "--data.num_workers", "2") == 2
    assert "No more processes or threads may be started" in one_message(capsys)
    assert started
    assert not multiprocessing.active_children()


def test_no_temporary_folder(tiny, monkeypatch, capsys):
    def fail() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(worker.tempfile, "gettempdir", fail)
    assert train(tiny, *FAST[:4], "--data.num_workers", "1") == 2
    assert "Set TMPDIR to one that can" in one_message(capsys)


def test_while_it_trains_it_is_a_failure_that_another_start_may_mend(tiny, monkeypatch, capsys):
    def fail(self: Trainer) -> int:
        raise system_error(errno.ENOMEM)

    monkeypatch.setattr(Trainer, "run", fail)
    assert train(tiny, *FAST) == 1
    assert one_message(capsys).startswith("failed: Cannot allocate memory (noticed at ")


def test_a_worker_that_alone_ended_for_bad_input_ends_as_after_a_crash_and_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv(launcher.FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launcher, "_ended_for_bad_input", False)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    assert not launcher.any_bad_input()

    def refused() -> int:
        launcher.report_bad_input()
        return 2

    assert launcher.exit_through_launcher(refused) == 1
    assert (tmp_path / "1.code").read_text() == "2"
    assert launcher.any_bad_input()


@pytest.mark.parametrize("code, restarts", [("2", 0), ("1", 3)])
def test_torchrun_has_no_restarts_left_then(tmp_path, monkeypatch, code, restarts):
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    from swamla_titan.launch.agent import Agent

    monkeypatch.setenv(launcher.FOLDER, str(tmp_path))
    (tmp_path / "0.code").write_text(code)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: RunResult(state=WorkerState.FAILED))
    agent = object.__new__(Agent)
    agent._remaining_restarts = 3
    assert agent._monitor_workers(None).state == WorkerState.FAILED  # type: ignore[arg-type]
    assert agent._remaining_restarts == restarts


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=64k,nr_inodes=2", "ro"])
def test_shared_memory_of_a_container(tiny, options):
    mount = f"mount -t tmpfs -o {options} none /dev/shm || exit 99"
    script = f'{mount}; exec "$0" -m swamla_titan train "$1" {" ".join(FAST[:4])}'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, sys.executable, str(tiny)], capture_output=True, text=True
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.returncode == 0, done.stderr  # its loader processes do without


@pytest.mark.parametrize("soft, hard, allowed", [(32, 40, False), (32, 4096, True), (2048, 4096, True)])
def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch, soft, hard, allowed):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    if allowed:
        allow_open_files(num_workers=117)
    else:
        with pytest.raises(OSError, match="ulimit -n is 40, and a run needs 1000"):
            allow_open_files(num_workers=117)
    assert limits[-1] == (hard, hard)


@pytest.mark.parametrize("before", [("swamla_titan", "train"), ("swamla_titan.launch.preflight", "2", "0")])
def test_few_open_files(tiny, before):
    """Several processes are refused before any of them is connected to the others."""
    command = [sys.executable, "-m", *before, str(tiny), *FAST[:4]]
    done = subprocess.run(["bash", "-c", 'ulimit -n 40; exec "$@"', "bash", *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("ulimit -n is 40, and a run needs") == 1
    assert "Traceback" not in done.stderr
