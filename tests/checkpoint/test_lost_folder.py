"""A dump folder that is removed, moved or taken under a running job: the job ends with 1, and writes nothing there."""

import errno
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from swamla_titan.checkpoint import dump_folder
from swamla_titan.checkpoint.dump_folder import FolderLost, exclusive
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.train.step import GROUPS
from tests.train.runs import checkpoint, metrics, snapshot, train
from tests.train.test_disk_and_clock import at_steps
from tests.waiting import HANG

FAST = ("--data.num_workers", "0", "--training.steps", "6", "--validation.interval", "0", "--checkpoint.interval", "2")
WAITED_FOR = ("--checkpoint.async_mode", "disabled")  # or the one of step 2 is still being written
NEVER_LOGGED = ("--metrics.log_interval", "1000")


def _remove(run: Path) -> None:
    shutil.rmtree(run)


def _rename(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def _remove_lock(run: Path) -> None:
    (run / ".lock").unlink()


def _replace_lock(run: Path) -> None:
    (run / ".lock").rename(run / "old")
    (run / ".lock").write_text("process 1 on elsewhere\n")


def _link_the_lock(run: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lock").symlink_to("nothing")


def _take(run: Path) -> None:
    """As another run would: the same names, by another process."""
    shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True)
    (run / "traces").mkdir()
    (run / "traces" / "hang-rank-0.txt").touch()
    for name in (".lock", "metrics.jsonl", "skipped_files.json"):
        (run / name).write_text(f"another's {name}\n")


def _replace_by_a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("mine")


def _link_elsewhere(run: Path) -> None:
    """To a copy of it, as on a larger disk."""
    shutil.copytree(run, run.with_name("copy"))
    shutil.rmtree(run)
    run.symlink_to(run.with_name("copy"))


LOSSES = (_remove, _rename, _remove_lock, _replace_lock, _link_the_lock, _take, _replace_by_a_file, _link_elsewhere)


def _after(run: Path) -> dict[str, bytes] | str | None:
    if run.is_dir():
        # It ends its own log, and takes its own empty file of the watchdog away.
        return {name: content for name, content in snapshot(run).items() if not name.startswith(("logs/", "traces/"))}
    return run.read_text() if run.exists() else None


@pytest.mark.parametrize("lose", LOSSES)
def test_a_run_whose_folder_is_lost_ends_with_1_and_one_message_and_leaves_what_is_there(
    tiny, tmp_path, capsys, monkeypatch, lose
):
    run, left = tmp_path / "run", []

    def at_step_4() -> None:
        lose(run)
        left.append(_after(run))

    with at_steps(monkeypatch, {4: at_step_4}):
        assert train(tiny, *FAST, *WAITED_FOR) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"failed: job.dump_folder = {run} was removed, moved or taken by another run")
    assert error.count("failed:") == 1
    assert "start the same command again" in error
    assert "Traceback" not in error
    assert _after(run) == left[0]


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_where_no_step_is_logged_it_is_noticed_at_the_next_save(tiny, tmp_path, capsys, monkeypatch, mode):
    run = tmp_path / "run"
    with at_steps(monkeypatch, {3: lambda: _take(run), 5: lambda: pytest.fail("trained on")}):
        assert train(tiny, *FAST, *NEVER_LOGGED, "--checkpoint.async_mode", mode) == 1
    assert "its .lock is another one (another's .lock)" in capsys.readouterr().err
    # Of one that was being written in that moment the rest may lie there; the other run clears it away.
    assert [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".tmp-")] == []
    assert (run / "traces" / "hang-rank-0.txt").exists()


def test_it_is_noticed_before_a_checkpoint_that_is_being_written_is_committed(tiny, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    write = Checkpoints._or_failed
    done = []

    def take_in_between(self, work: Callable[[], object], final: Path):
        if work.__name__ == "digest_own" and not done:
            done.append(True)
            _take(run)
        return write(self, work, final)

    monkeypatch.setattr(Checkpoints, "_or_failed", take_in_between)
    assert train(tiny, *FAST, *NEVER_LOGGED) == 1
    assert "was removed, moved or taken by another run" in capsys.readouterr().err
    assert not checkpoint(run, 2).exists()


def test_a_folder_that_was_moved_to_another_place_with_a_link_to_it_is_the_same_one(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def move() -> None:
        run.rename(tmp_path / "moved")
        run.symlink_to(tmp_path / "moved")

    with at_steps(monkeypatch, {3: move}):
        assert train(tiny, *FAST) == 0
    assert checkpoint(tmp_path / "moved", 6).exists()


@pytest.mark.parametrize("number, lost", [(errno.ESTALE, True), (errno.ENOENT, True), (errno.EIO, False)])
def test_a_file_server_that_does_not_answer_is_no_loss_and_one_that_forgot_the_folder_is(
    tmp_path, monkeypatch, number, lost
):
    with exclusive(tmp_path) as hold:
        assert not hold.is_lost
        hold.require()

        def fail(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(dump_folder.os, "lstat", fail)
            assert hold.is_lost is lost
            if lost:
                with pytest.raises(FolderLost):
                    hold.require()


def test_a_run_refused_in_a_folder_that_another_one_took_meanwhile_leaves_it_its_lock(tmp_path):
    folder = tmp_path / "run"
    with exclusive(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / ".lock").write_text("another's")
    assert (folder / ".lock").read_text() == "another's"


def _hold(folder: Path, held, let_go) -> None:
    with exclusive(folder):
        held.set()
        let_go.wait(HANG)


def test_a_lock_whose_file_was_removed_while_it_was_waited_for_holds_nothing(tmp_path, monkeypatch):
    """The first start is refused and removes what it made, after the second has opened it."""
    folder, acquire, first = tmp_path / "run", dump_folder._acquire, []

    def slow(lock, where: Path) -> None:
        if not first:
            first.append(True)
            shutil.rmtree(folder)
        acquire(lock, where)

    monkeypatch.setattr(dump_folder, "_acquire", slow)
    with exclusive(folder) as hold:
        assert not hold.is_lost
        context = multiprocessing.get_context("fork")
        held, let_go = context.Event(), context.Event()
        other = context.Process(target=_hold, args=(folder, held, let_go))
        other.start()
        other.join(HANG)
        assert other.exitcode == 1  # refused
        assert not held.is_set()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("command", [(), ("--dry-run",)])
def test_a_lock_that_is_no_file_is_refused_and_what_a_link_leads_to_is_left_alone(
    tiny, tmp_path, capsys, kind, command
):
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    (tmp_path / "precious").write_text("mine")
    make = {
        "link": lambda: lock.symlink_to(tmp_path / "precious"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    make[kind]()
    assert train(tiny, *FAST, *command) == 2
    assert f"job.dump_folder = {tmp_path / 'run'}: cannot be written (" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"


# what of the folder is removed while the folder itself is still the run's


def test_metrics_that_were_removed_go_on_in_a_new_file(tiny, tmp_path, monkeypatch, caplog, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    with at_steps(monkeypatch, {3: path.unlink, 5: lambda: path.rename(path.with_name("rotated.jsonl"))}):
        assert train(tiny, *FAST) == 0
    assert sorted(metrics(tmp_path / "run")) == [5, 6]
    assert capsys.readouterr().out.count("metrics.jsonl was removed or replaced; its lines continue") == 2


def test_checkpoints_that_were_removed_are_told_of_and_the_next_one_is_written(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run" / "checkpoints"
    with at_steps(monkeypatch, {3: lambda: shutil.rmtree(folder)}):
        assert train(tiny, *FAST, *WAITED_FOR) == 0
    assert f"{folder} was removed, and the checkpoints with it" in capsys.readouterr().out
    assert Checkpoints(folder, 0, known=GROUPS).newest_intact() == checkpoint(tmp_path / "run", 6)


def test_a_folder_of_tensorboard_that_was_removed_is_told_of(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run" / "tensorboard"
    with at_steps(monkeypatch, {3: lambda: shutil.rmtree(folder)}):
        assert train(tiny, *FAST, "--metrics.tensorboard", "true") == 0
    assert "TensorBoard gets no more metrics until the next start" in capsys.readouterr().out
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
