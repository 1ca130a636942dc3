"""Who may write to a dump folder: one run, and of one run one start at a time."""

import errno
import fcntl
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from swamla_titan.checkpoint import dump_folder
from swamla_titan.checkpoint.dump_folder import exclusive, prepare_folder, validate_folder
from swamla_titan.errors import UserError
from tests.waiting import HANG

RUN = "TORCHELASTIC_RUN_ID"


def _hold(folder: Path, run: str, held: Event, let_go: Event) -> None:
    os.environ[RUN] = run
    with exclusive(folder):
        held.set()
        let_go.wait(HANG)


@pytest.fixture
def holder(tmp_path: Path):
    """Starts a process of a run that holds tmp_path until told to let go, or until it is killed."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(run: str):
        held, let_go = context.Event(), context.Event()
        process = context.Process(target=_hold, args=(tmp_path, run, held, let_go))
        process.start()
        started.append(process)
        assert held.wait(HANG)
        return process, let_go

    yield start
    for process in started:
        process.kill()
        process.join()


def test_an_earlier_start_of_the_same_run_is_waited_for(tmp_path, holder, monkeypatch, caplog):
    """As when a machine was cut off: its process still holds the folder while the others have started again."""
    process, let_go = holder("mine")
    monkeypatch.setenv(RUN, "mine")

    def sleep(seconds: float) -> None:
        let_go.set()
        process.join(HANG)

    monkeypatch.setattr(dump_folder.time, "sleep", sleep)
    with exclusive(tmp_path):
        assert let_go.is_set()
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert (
        len([record for record in caplog.records if "an earlier start of this run still holds" in record.message]) == 1
    )
    assert f"process {process.pid} on " in caplog.text


def test_it_is_not_waited_for_without_end(tmp_path, holder, monkeypatch):
    process, _ = holder("mine")
    monkeypatch.setenv(RUN, "mine")
    monkeypatch.setattr(dump_folder, "LEAVING", 0.3)
    with (
        pytest.raises(UserError, match=rf"another run writes there \(process {process.pid} on [^)\n]*\);"),
        exclusive(tmp_path),
    ):
        pass


@pytest.mark.parametrize("own", ["", "other"])
@pytest.mark.parametrize("theirs", ["", "mine"])
def test_another_run_is_refused_at_once(tmp_path, holder, monkeypatch, own, theirs):
    holder(theirs)
    monkeypatch.setenv(RUN, own)
    monkeypatch.setattr(dump_folder.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(UserError, match="another run writes there"), exclusive(tmp_path):
        pass


def test_a_folder_of_a_killed_process_is_free(tmp_path, holder, monkeypatch):
    process, _ = holder("mine")
    process.kill()
    process.join()
    monkeypatch.setenv(RUN, "other")
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path / "run") as hold:
        assert not hold.is_lost
        validate_folder(tmp_path / "run")
    assert f"has no locks ({os.strerror(number)}): nothing keeps another run from writing there" in caplog.text


def test_another_fault_of_the_lock_is_refused_with_its_reason(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"), exclusive(tmp_path):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-0.log", "logs/rank-7.log"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / name)
    for refused in (lambda: validate_folder(tmp_path), lambda: prepare_folder(tmp_path, "x = 1")):
        with pytest.raises(UserError, match=f"{name} is no regular file"):
            refused()
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent / "elsewhere")])
def test_the_configuration_is_written_into_a_file_of_its_own(tmp_path, make):
    (tmp_path / "elsewhere").write_text("mine")
    make(tmp_path / ".config.toml.new")
    prepare_folder(tmp_path, "x = 1")
    assert (tmp_path / "config.toml").read_text() == "x = 1"
    assert not (tmp_path / "config.toml").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "mine"
