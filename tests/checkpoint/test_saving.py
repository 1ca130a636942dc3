"""Checkpoints in the background: what they hold, how many at a time, and what follows when one cannot be written."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swamla_titan.checkpoint import store as checkpoint_module
from swamla_titan.checkpoint.async_save import Saver, Staging
from swamla_titan.checkpoint.reader import load_tensors
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config.sections import Checkpoint
from swamla_titan.errors import RunFailed
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train
from tests.waiting import HANG


def state(step: int) -> TrainState:
    return TrainState(step, tokens=0, sequences=0, cursors={}, fingerprint={})


def saver_of(folder: Path, **keys) -> Saver:
    return Saver(Checkpoint(**keys), Checkpoints(folder, 0), torch.device("cpu"), 0)


def saved(path: Path) -> Tensor:
    found = torch.zeros(4)
    load_tensors(path, {"model": {"weight": found}})
    return found


def test_copies_are_of_the_moment_and_their_memory_is_kept():
    staging = Staging(torch.device("cpu"))
    weight, count = torch.arange(4.0), torch.tensor(3)
    copies = staging.copy({"model": {"weight": weight}, "optimizer": {"step": count, "moment": weight}})
    weight += 1
    count += 1
    assert copies["model"]["weight"].tolist() == copies["optimizer"]["moment"].tolist() == [0, 1, 2, 3]
    assert copies["optimizer"]["step"].item() == 3
    memory = copies["model"]["weight"].data_ptr()
    again = staging.copy({"model": {"weight": weight}})
    assert again["model"]["weight"].data_ptr() == memory
    assert again["model"]["weight"].tolist() == [1, 2, 3, 4]
    larger = staging.copy({"model": {"weight": torch.ones(5)}})
    assert larger["model"]["weight"].tolist() == [1] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("expected", [0, 1 << 27, 1 << 29])
def test_on_a_gpu_the_copy_is_of_the_moment_and_the_next_update_waits_for_it(expected):
    device = torch.device("cuda")
    weight = torch.zeros(1 << 26, device=device)  # 256 MB: the copy takes milliseconds
    staging = Staging(device, expected)
    staging.copy({"model": {"weight": weight}})  # the memory is pinned by now
    assert len(staging._memory) == max(expected, 1 << 28)
    for i in range(1, 6):
        weight.fill_(i)
        copy = staging.copy({"model": {"weight": weight}})["model"]["weight"]
        staging.before_update()
        weight.fill_(-1)
        staging.wait()
        assert copy.is_pinned()
        assert copy.eq(i).all()
    staging.close()
    assert not copy.is_pinned()  # else the next memory at this address could not be


@pytest.mark.parametrize("alone", [False, True])
def test_a_rank_that_ends_alone_does_not_wait_for_its_device(tmp_path, monkeypatch, alone):
    saver, waits = saver_of(tmp_path), []
    monkeypatch.setattr(saver._staging, "wait", lambda: waits.append("for copies"))
    saver.close(alone)
    assert waits == ([] if alone else ["for copies"])


def test_what_a_run_saves_was_expected_and_not_much_more(tiny, tmp_path, monkeypatch):
    expected = []
    save = Saver.save

    def listen(self, tensors, *arguments, **options):
        staging = Staging(torch.device("cpu"))
        staging.copy(tensors)
        expected.append((sizes[0], len(staging._memory)))
        save(self, tensors, *arguments, **options)

    sizes = []
    init = Saver.__init__
    monkeypatch.setattr(
        Saver, "__init__", lambda self, *arguments: (sizes.append(arguments[-1]), init(self, *arguments))[1]
    )
    monkeypatch.setattr(Saver, "save", listen)
    assert train(tiny, "--training.steps", "3", "--checkpoint.interval", "2", "--data.num_workers", "0") == 0
    assert len(expected) == 2
    for guess, size in expected:
        assert size <= guess <= 1.1 * size + (1 << 20)


class Gate:
    """Holds up every commit, until `open`; remembers how many wait at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.now = self.most = 0
        commit = checkpoint_module.commit

        def held(*arguments):
            self.now += 1
            self.most = max(self.most, self.now)
            self.waiting.set()
            assert self.open.wait(HANG)
            commit(*arguments)
            self.now -= 1

        patch.setattr(checkpoint_module, "commit", held)


def test_training_goes_on_while_a_checkpoint_is_written_and_what_it_changes_is_not_in_it(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver, weight = saver_of(tmp_path), torch.zeros(4)
    saver.save({"model": {"weight": weight}}, state(1), {})
    assert gate.waiting.wait(HANG)
    saver.before_update()
    weight += 1
    assert not (tmp_path / "step-00000001").exists()
    gate.open.set()
    assert saver.saved_step == 1
    assert saved(tmp_path / "step-00000001").tolist() == [0] * 4


def test_one_checkpoint_at_a_time_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = saver_of(tmp_path)
    saver.save({"model": {"weight": torch.full((4,), 1.0)}}, state(1), {})
    assert gate.waiting.wait(HANG)
    threading.Timer(0.2, gate.open.set).start()
    for step in (2, 3):
        saver.save({"model": {"weight": torch.full((4,), float(step))}}, state(step), {}, last=step == 3)
    assert gate.most == 1
    for step in (1, 2, 3):
        assert saved(tmp_path / f"step-0000000{step}").tolist() == [step] * 4


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full when the checkpoints of these steps are committed."""
    commit = checkpoint_module.commit

    def full(temporary: Path, final: Path, known):
        if int(final.name.removeprefix("step-")) in steps:
            raise OSError(28, "No space left on device")
        commit(temporary, final, known)

    monkeypatch.setattr(checkpoint_module, "commit", full)


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_failure_is_said_counted_and_forgotten_when_one_succeeds(tmp_path, monkeypatch, caplog, mode):
    failing(monkeypatch, 2, 3, 5, 6)
    saver = saver_of(tmp_path, async_mode=mode, max_failures=3)
    kept = []
    for step in range(1, 7):
        saver.save({"model": {"weight": torch.zeros(4)}}, state(step), {})
        kept.append(saver.saved_step)
    assert kept == [1, 1, 1, 4, 4, 4]
    said = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert len(said) == 4
    assert "step-00000002 could not be written ([Errno 28] No space left on device)" in said[0]
    assert [message.partition("this is consecutive failure ")[2][0] for message in said] == ["1", "2", "1", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_too_many_failures_in_a_row_end_the_run(tmp_path, monkeypatch, mode):
    failing(monkeypatch, *range(1, 9))
    saver = saver_of(tmp_path, async_mode=mode, max_failures=2)

    def save_all() -> None:
        for step in range(1, 9):
            saver.save({"model": {"weight": torch.zeros(4)}}, state(step), {})

    with pytest.raises(RunFailed, match=r"step-00000002 could not .* consecutive failure 2.*Make room") as error:
        save_all()
    assert "GiB are free there" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_last_one_is_tried_whatever_failed_before_and_must_not_fail(tmp_path, monkeypatch):
    failing(monkeypatch, 1, 3)
    saver = saver_of(tmp_path, max_failures=1)
    weight = {"model": {"weight": torch.zeros(4)}}
    saver.save(weight, state(1), {})
    saver.save(weight, state(2), {}, last=True)
    assert saver.saved_step == 2
    with pytest.raises(RunFailed, match=r"step-00000003 could not be written .*Make room"):
        saver.save(weight, state(3), {}, last=True)


def test_what_is_no_fault_of_the_disk_ends_the_run_as_it_is(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_module, "commit", broken)
    saver = saver_of(tmp_path)
    saver.save({"model": {"weight": torch.zeros(4)}}, state(1), {})
    with pytest.raises(ZeroDivisionError):
        saver.save({"model": {"weight": torch.zeros(4)}}, state(2), {})


def test_a_run_whose_disk_is_full_for_a_while_is_the_same_run(tiny, tmp_path, monkeypatch):
    settings = ("--training.steps", "12", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "0")
    assert train(tiny, *settings, "--job.dump_folder", str(tmp_path / "whole")) == 0
    failing(monkeypatch, 4, 6)
    assert train(tiny, *settings) == 0
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [f"step-{step:08d}" for step in (2, 8, 10, 12)]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for step in (2, 8, 12):
        assert_same_checkpoint(checkpoint(tmp_path / "run", step), checkpoint(tmp_path / "whole", step))


def test_background_or_not_the_checkpoints_are_the_same(tiny, tmp_path):
    settings = ("--training.steps", "6", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "0")
    for mode in ("async", "disabled"):
        folder = ("--job.dump_folder", str(tmp_path / mode))
        assert train(tiny, *settings, *folder, "--checkpoint.async_mode", mode) == 0
    for step in (2, 4, 6):
        assert_same_checkpoint(checkpoint(tmp_path / "async", step), checkpoint(tmp_path / "disabled", step))
