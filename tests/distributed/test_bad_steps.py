"""A step that goes wrong on one rank is skipped on all, under every plan, and the job ends as one if there are many."""

import math
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.faults import Fault, run_with_faults
from tests.train.runs import checkpoint, metrics, tensors
from tests.train.test_bad_steps import assert_equal, dumped, history, learnt

COMMON = (
    *("--data.num_workers", "0", "--validation.interval", "0", "--lr_schedule.warmup_steps", "0"),
    *("--training.steps", "5", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0"),
    *("--fault_tolerance.spike_sigma", "50", "--fault_tolerance.spike_window", "2"),
)
# Sizes that three ranks do not divide: some hold less of a weight than others, of the smallest nothing at all.
ODD = (
    *("--model.dim", "66", "--model.num_heads", "3", "--model.ffn_hidden_dim", "101", "--model.kv_lora_rank", "33"),
    *("--model.qk_nope_head_dim", "11", "--model.qk_rope_head_dim", "8", "--model.v_head_dim", "9"),
)
PLANS = {
    "fsdp-2": (2, ()),
    "fsdp-3": (3, ODD),
    "ddp-2": (2, ("--parallel.data_parallel", "ddp")),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "cp-2": (2, ("--parallel.context", "2")),
    "pp-2": (2, ("--parallel.pipeline", "2", "--training.local_batch_size", "1")),
    "fsdp-2-tp-2": (4, ("--parallel.tensor", "2")),
    "fsdp-2-pp-2": (4, ("--parallel.pipeline", "2", "--training.local_batch_size", "1")),
    "hsdp-2x2": (4, ("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2")),
}
# What goes wrong where: the value alone on the last rank, then a gradient's element on the first, spikes on the last.
CASES = [
    *((plan, "nan gradient", 0) for plan in PLANS),
    *((plan, "nan loss", -1) for plan in ("fsdp-2", "tp-2", "pp-2")),
    *((plan, "spike", -1) for plan in ("fsdp-2", "ddp-2", "tp-2", "pp-2")),
    *((plan, "nan batch", -1) for plan in ("fsdp-2", "ddp-2")),
]
SLOW = {"hsdp-2x2", "fsdp-2-pp-2", "fsdp-2-tp-2", "fsdp-3", "cp-2", "ddp-2"}
SLOW |= {("tp-2", "nan loss"), ("tp-2", "spike"), ("fsdp-2", "nan loss"), ("fsdp-2", "nan batch")}
SLOW |= {("pp-2", "nan loss"), ("pp-2", "spike")}


def written(folder: Path) -> str:
    return str(tiny_config(folder))


@pytest.mark.parametrize(
    "plan, kind, rank",
    [pytest.param(*case, marks=[pytest.mark.slow] if SLOW & {case[0], case[:2]} else []) for case in CASES],
)
def test_a_step_that_goes_wrong_on_one_rank_is_skipped_on_all(tmp_path, plan, kind, rank):
    ranks, parallel = PLANS[plan]
    run, other = tmp_path / "run", tmp_path / "other"
    settings = (written(tmp_path), *COMMON, *parallel)
    ended = on_ranks(ranks, run_with_faults, (Fault(3, kind, rank % ranks),), (), *settings)
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    for number in range(ranks):
        log = (run / "logs" / f"rank-{number}.log").read_text()
        warning = "WARNING swamla_titan.train.policies.streaks: skipped as bad, changing nothing: step 3 (loss "
        assert log.count(warning) == 1
    assert metrics(run, "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    # Every rank wrote its own parts of these.
    assert_equal(learnt(checkpoint(run, 2)), learnt(checkpoint(run, 3)))
    # And every rank goes on from them as if the step had not been applied. Without the rule for spikes, which would
    # count the norm of that step, and find the next one far from norms that happen to be alike.
    no_rule = ("--fault_tolerance.spike_sigma", "0", "--fault_tolerance.spike_window", "128")  # its default
    ended = on_ranks(ranks, run_with_faults, (), (3,), *settings, *no_rule, "--job.dump_folder", str(other))
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    assert_equal(learnt(checkpoint(run, 5)), learnt(checkpoint(other, 5)))
    losses = metrics(run), metrics(other)
    assert [losses[0][step] for step in (4, 5)] == [losses[1][step] for step in (4, 5)]


@pytest.mark.parametrize("plan", ["fsdp-2", pytest.param("pp-2", marks=pytest.mark.slow)])
def test_many_in_a_row_on_any_rank_end_all_with_1_and_any_number_of_ranks_goes_on(tmp_path, plan):
    ranks, parallel = PLANS[plan]
    run = tmp_path / "run"
    config = written(tmp_path)
    settings = (*COMMON, "--training.steps", "8", "--model.dropout", "0", "--fault_tolerance.max_bad_steps", "3")
    faults = (Fault(2, "nan gradient", 0), Fault(4, "nan loss", 1), Fault(5, "spike", 0), Fault(6, "nan gradient", 1))
    ended = on_ranks(ranks, run_with_faults, faults, (), config, *settings, *parallel)
    assert [each.code for each in ended] == [1] * ranks, ended[0].out
    assert ended[0].err.startswith("failed: a streak of 3 bad steps, up to step 6 (loss ")
    assert not any(each.err for each in ended[1:])
    dump = dumped(run, 6)
    assert [entry["step"] for entry in dump] == [4, 5, 6]
    for entry in dump:
        # The streams of all data ranks, each at the place where the batch began.
        read = {number % 6 for number in range(entry["first_sequence"], entry["last_sequence"] + 1)}
        assert {int(stream) for stream in entry["cursors"]} == read
        for stream, cursor in entry["cursors"].items():
            assert cursor["sequences"] == len(range(int(stream), entry["first_sequence"], 6))
    assert "limit" in dump[1]
    assert (dump[2]["grad_norm"], math.isfinite(dump[2]["loss"])) == ("nan", True)
    # The history goes on with one process, which skips nothing more.
    alone = run_with_faults((), (), config, *settings)
    assert alone.code == 0, alone.err
    assert metrics(run, "skipped_steps")[8] == 4
    assert history(checkpoint(run, 8))["bad_steps.counts"] == "[4, 0, 8, 0]"
    norms = [metrics(run, "grad_norm")[step] for step in (7, 8)]
    assert tensors(checkpoint(run, 8))["bad_steps.norms"].tolist() == pytest.approx(norms)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_job_decides_like_an_undisturbed_one_bit_for_bit(tmp_path, ranks):
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = (written(tmp_path), *COMMON, "--training.steps", "7", "--fault_tolerance.spike_window", "3")
    faults = (Fault(2, "nan batch", 1), Fault(5, "spike", 1), Fault(6, "nan gradient", 0))
    for folder in (run, whole):
        ended = on_ranks(ranks, run_with_faults, faults, (), *settings, "--job.dump_folder", str(folder))
        assert [each.code for each in ended] == [0] * ranks, ended[0].err
    for step in (6, 7):
        (checkpoint(run, step) / "manifest.json").unlink()  # as a kill would leave them
    ended = on_ranks(ranks, run_with_faults, faults, (), *settings)
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    assert metrics(run, "skipped_steps")[7] == 3
    assert history(checkpoint(run, 7)) == history(checkpoint(whole, 7))
    assert_equal(learnt(checkpoint(run, 7)), learnt(checkpoint(whole, 7)))
