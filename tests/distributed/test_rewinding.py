"""All ranks of every plan rewind together, to the same weights, and go on with them like a job restarted from there."""

import shutil
import signal

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.test_bad_steps import PLANS, written
from tests.train.faults import Fault, run_with_faults, run_with_faults_and_signal
from tests.train.runs import checkpoint, metrics, put_weights
from tests.train.test_bad_steps import assert_equal, dumped, history, learnt

COMMON = (
    *("--data.num_workers", "0", "--lr_schedule.warmup_steps", "0", "--training.steps", "10"),
    *("--checkpoint.interval", "2", "--checkpoint.keep_latest", "0", "--validation.interval", "4"),
    *("--fault_tolerance.spike_sigma", "1000", "--fault_tolerance.spike_window", "3"),
    *("--fault_tolerance.max_bad_steps", "3", "--fault_tolerance.max_rewinds", "1"),
)
ROW = (Fault(5, "nan gradient", 0), Fault(6, "spike", 1), Fault(7, "nan loss", 1))
SLOW = {"ddp-2", "cp-2", "fsdp-2-tp-2", "fsdp-2-pp-2", "hsdp-2x2", "fsdp-3", "tp-2", "pp-2"}


@pytest.mark.parametrize("plan", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PLANS])
def test_a_job_rewinds_as_one_and_goes_on_like_one_restarted_from_there(tmp_path, plan):
    ranks, parallel = PLANS[plan]
    run, other = tmp_path / "run", tmp_path / "other"
    settings = (written(tmp_path), *COMMON, *parallel)
    ended = on_ranks(ranks, run_with_faults, ROW, (), *settings)
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    for number in range(ranks):
        log = (run / "logs" / f"rank-{number}.log").read_text()
        assert log.count(f"rewound to the weights and optimizer of {checkpoint(run, 2)}; step 9 continues") == 1
    assert [entry["step"] for entry in dumped(run, 8)] == [5, 6, 7]
    assert metrics(run, "rewinds") == {9: 1, 10: 1}
    assert_equal(learnt(checkpoint(run, 8)), learnt(checkpoint(run, 2)))

    by_hand = (*settings, "--fault_tolerance.max_bad_steps", "90", "--job.dump_folder", str(other))
    for _ in range(2):
        ended = on_ranks(ranks, run_with_faults, ROW, (), *by_hand)
        assert [each.code for each in ended] == [0] * ranks, ended[0].err
        if "resumed from" not in ended[0].out:
            shutil.rmtree(checkpoint(other, 10))
            put_weights(checkpoint(other, 8), checkpoint(other, 2))
    assert f"resumed from {checkpoint(other, 8)}" in ended[0].out
    assert_equal(learnt(checkpoint(run, 10)), learnt(checkpoint(other, 10)))
    losses = metrics(run), metrics(other)
    assert [losses[0][step] for step in (9, 10)] == [losses[1][step] for step in (9, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_job_killed_around_its_rewind_comes_to_the_same_end(tmp_path, ranks):
    """At the step in which the row is full, the one in which it is noticed, and the one after the rewind."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = (written(tmp_path), *COMMON, "--checkpoint.keep_latest", "1")
    ended = on_ranks(ranks, run_with_faults, ROW, (), *settings, "--job.dump_folder", str(whole))
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    for step in (7, 8, 9, 10):
        with pytest.raises(AssertionError, match=r"rank \d died"):
            on_ranks(ranks, run_with_faults_and_signal, ROW, signal.SIGKILL, step, *settings)
    ended = on_ranks(ranks, run_with_faults, ROW, (), *settings)
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    assert_equal(learnt(checkpoint(run, 10)), learnt(checkpoint(whole, 10)))
    assert history(checkpoint(run, 10)) == history(checkpoint(whole, 10))
    assert metrics(run) == metrics(whole)


def test_stopped_within_the_row_another_number_of_ranks_rewinds_to_the_same_weights(tmp_path):
    run = tmp_path / "run"
    settings = (written(tmp_path), *COMMON)
    ended = on_ranks(2, run_with_faults_and_signal, ROW, signal.SIGTERM, 6, *settings)
    assert [each.code for each in ended] == [75] * 2, ended[0].err
    faults = (Fault(7, "nan gradient", 2),)
    ended = on_ranks(3, run_with_faults, faults, (), *settings)
    assert [each.code for each in ended] == [0] * 3, ended[0].err
    assert_equal(learnt(checkpoint(run, 8)), learnt(checkpoint(run, 2)))
    assert metrics(run, "rewinds") == {9: 1, 10: 1}


def test_where_there_are_no_older_weights_all_ranks_stop(tmp_path):
    row = tuple(Fault(step, "nan gradient", step % 2) for step in (3, 4, 5))
    ended = on_ranks(2, run_with_faults, row, (), written(tmp_path), *COMMON)
    assert [each.code for each in ended] == [1, 1]
    assert "There is no rewind, because no intact checkpoint holds weights from before those" in ended[0].err


def test_a_damaged_target_is_passed_over_by_all_ranks(tmp_path):
    """Damaged where only one rank reads: the ranks share the digesting."""
    run = tmp_path / "run"
    row = (Fault(7, "nan gradient", 0), Fault(8, "nan loss", 1), Fault(9, "spike", 1))
    settings = (written(tmp_path), *COMMON, "--training.steps", "12")
    ended = on_ranks(2, run_with_faults_and_signal, row, signal.SIGTERM, 8, *settings)
    assert [each.code for each in ended] == [75] * 2, ended[0].err
    damaged = checkpoint(run, 4) / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\0")
    ended = on_ranks(2, run_with_faults, row, (), *settings)
    assert [each.code for each in ended] == [0] * 2, ended[0].err
    assert f"checkpoint skipped: {checkpoint(run, 4)}: __1_0.distcp has " in ended[0].out
    assert_equal(learnt(checkpoint(run, 10)), learnt(checkpoint(run, 2)))
