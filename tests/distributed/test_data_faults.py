"""Data that cannot be read, in jobs of several ranks: all train on the same batches, whoever comes upon the damage."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import open_corpus
from swamla_titan.data.streams import DocumentStream
from swamla_titan.train import setup
from tests.data.faulty import Fails, flaky, four_files
from tests.distributed.job import Ended, run, run_and_listen, run_damaged
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics
from tests.waiting import wait_until

SKIP = ("--data.on_error", "skip_file", "--data.retry_seconds", "0.2")


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(tiny_config(tmp_path))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return four_files(tmp_path / "corpus")


def settings(corpus: Path, folder: Path, steps: int = 20) -> tuple[str, ...]:
    return (
        *("--data.source", "local", "--data.path", str(corpus), "--data.streams", "3", "--data.shuffle_documents", "5"),
        *("--validation.interval", "0", "--validation.fraction", "0", "--training.steps", str(steps)),
        *("--job.dump_folder", str(folder), "--checkpoint.keep_latest", "0", "--checkpoint.interval", "10"),
        *(
            "--data.num_workers",
            "0",
            "--model.dropout",
            "0",
            "--lr_schedule.warmup_steps",
            "0",
            "--optimizer.lr",
            "1e-3",
        ),
        *("--lr_schedule.name", "wsd", "--lr_schedule.decay_steps", "1"),
    )


def run_flaky(rank: int, fails: list[Fails], counts: Path, delay: float, config: str, *overrides: str) -> Ended:
    """`run_and_listen`, with a source that fails on rank `rank` alone (-1: on all)."""
    original, own = setup.open_corpus, int(os.environ["RANK"])
    if rank in (own, -1):
        mine = counts / str(own)
        counts.mkdir(exist_ok=True)
        setup.open_corpus = lambda *arguments: flaky(original(*arguments), fails, mine, delay)  # type: ignore
    try:
        return run_and_listen(config, *overrides)
    finally:
        setup.open_corpus = original


def place_in_the_data(folder: Path, step: int) -> tuple[object, object]:
    """What a checkpoint says of the streams: their cursors, and what they exclude but for the words."""
    state = json.loads((checkpoint(folder, step) / "train.json").read_text())
    words = {"place", "reason"}
    return state["cursors"], [{**entry, **dict.fromkeys(words)} for entry in state.get("excluded", [])]


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((1, 2, 3), marks=pytest.mark.slow)], ids=str)
def test_on_any_number_of_ranks_the_same_is_skipped_and_they_resume_each_other(tmp_path, config, corpus, sizes):
    path = corpus / "2.parquet"
    intact = path.read_bytes()
    half = intact[: len(intact) // 2]
    for size in sizes:
        path.write_bytes(intact)
        folder = tmp_path / f"on-{size}"
        ended = on_ranks(size, run_damaged, path, half, config, *settings(corpus, folder), *SKIP)
        assert [each.code for each in ended] == [0] * size, ended[0].err
        assert ended[0].out.count("the rest of the file is skipped in this run") == 1
        assert place_in_the_data(folder, 20) == place_in_the_data(tmp_path / "on-1", 20)
        for step, loss in metrics(tmp_path / "on-1").items():
            assert metrics(folder)[step] == pytest.approx(loss, rel=1e-5)
        assert metrics(folder, "skipped_files") == metrics(tmp_path / "on-1", "skipped_files")
    assert place_in_the_data(tmp_path / "on-1", 10)[1]
    # from the middle, on another number of ranks, the file whole again
    path.write_bytes(intact)
    os.rename(checkpoint(tmp_path / "on-2", 20), tmp_path / "away")
    assert on_ranks(3, run, config, *settings(corpus, tmp_path / "on-2"), *SKIP) == [0] * 3
    assert place_in_the_data(tmp_path / "on-2", 20) == place_in_the_data(tmp_path / "on-1", 20)


def late_unit(corpus: Path) -> int:
    """The row group that the first stream reads last in its first epoch: there are good steps before it."""
    data = Data(source="local", path=str(corpus), tokenizer="byte", streams=3, shuffle_documents=5)
    return DocumentStream(open_corpus(data, Validation(fraction=0), 0), 0)._slices[-1].part.unit


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stop_ends_all_ranks_with_2_and_saves(tmp_path, config, corpus, size):
    folder, unit = tmp_path / "run", late_unit(corpus)
    fails = [Fails(unit, 3, damaged=True)]
    ended = on_ranks(size, run_flaky, 0, fails, tmp_path / "counts", 0.001, config, *settings(corpus, folder))
    assert [each.code for each in ended] == [2] * size
    assert ended[0].err.startswith(f"error: {unit // 2}.parquet, document 3: made no sense. data.on_error")
    assert not any(each.err for each in ended[1:])
    assert checkpoint(folder, max(metrics(folder))).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("degree", [("--parallel.tensor", "2"), ("--parallel.pipeline", "2")], ids=str)
def test_ranks_that_read_the_same_skip_what_one_of_them_could_not_read(tmp_path, config, corpus, degree):
    """Each of two ranks fails where the other one does not: without agreement they would train on different rows."""
    pipeline = ("--training.local_batch_size", "1", "--training.global_batch_size", "4")
    command = (*settings(corpus, tmp_path / "run"), *SKIP, *degree, *pipeline)
    fails = [Fails(4, 3, damaged=True)]
    ended = on_ranks(2, run_flaky, 1, fails, tmp_path / "counts", 0.001, config, *command)
    assert [each.code for each in ended] == [0, 0], ended[0].err
    assert ended[0].out.count("the rest of the file is skipped in this run") == 1
    whole = (*settings(corpus, tmp_path / "whole"), *SKIP, *pipeline)
    (alone,) = on_ranks(1, run_flaky, -1, fails, tmp_path / "alone", 0.001, config, *whole)
    assert alone.code == 0, alone.err
    assert place_in_the_data(tmp_path / "run", 20) == place_in_the_data(tmp_path / "whole", 20)
    assert place_in_the_data(tmp_path / "run", 20)[1]
    for step, loss in metrics(tmp_path / "whole").items():
        assert metrics(tmp_path / "run")[step] == pytest.approx(loss, rel=2e-5)


def run_waiting(unit: int, counts: Path, number: int, config: str, *overrides: str) -> Ended:
    """Rank 0's reader waits for ever; rank 1, which waits for it, gets a signal.

    Unheard, all would end with 1 when `retry_seconds` are over.
    """

    def signal_when_it_waits() -> None:
        wait_until(lambda: list(counts.glob("0/*")))
        time.sleep(1)
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == "1":
        threading.Thread(target=signal_when_it_waits, daemon=True).start()
    return run_flaky(0, [Fails(unit, 3)], counts, 100, config, *overrides)


def test_a_signal_to_a_rank_that_waits_for_one_that_waits_for_its_data(tmp_path, config, corpus):
    folder = tmp_path / "run"
    waiting = (late_unit(corpus), tmp_path / "counts", signal.SIGTERM)
    found = on_ranks(2, run_waiting, *waiting, config, *settings(corpus, folder))
    assert [ended.code for ended in found] == [75, 75], found[0].err
    assert checkpoint(folder, max(metrics(folder))).is_dir()
    assert on_ranks(2, run, config, *settings(corpus, folder)) == [0, 0]
