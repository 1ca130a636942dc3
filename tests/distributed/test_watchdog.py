"""A rank that stands still: all ranks write where they are, end with 1, and the run goes on as if nothing had been."""

import ctypes
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from swamla_titan.train.policies import watchdog as module
from swamla_titan.train.trainer import Trainer
from tests.distributed.job import before_step, limit_of_a_second, run, run_and_listen
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics
from tests.waiting import HANG, wait_until

SHORT = ("--training.steps", "6", "--data.num_workers", "0", "--validation.interval", "0", "--checkpoint.interval", "2")


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(tiny_config(tmp_path))


def _wait(kind: str) -> None:
    match kind:
        case "asleep":
            time.sleep(2 * HANG)
        case "with Python's lock":
            ctypes.PyDLL(None).sleep(int(2 * HANG))  # unlike CDLL, it does not let go of it
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)


def _train(kind: str, result: Path, limits: list[str], config: str, *overrides: str) -> None:
    """In a child: train until the last rank stands still in step 4, for which rank r waits limits[r] seconds.

    Only that step has a limit of a second: the others take what the machine needs.
    """
    # After a fork, the first use of torch's threads by several at once fails ("Invalid thread pool").
    torch.set_num_threads(1)
    if kind != "asleep":
        module.BACKSTOP, module.OTHERS = 2.0, 1.0  # no other rank can answer
    rank = int(os.environ["RANK"])

    def stand_still(trainer: Trainer) -> None:
        if limits[rank] == "1":
            limit_of_a_second(trainer)
        if rank == int(os.environ["WORLD_SIZE"]) - 1:
            _wait(kind)

    before_step(4, stand_still)
    ended = run_and_listen(config, *overrides)
    result.write_text(json.dumps(ended))
    sys.exit(ended.code)


def _watched(kind: str, folder: Path, limits: list[str], config: str, *overrides: str) -> int | None:
    """`_train` in a process of its own; returns its exit code, None if it has not ended when the first rank has."""
    rank = os.environ["RANK"]
    result = folder / f"ended-{rank}.json"
    child = multiprocessing.get_context("fork").Process(target=_train, args=(kind, result, limits, config, *overrides))
    child.start()
    if kind == "stopped" and rank != "0":
        wait_until((folder / "first-has-ended").exists)
    else:
        child.join(HANG)
    if rank == "0":
        (folder / "first-has-ended").touch()
    code = child.exitcode
    child.kill()
    return code


@pytest.mark.parametrize(
    "limits",
    [["1", "600"], *(pytest.param(limits, marks=pytest.mark.slow) for limits in (["1", "1"], ["600", "600", "1"]))],
    ids=str,
)
def test_stacks_of_all_ranks_are_in_traces_all_end_with_1_and_the_run_goes_on(tmp_path, config, limits):
    size, run_folder, whole = len(limits), tmp_path / "run", tmp_path / "whole"
    ended = on_ranks(size, _watched, "asleep", tmp_path, limits, config, *SHORT)
    assert ended == [1] * size

    files = {f"hang-step-3-rank-{rank}.txt" for rank in range(size)}
    assert {path.name for path in (run_folder / "traces").iterdir()} == files
    for rank, limit in enumerate(limits):
        stacks = (run_folder / "traces" / f"hang-step-3-rank-{rank}.txt").read_text()
        assert ("in _wait" in stacks) == (rank == size - 1)
        assert "in run" in stacks
        log = (run_folder / f"logs/rank-{rank}.log").read_text()
        if limit == "600":
            assert "another rank makes no progress" in stacks.splitlines()[0]
        assert f"rank {size - 1} after step 3: _wait (test_watchdog.py:" in log  # from each, it is known of all
        others = "rank 0" if size == 2 else f"ranks 0-{size - 2}"
        assert f"{others} after step 3: " in log
        assert "no answer" not in log

    assert on_ranks(size, run, config, *SHORT) == [0] * size
    assert on_ranks(size, run, config, *SHORT, "--job.dump_folder", str(whole)) == [0] * size
    assert metrics(run_folder) == metrics(whole)
    assert_same_checkpoint(checkpoint(run_folder, 6), checkpoint(whole, 6))


def test_a_rank_that_keeps_pythons_lock_ends_with_1_too_and_its_stacks_are_in_traces(tmp_path, config):
    ended = on_ranks(2, _watched, "with Python's lock", tmp_path, ["1", "1"], config, *SHORT)
    assert ended == [1, 1]
    traces = tmp_path / "run" / "traces"
    assert "in _wait" in (traces / "hang-rank-1.txt").read_text()
    assert "no progress for 1 s" in (traces / "hang-step-3-rank-0.txt").read_text()


def test_the_others_end_with_1_and_name_a_rank_that_is_stopped(tmp_path, config):
    ended = on_ranks(2, _watched, "stopped", tmp_path, ["1", "1"], config, *SHORT)
    assert ended == [1, None]  # torchrun kills it then: a stopped process obeys nothing but SIGKILL
    assert "rank 1: no answer; stopped, cut off" in (tmp_path / "run/logs/rank-0.log").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus_the_last_collectives_of_each_rank_are_in_traces_too(tmp_path, config):
    ended = on_ranks(2, _watched, "asleep", tmp_path, ["1", "1"], config, *SHORT)
    assert ended == [1, 1]
    traces = sorted((tmp_path / "run/traces").glob("hang-step-*-nccl-rank-*"))
    # The rank that does not sleep has put step 4 on its GPU, and may be the one that notices first.
    assert [path.name for path in traces] in [[f"hang-step-{n}-nccl-rank-{rank}" for rank in (0, 1)] for n in (3, 4)]
    for trace in traces:
        entries = pickle.loads(trace.read_bytes())["entries"]
        assert any("nccl:" in entry["profiling_name"] for entry in entries)


# out of memory


def _out_of_memory(_: object) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB. Process 7 uses it."
    )


def _train_short_of_memory(result: Path, config: str, *overrides: str) -> None:
    if os.environ["RANK"] == "1":
        before_step(4, _out_of_memory)
    ended = run_and_listen(config, *overrides)
    result.write_text(json.dumps(ended))
    sys.exit(ended.code)


def _short_of_memory(folder: Path, config: str, *overrides: str) -> int | None:
    result = folder / f"ended-{os.environ['RANK']}.json"
    arguments = (result, config, *overrides)
    child = multiprocessing.get_context("fork").Process(target=_train_short_of_memory, args=arguments)
    child.start()
    child.join(HANG)
    child.kill()
    return child.exitcode


def test_a_rank_out_of_memory_says_so_though_it_is_alone_ends_with_1_and_so_do_the_others(tmp_path, config):
    assert on_ranks(2, _short_of_memory, tmp_path, config, *SHORT) == [1, 1]
    code, _, err = json.loads((tmp_path / "ended-1.json").read_text())
    assert code == 1
    assert err.startswith("failed: rank 1 ran out of memory: CUDA out of memory. Tried to allocate 20.00 GiB. ")
    assert "Traceback" not in err
    assert not (tmp_path / "ended-0.json").exists()  # its collective broke off, when the other process was gone
    assert "rank 1 ran out of memory" in (tmp_path / "run/logs/rank-1.log").read_text()
    assert [path.name for path in (tmp_path / "run/traces").iterdir()] == ["oom-rank-1.txt"]
    assert on_ranks(2, run, config, *SHORT) == [0, 0]
