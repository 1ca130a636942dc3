"""A job ends as one: whatever befalls one of its ranks, all save the same step and end with the same code."""

import functools
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.job import (
    Ended,
    before_step,
    run,
    run_and_listen,
    run_damaged,
    run_killed_loader,
    run_signalled,
    run_without_sockets,
)
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, snapshot
from tests.waiting import wait_until

SHORT = ("--training.steps", "6", "--data.num_workers", "0", "--validation.interval", "3")


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(tiny_config(tmp_path))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """By number of ranks, the folder of a SHORT run that nothing befell: trained once for all tests."""

    @functools.cache
    def trained(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        tiny_config(folder)
        assert on_ranks(ranks, run, str(folder / "tiny.toml"), *SHORT) == [0] * ranks
        return folder / "run"

    return trained


def assert_all_end(ended: list[Ended], code: int) -> str:
    """All with `code`, and one message at most, which the first rank says; returns it."""
    assert [each.code for each in ended] == [code] * len(ended), "\n".join(each.err for each in ended)
    assert not any(each.err for each in ended[1:])
    assert "Traceback" not in ended[0].err
    return ended[0].err


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def rows(count: int, name: str) -> list[str]:
    """Lines of 100 tokens each, end of text included."""
    return [json.dumps({"text": f"{name}{i:03}".ljust(99, ".")}) for i in range(count)]


def two_streams(folder: Path) -> tuple[str, ...]:
    """A corpus of two files, each a stream of its own: with two data ranks, each reads one of them alone."""
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows(40, name)))
    return (
        *("--data.source", "local", "--data.path", str(folder), "--data.streams", "2", "--data.shuffle_documents", "1"),
        *("--validation.interval", "0", "--validation.fraction", "0", "--training.steps", "14"),
    )


# stopped on purpose


@pytest.mark.parametrize(
    "at", [{1: 3}, {0: 3, 1: 3}, *(pytest.param(at, marks=pytest.mark.slow) for at in ({0: 3}, {0: 4, 1: 3}))], ids=str
)
def test_a_signal_to_one_rank_or_to_all_saves_the_same_step_on_all_and_the_run_goes_on(
    tmp_path, config, undisturbed, at
):
    run_folder, whole = tmp_path / "run", undisturbed(2)
    ended = on_ranks(2, run_signalled, signal.SIGTERM, at, config, *SHORT)
    assert assert_all_end(ended, 75) == ""
    assert "stopped by SIGTERM after step 3" in ended[0].out
    assert saved(run_folder) == ["step-00000003"]
    for rank in range(2):
        assert "stopped by SIGTERM after step 3" in (run_folder / f"logs/rank-{rank}.log").read_text()
    assert on_ranks(2, run, config, *SHORT) == [0, 0]
    assert_same_checkpoint(checkpoint(run_folder, 6), checkpoint(whole, 6))
    assert metrics(run_folder) == metrics(whole)


# what one rank alone finds out


@pytest.mark.parametrize(
    "bad, workers",
    [
        ("b", "0"),
        pytest.param("a", "1", marks=pytest.mark.slow),
        pytest.param("a", "0", marks=pytest.mark.slow),
        pytest.param("b", "1", marks=pytest.mark.slow),
    ],
)
def test_a_line_that_one_rank_alone_cannot_read_ends_all_with_2_and_what_was_learnt_is_saved(
    tmp_path, config, bad, workers
):
    run_folder, whole = tmp_path / "run", tmp_path / "whole"
    corpus = two_streams(tmp_path / "corpus")
    settings, without = ((*corpus, "--data.num_workers", number) for number in (workers, "0"))
    assert on_ranks(2, run, config, *without, "--job.dump_folder", str(whole)) == [0, 0]
    file = tmp_path / "corpus" / f"{bad}.jsonl"
    good = file.read_text()
    lines = good.splitlines()
    lines[20] = lines[20].replace("{", "(")
    bad_text = "\n".join(lines).encode()
    message = assert_all_end(on_ranks(2, run_damaged, file, bad_text, config, *settings), 2)
    assert message.count("error: ") == 1
    assert f"{file}, line 21: not valid JSON" in message
    last = max(metrics(run_folder))
    assert last > 5
    assert saved(run_folder) == [f"step-{last:08d}"]

    # The rank that could read its part must not be one step further in the data than the others.
    file.write_text(good)
    assert on_ranks(2, run, config, *without) == [0, 0]
    assert_same_checkpoint(checkpoint(run_folder, 14), checkpoint(whole, 14))


@pytest.mark.slow
def test_a_loader_that_dies_on_one_rank_ends_all_with_1_and_the_run_goes_on(tmp_path, config):
    run_folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*SHORT, "--training.steps", "20")
    assert on_ranks(2, run, config, *settings, "--job.dump_folder", str(whole)) == [0, 0]
    ended = on_ranks(2, run_killed_loader, 1, 4, config, *settings, "--data.num_workers", "1")
    message = assert_all_end(ended, 1)
    assert message.startswith("failed: A data loader process ended unexpectedly (exit code -9).")
    assert saved(run_folder) == [f"step-{max(metrics(run_folder)):08d}"]
    assert on_ranks(2, run, config, *settings) == [0, 0]
    assert_same_checkpoint(checkpoint(run_folder, 20), checkpoint(whole, 20))


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-1.log"])
def test_numbers_or_a_log_that_cannot_be_written_end_no_rank(tmp_path, config, undisturbed, name):
    """The device that is always full stands in for the disk."""
    run_folder, whole = tmp_path / "run", undisturbed(2)
    settings = (*SHORT, "--checkpoint.interval", "2")
    full = run_folder / name
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    ended = on_ranks(2, run_and_listen, config, *settings)
    assert [each.code for each in ended] == [0] * 2, ended[0].err
    warned = f"{full} cannot be written (No space left on device); its lines wait in memory until it can"
    assert [each.out.count(warned) for each in ended] == [name == "metrics.jsonl", name != "metrics.jsonl"]
    assert_same_checkpoint(checkpoint(run_folder, 6), checkpoint(whole, 6))


def test_a_log_that_has_no_place_on_one_rank_is_refused_on_all(tmp_path, config):
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir(parents=True)
    ended = on_ranks(2, run_and_listen, config, *SHORT)
    assert assert_all_end(ended, 2) == f"error: job.dump_folder = {tmp_path}/run: cannot be written (Is a directory)\n"
    assert saved(tmp_path / "run") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_that_have_no_place_are_refused_on_all_before_the_first_step(tmp_path, config, ranks):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where a folder should be")
    ended = on_ranks(ranks, run_and_listen, config, *SHORT, "--metrics.tensorboard", "true")
    message = f"error: job.dump_folder = {tmp_path}/run: the metrics of the run cannot be written there ("
    assert assert_all_end(ended, 2).startswith(message)
    assert saved(tmp_path / "run") == []


# what all find out


def test_what_one_machine_has_no_place_for_is_refused_on_all_and_said_once(config):
    ended = on_ranks(2, run_without_sockets, config, *SHORT, "--data.num_workers", "1")
    assert "Set TMPDIR to a folder of at most" in assert_all_end(ended, 2)


@pytest.mark.parametrize(
    "overrides, part",
    [
        (("--training.seq_len", "0"), "expected a whole number >= 1"),
        (("--parallel.tensor", "3"), "3 ranks cannot share"),
        (("--parallel.pipeline", "3"), "do not fit 2 processes"),
        (("--data.source", "local", "--data.path", "/nowhere/at/all"), "/nowhere/at/all does not exist"),
        (("--data.tokenizer", "gtp2"), 'there is no tokenizer "gtp2"'),
    ],
    ids=["range", "contradiction", "processes", "data", "tokenizer"],
)
def test_what_is_refused_is_refused_on_all_said_once_and_nothing_is_written(tmp_path, config, overrides, part):
    message = assert_all_end(on_ranks(2, run_and_listen, config, *overrides), 2)
    assert message.count("error: ") == 1
    assert part in message
    assert not (tmp_path / "run").exists()


def _run_slowly(running: str, go_on: str, config: str, *overrides: str) -> int:
    def wait(_: object) -> None:
        Path(running).touch()
        wait_until(Path(go_on).exists)

    before_step(3, wait)
    return run(config, *overrides)


def test_a_second_job_in_the_same_folder_is_refused_on_all_and_the_first_goes_on(tmp_path, config):
    running, go_on = tmp_path / "running", tmp_path / "go-on"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(on_ranks, 2, _run_slowly, str(running), str(go_on), config, *SHORT)
        try:
            while not running.exists():
                assert not first.done(), first.result()
                time.sleep(0.02)
            before = snapshot(tmp_path / "run")
            message = assert_all_end(on_ranks(2, run_and_listen, config, *SHORT), 2)
            assert message.count("another run writes there") == 1
            assert snapshot(tmp_path / "run") == before
        finally:
            go_on.touch()
        assert first.result() == [0, 0]
    assert saved(tmp_path / "run") == ["step-00000006"]


@pytest.mark.parametrize("plan", [(), ("--parallel.pipeline", "2", "--training.local_batch_size", "1")], ids=str)
def test_a_loss_that_is_no_number_ends_all_with_1_and_is_not_saved(tmp_path, config, plan):
    settings = (*SHORT, "--checkpoint.interval", "1", "--lr_schedule.warmup_steps", "0", "--optimizer.lr", "1e20")
    settings += ("--fault_tolerance.skip_bad_steps", "false")
    message = assert_all_end(on_ranks(2, run_and_listen, config, *settings, *plan), 1)
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert message.startswith(f"failed: step {last['step']}: loss ")
    assert message.count("failed: ") == 1
    assert last["loss"] is None or last["grad_norm"] is None
    assert saved(tmp_path / "run") == [f"step-{step:08d}" for step in range(1, last["step"])]


# who writes and who speaks


@pytest.mark.parametrize("shown", ["", "1", *(pytest.param(shown, marks=pytest.mark.slow) for shown in ("0", "0,1"))])
def test_numbers_are_written_once_logs_by_each_and_the_console_is_for_the_ranks_of_log_rank(tmp_path, config, shown):
    variables = {"LOG_RANK": shown} if shown else {}
    ended = on_ranks(2, run_and_listen, config, *SHORT, "--metrics.tensorboard", "true", **variables)
    assert assert_all_end(ended, 0) == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = Counter((line["step"], "val_loss" in line) for line in lines)
    assert counts == {(step, step in (3, 6)): 1 for step in range(1, 7)}
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    for rank, each in enumerate(ended):
        assert "checkpoint " in (tmp_path / "run" / f"logs/rank-{rank}.log").read_text()
        if str(rank) in (shown or "0").split(","):
            assert each.out.count("I model: ") == 1
        else:
            assert each.out == ""


@pytest.mark.parametrize("wrong, part", [("all", "expected numbers of processes"), ("0,2", "are 0 to 1")])
def test_a_log_rank_that_names_nobody_is_refused(tmp_path, config, wrong, part):
    for each in on_ranks(2, run_and_listen, config, *SHORT, LOG_RANK=wrong):
        assert each.code == 2
        assert f"LOG_RANK={wrong}" in each.err
        assert part in each.err
    assert not (tmp_path / "run").exists()
