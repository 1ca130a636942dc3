"""Data that cannot be read in the middle of a run of the real command."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.data import BatchLoader, retry
from swamla_titan.train import setup
from tests.data.faulty import Fails, flaky, four_files, truncate
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, snapshot, train
from tests.waiting import HANG


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as it was afterwards: a flaky source sets it for the process."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.02)


SKIP = ("--data.on_error", "skip_file")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return four_files(tmp_path / "corpus")


def settings(folder: Path, *more: str) -> tuple[str, ...]:
    """Two streams; 320 tokens a step, so that an epoch takes 15 steps."""
    return (
        *("--data.source", "local", "--data.path", str(folder), "--data.streams", "2", "--data.shuffle_documents", "5"),
        *("--validation.interval", "0", "--validation.fraction", "0", "--training.steps", "24"),
        *("--checkpoint.interval", "8", "--checkpoint.keep_latest", "0", "--data.retry_seconds", "0.5", *more),
    )


@contextlib.contextmanager
def opened_then(action) -> Iterator[None]:
    """What befalls the data just after the next start has opened and counted them: `action(corpus)` gives the corpus to
    read."""
    original = setup.open_corpus

    def open_corpus(*arguments):
        corpus = original(*arguments)
        return action(corpus.with_segments(corpus.segments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "open_corpus", open_corpus)
        yield


def cut(path: Path):
    def action(corpus):
        truncate(path)
        return corpus

    return action


@pytest.mark.parametrize("workers", ["0", "1", pytest.param("2", marks=pytest.mark.slow)])
def test_stop_saves_what_was_learnt_and_names_file_and_place(tiny, corpus, tmp_path, capsys, workers):
    with opened_then(cut(corpus / "2.parquet")):
        assert train(tiny, *settings(corpus, "--data.num_workers", workers)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {corpus}/2.parquet, row 0 of row group ")
    assert "not a whole parquet file" in error
    assert "given up after 2 more tries" in error
    assert 'data.on_error = "skip_file" skips the rest of the file' in error
    assert error.count("\n") == 1
    last = max(metrics(tmp_path / "run"))
    assert 1 <= last < 24
    assert checkpoint(tmp_path / "run", last).is_dir()
    assert metrics(tmp_path / "run", "skipped_files") == {}
    # the same command is refused at once now; skipping the file, it continues
    assert train(tiny, *settings(corpus)) == 2
    assert "2.parquet: not a whole parquet file" in capsys.readouterr().err
    assert train(tiny, *settings(corpus, *SKIP)) == 0
    assert metrics(tmp_path / "run", "skipped_files")[24] == 1


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_skip_file_is_reported_once_counted_and_on_record_and_a_resumed_run_skips_the_same(
    tiny, corpus, tmp_path, capsys, workers
):
    run, whole, path = tmp_path / "run", tmp_path / "whole", corpus / "2.parquet"
    intact = path.read_bytes()
    command = settings(corpus, *SKIP, "--data.num_workers", workers)
    with opened_then(cut(path)):
        assert train(tiny, *command, "--job.dump_folder", str(whole)) == 0
    output = capsys.readouterr().out
    assert output.count("the rest of the file is skipped in this run") == 1
    assert "2.parquet, row 0 of row group " in output
    counts = metrics(whole, "skipped_files")
    first = min(counts)
    assert 1 < first <= 16
    assert list(counts) == list(range(first, 25))  # absent before
    assert set(counts.values()) == {1}
    record = json.loads((whole / "skipped_files.json").read_text())
    assert {entry["file"] for entry in record} == {"2.parquet"}
    assert min(entry["step"] for entry in record) == first
    assert all("not a whole parquet file" in entry["reason"] for entry in record)
    state = json.loads((checkpoint(whole, 24) / "train.json").read_text())
    assert {entry["file"] for entry in state["excluded"]} == {"2.parquet"}

    # Stopped in the middle, then the file is whole again; and with other workers.
    path.write_bytes(intact)
    with opened_then(cut(path)):
        assert train(tiny, *command, "--training.steps", "16", "--lr_schedule.name", "linear") == 0
    path.write_bytes(intact)
    capsys.readouterr()
    assert train(tiny, *command, "--data.num_workers", "1", "--lr_schedule.name", "linear") == 0
    assert capsys.readouterr().out.count("the rest of the file is skipped in this run") == 1
    resumed = json.loads((checkpoint(run, 24) / "train.json").read_text())
    assert (resumed["cursors"], resumed["excluded"]) == (state["cursors"], state["excluded"])
    assert resumed["identity"] == state["identity"]
    in_force = len(state["excluded"])
    assert [entry["step"] for entry in json.loads((run / "skipped_files.json").read_text())] == [None] * in_force


def test_a_resumed_run_that_skips_is_bit_identical_to_one_that_was_not_stopped(tiny, corpus, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    # One stream: in its first epoch, of 15 steps, it comes upon all of the damage.
    command = settings(corpus, *SKIP, "--data.num_workers", "0", "--data.streams", "1")
    path = corpus / "1.parquet"
    intact = path.read_bytes()
    with opened_then(cut(path)):
        assert train(tiny, *command, "--job.dump_folder", str(whole)) == 0
    path.write_bytes(intact)

    def stop_in_the_middle(corpus):
        truncate(path)
        return flaky(corpus, [], tmp_path / "counts")

    with opened_then(stop_in_the_middle):
        assert train(tiny, *command) == 0
    # As if it had been killed after step 8: with the file cut, and then on the next start from step 16 with it whole.
    for newest, content in ((8, None), (16, intact)):
        for path_of_later in (run / "checkpoints").iterdir():
            if int(path_of_later.name[-8:]) > newest:
                os.rename(path_of_later, tmp_path / f"{newest}-{path_of_later.name}")
        if content:
            path.write_bytes(content)
        assert train(tiny, *command) == 0
        assert_same_checkpoint(checkpoint(run, 24), checkpoint(whole, 24))


def test_a_reader_that_fails_for_a_while_changes_nothing(tiny, corpus, tmp_path, capsys):
    command = settings(corpus, "--data.num_workers", "1", "--data.retry_seconds", "30")
    assert train(tiny, *command, "--job.dump_folder", str(tmp_path / "whole")) == 0
    fails = [Fails(0, 0, 2), Fails(3, 5, 4), Fails(6, 11, 1)]
    with opened_then(lambda corpus: flaky(corpus, fails, tmp_path / "counts")):
        assert train(tiny, *command) == 0
    assert_same_checkpoint(checkpoint(tmp_path / "run", 24), checkpoint(tmp_path / "whole", 24))
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert log.count("did not answer; read on after") == 3
    assert not (tmp_path / "run" / "skipped_files.json").exists()


def test_a_reader_that_keeps_failing_ends_the_run_with_1(tiny, corpus, tmp_path, capsys):
    with opened_then(lambda corpus: flaky(corpus, [Fails(5, 3)], tmp_path / "counts")):
        assert train(tiny, *settings(corpus, "--data.num_workers", "1")) == 1
    error = capsys.readouterr().err
    assert error.startswith("failed: 2.parquet, document ")
    assert "did not answer (given up after " in error
    last = max(metrics(tmp_path / "run"))
    assert checkpoint(tmp_path / "run", last).is_dir()
    assert train(tiny, *settings(corpus)) == 0  # it answers again


@pytest.mark.parametrize(
    "number, workers",
    [
        (signal.SIGTERM, "0"),
        (signal.SIGUSR1, "1"),
        pytest.param(signal.SIGTERM, "1", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "0", marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_a_reader_waits_saves_and_ends_with_75(
    tiny, corpus, tmp_path, capsys, monkeypatch, workers, number
):
    """Unheard, it would end with 1 when `retry_seconds` are over."""
    counts = tmp_path / "counts"

    waiting = threading.Event()  # the trainer itself, not a loader that reads ahead
    wait = BatchLoader.wait

    def note_waiting(self, seconds=None):
        there = wait(self, seconds)
        if not there and list(counts.glob("*")):
            waiting.set()
        return there

    def signal_when_it_waits() -> None:
        assert waiting.wait(HANG)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(BatchLoader, "wait", note_waiting)
    threading.Thread(target=signal_when_it_waits, daemon=True).start()
    command = settings(corpus, "--data.num_workers", workers, "--data.retry_seconds", "300")
    with opened_then(lambda corpus: flaky(corpus, [Fails(5, 3)], counts, delay=100)):
        assert train(tiny, *command) == 75
    assert f"stopped by {number.name} while waiting for data" in capsys.readouterr().out
    last = max(metrics(tmp_path / "run"))
    assert checkpoint(tmp_path / "run", last).is_dir()
    assert train(tiny, *settings(corpus)) == 0


def test_a_file_damaged_from_the_start(tiny, corpus, tmp_path, capsys):
    truncate(corpus / "3.parquet")
    assert train(tiny, *settings(corpus)) == 2
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert train(tiny, *settings(corpus, *SKIP)) == 0
    output = capsys.readouterr().out
    assert output.count("3.parquet: not a whole parquet file") == 3  # after two looks it is tried again, then:
    assert output.count("the rest of the file is skipped in this run") == 1
    assert set(metrics(tmp_path / "run", "skipped_files").values()) == {1}
    record = json.loads((tmp_path / "run" / "skipped_files.json").read_text())
    assert [(entry["stream"], entry["step"]) for entry in record] == [(None, None)]
    before = snapshot(tmp_path / "run" / "checkpoints")
    assert main(["train", str(tiny), *settings(corpus, *SKIP), "--dry-run"]) == 0
    assert train(tiny, *settings(corpus, *SKIP)) == 0
    assert snapshot(tmp_path / "run" / "checkpoints") == before


def test_a_longer_wait_than_the_watchdog_allows_is_refused(tiny, corpus, capsys):
    assert train(tiny, *settings(corpus), "--data.retry_seconds", "301") == 2
    error = capsys.readouterr().err
    assert "301 s of waiting for data are more than half of fault_tolerance.step_timeout = 600" in error
