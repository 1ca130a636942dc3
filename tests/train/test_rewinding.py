"""Rewinding: which checkpoint a run goes back to, that it goes on with the data, and that kills change nothing."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.faults import Fault, run_with_faults, run_with_faults_and_signal
from tests.train.runs import checkpoint, metrics, put_weights, tensors
from tests.train.test_bad_steps import assert_equal, dumped, history, learnt

STEPS = 12
COMMON = (
    *("--data.num_workers", "0", "--lr_schedule.warmup_steps", "0", "--training.steps", str(STEPS)),
    *("--checkpoint.interval", "2", "--checkpoint.keep_latest", "0", "--validation.interval", "3"),
    *("--fault_tolerance.spike_sigma", "50", "--fault_tolerance.spike_window", "3"),
)
REWINDS = ("--fault_tolerance.max_bad_steps", "3", "--fault_tolerance.max_rewinds", "1")
ROW = tuple(Fault(step, "nan gradient") for step in (5, 6, 7))  # noticed at the end of step 8; 4 and 6 are saved within
BACK = 2  # to the weights of this step
SAVED_BY_THEN = ("--checkpoint.async_mode", "disabled")  # a kill between two checkpoints finds the first one written


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def by_hand(tiny: Path, folder: Path, faults: tuple[Fault, ...], at: int, back: int, *settings: str) -> Path:
    """The run in which someone put the weights of step `back` into the checkpoint of step `at`, and went on."""
    patient = ("--fault_tolerance.max_bad_steps", "90", "--job.dump_folder", str(folder))
    ended = run_with_faults(faults, (), str(tiny), *COMMON, *settings, *patient)
    assert ended.code == 0, ended.err
    for step in saved(folder):
        if step > at:
            shutil.rmtree(checkpoint(folder, step))
    put_weights(checkpoint(folder, at), checkpoint(folder, back))
    ended = run_with_faults(faults, (), str(tiny), *COMMON, *settings, *patient)
    assert ended.code == 0, ended.err
    assert f"resumed from {checkpoint(folder, at)}" in ended.out
    return folder


def assert_went_the_same_way(run: Path, other: Path, since: int = 8) -> None:
    """Weights, moments, window and random states at the end, and the losses of the steps after `since`."""
    assert_equal(learnt(checkpoint(run, STEPS)), learnt(checkpoint(other, STEPS)))
    one, two = tensors(checkpoint(run, STEPS)), tensors(checkpoint(other, STEPS))
    for name in one:
        if name.startswith("random.") or name == "bad_steps.norms":
            assert one[name].equal(two[name]), name
    for name in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
        found, expected = metrics(run, name), metrics(other, name)
        steps = [step for step in expected if step > since and step in found]
        assert steps[-1] == STEPS
        assert [found[step] for step in steps] == [expected[step] for step in steps], name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run that rewinds once, which tests only read."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_with_faults(ROW, (), str(tiny_config(folder)), *COMMON, *REWINDS)
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.mark.parametrize(
    "after, interval",
    [
        pytest.param((), "1", id="a good step after the row-1"),
        pytest.param((Fault(8, "nan loss"),), "100", id="a bad one-100"),
        pytest.param((), "100", id="a good step after the row-100", marks=pytest.mark.slow),
        pytest.param((Fault(8, "nan loss"),), "1", id="a bad one-1", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_with_older_weights_and_the_next_batch_like_a_run_made_by_hand(tiny, tmp_path, after, interval):
    run = tmp_path / "run"
    ended = run_with_faults((*ROW, *after), (), str(tiny), *COMMON, *REWINDS, "--metrics.log_interval", interval)
    assert ended.code == 0, ended.err
    length = 3 + len(after)
    assert ended.out.count(f"a streak of {length} bad steps, up to step {7 + len(after)} (loss ") == 1
    assert f"rewound to the weights and optimizer of {checkpoint(run, BACK)}; step 9 continues with" in ended.out
    assert f"rewind 1 of 1; {run}/traces/bad-steps-8.json lists their data" in ended.out
    dump = dumped(run, 8)
    assert [entry["step"] for entry in dump] == list(range(5, 8 + len(after)))
    assert all(entry["cursors"] for entry in dump)
    assert_equal(learnt(checkpoint(run, 8)), learnt(checkpoint(run, BACK)))
    assert_went_the_same_way(run, by_hand(tiny, tmp_path / "other", (*ROW, *after), 8, BACK))
    logged = {9, 10, 11, 12} if interval == "1" else {9, 10, 12}  # with a validation or a checkpoint
    assert metrics(run, "rewinds") == dict.fromkeys(logged, 1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(each["step"], each["trained"]) for each in events if each["event"] == "rewind"] == [(8, BACK)]
    assert [step for each in events if each["event"] == "skipped" for step in each["steps"]] == [*range(5, 5 + length)]
    assert history(checkpoint(run, STEPS))["bad_steps.counts"] == f"[{length}, 0, 12, 1]"


def test_without_rewinds_the_metric_is_absent_and_nothing_more_is_kept(tiny, tmp_path):
    settings = (*COMMON, "--checkpoint.keep_latest", "1", "--training.steps", "6")
    assert run_with_faults((), (), str(tiny), *settings, "--fault_tolerance.max_rewinds", "0").code == 0
    assert metrics(tmp_path / "run", "rewinds") == {}
    assert saved(tmp_path / "run") == [6]
    kept = ("--fault_tolerance.max_rewinds", "1", "--job.dump_folder", str(tmp_path / "kept"))
    assert run_with_faults((), (), str(tiny), *settings, *kept).code == 0
    assert metrics(tmp_path / "kept", "rewinds") == {}
    assert saved(tmp_path / "kept") == [4, 6]


@pytest.mark.parametrize(
    "keep, steps",
    [
        ("1", (6, 7, 8, 9)),
        *(pytest.param(keep, range(4, 12), marks=pytest.mark.slow, id=f"{keep}-every") for keep in ("1", "2")),
    ],
)
def test_killed_at_step_after_step_it_comes_to_the_same_end(tiny, tmp_path, undisturbed, keep, steps):
    """One kill after the other, within the row, at its notice and behind the rewind; little is kept."""
    settings = (str(tiny), *COMMON, *REWINDS, "--checkpoint.keep_latest", keep)
    for step in steps:
        with pytest.raises(AssertionError, match="rank 0 died"):
            on_ranks(1, run_with_faults_and_signal, ROW, signal.SIGKILL, step, *settings)
    assert run_with_faults(ROW, (), *settings).code == 0
    run = tmp_path / "run"
    assert_went_the_same_way(run, undisturbed, since=0)
    assert history(checkpoint(run, STEPS)) == history(checkpoint(undisturbed, STEPS))
    assert metrics(run, "rewinds") == metrics(undisturbed, "rewinds")
    assert saved(run) == {"1": [10, 12], "2": [8, 10, 12]}[keep]


@pytest.mark.parametrize("step", [5, 8, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 6, 7, 9))])
def test_stopped_by_a_signal_it_comes_to_the_same_end(tiny, tmp_path, undisturbed, step):
    """Also where that saves a checkpoint which would be newer than the one to go back to, or fills the row."""
    settings = (str(tiny), *COMMON, *REWINDS, "--checkpoint.keep_latest", "1")
    [ended] = on_ranks(1, run_with_faults_and_signal, ROW, signal.SIGTERM, step, *settings)
    assert ended.code == 75, ended.err
    assert step in saved(tmp_path / "run")
    assert run_with_faults(ROW, (), *settings).code == 0
    assert_went_the_same_way(tmp_path / "run", undisturbed, since=0)


def test_where_the_newest_is_damaged_the_row_comes_again_and_its_target_is_still_there(tiny, tmp_path, undisturbed):
    settings = (str(tiny), *COMMON, *REWINDS, "--checkpoint.keep_latest", "2")
    with pytest.raises(AssertionError, match="rank 0 died"):
        on_ranks(1, run_with_faults_and_signal, ROW, signal.SIGKILL, 10, *settings, *SAVED_BY_THEN)
    run = tmp_path / "run"
    assert saved(run) == [2, 6, 8]
    next(checkpoint(run, 8).glob("*.distcp")).write_bytes(b"damaged")
    ended = run_with_faults(ROW, (), *settings)
    assert ended.code == 0, ended.err
    assert f"resumed from {checkpoint(run, 6)}" in ended.out
    assert_went_the_same_way(run, undisturbed, since=0)


def test_a_damaged_target_is_named_and_an_older_one_taken(tiny, tmp_path):
    faults = tuple(Fault(step, "nan gradient") for step in (7, 8, 9))
    settings = (str(tiny), *COMMON, *REWINDS)
    assert run_with_faults(faults, (), *settings, "--training.steps", "8").code == 0
    run = tmp_path / "run"
    target = next(checkpoint(run, 4).glob("*.distcp"))
    target.write_bytes(target.read_bytes()[:-1])
    (checkpoint(run, 2) / "train.json").write_text("{}")  # its manifest tells, and it cannot be read besides
    ended = run_with_faults(faults, (), *settings)
    assert ended.code == 1
    assert f"checkpoint skipped: {checkpoint(run, 4)}: {target.name} has " in ended.out
    assert f"checkpoint skipped: {checkpoint(run, 2)}: " in ended.out
    assert "There is no rewind, because no intact checkpoint holds weights from before" in ended.err


def test_each_row_goes_further_back_until_no_rewind_is_left(tiny, tmp_path):
    rows = tuple(Fault(step, "nan loss") for step in (9, 10, 11, 13, 14, 15, 17, 18, 19))
    twice = (*COMMON, *REWINDS, "--training.steps", "22", "--fault_tolerance.max_rewinds", "2")
    ended = run_with_faults(rows, (), str(tiny), *twice)
    assert ended.code == 1
    run = tmp_path / "run"
    first, second = ended.out.index("rewound to"), ended.out.rindex("rewound to")
    assert str(checkpoint(run, 6)) in ended.out[first : first + 200]  # of 8, 10 the weights are those that failed
    assert str(checkpoint(run, 4)) in ended.out[second : second + 200]
    assert "rewind 2 of 2" in ended.out[second : second + 300]
    assert ended.err.startswith("failed: a streak of 3 bad steps, up to step 19 (loss ")
    assert "All 2 rewinds were made. If those are at fault" in ended.err
    assert [entry["step"] for entry in dumped(run, 16)] == [13, 14, 15]
    assert_equal(learnt(checkpoint(run, 19)), learnt(checkpoint(run, 4)))  # 16 was good, and not kept
    ended = run_with_faults(rows, (), str(tiny), *twice)
    assert ended.code == 0, ended.err
    assert metrics(run, "rewinds")[22] == 2


def test_without_older_weights_it_stops_as_ever_and_can_go_on(tiny, tmp_path):
    faults = tuple(Fault(step, "nan gradient") for step in (3, 4, 5))
    ended = run_with_faults(faults, (), str(tiny), *COMMON, *REWINDS)
    assert ended.code == 1
    assert ended.err.startswith("failed: a streak of 3 bad steps, up to step 5 (loss ")
    assert "step 6 is saved" in ended.err
    assert "There is no rewind, because no intact checkpoint holds weights from before those" in ended.err
    ended = run_with_faults(faults, (), str(tiny), *COMMON, *REWINDS)
    assert ended.code == 0, ended.err
    assert metrics(tmp_path / "run", "rewinds") == {}


@pytest.mark.parametrize("last", [7, 8])
def test_there_is_no_rewind_at_the_end_of_a_run(tiny, tmp_path, last):
    """Nothing would be trained any more; whether the row is full in the last step or noticed there."""
    ended = run_with_faults(ROW, (), str(tiny), *COMMON, *REWINDS, "--training.steps", str(last))
    assert ended.code == 1
    assert ended.err.startswith("failed: a streak of 3 bad steps, up to step 7 (loss ")
    assert {t.item() for n, t in learnt(checkpoint(tmp_path / "run", last)).items() if n.endswith(".step")} == {
        float(last - 3)
    }


@pytest.mark.parametrize("ruined", [5, 6])
def test_weights_that_are_no_numbers_are_mended(tiny, tmp_path, ruined):
    """A good step that ruins them, at a save or between two: none is saved, and all until the rewind are bad."""
    run = tmp_path / "run"
    ended = run_with_faults((Fault(ruined, "ruin"),), (), str(tiny), *COMMON, *REWINDS)
    assert ended.code == 0, ended.err
    noticed = ruined + 4
    assert ended.out.count(f"step {ruined + 5} continues with the next batch") == 1
    assert ended.out.count("is not saved: its weights are not finite; a rewind is due") == len(
        [step for step in (6, 8) if ruined <= step < noticed]
    )
    assert not {6, 8} & set(saved(run))
    other = by_hand(tiny, tmp_path / "other", (), 10, 4) if ruined == 6 else None
    if other:
        assert_went_the_same_way(run, other, since=10)
    # Without rewinds, and with all made, it ends as ever.
    for most in ("0", "1"):
        again = (Fault(11, "ruin"), Fault(12, "nan loss")) if most == "1" else (Fault(ruined, "ruin"),)
        folder = str(run) if most == "1" else str(tmp_path / "never")
        shutil.rmtree(checkpoint(run, STEPS), ignore_errors=True)
        ended = run_with_faults(
            again, (), str(tiny), *COMMON, *REWINDS, "--fault_tolerance.max_rewinds", most, "--job.dump_folder", folder
        )
        assert ended.code == 1
        assert "the weights are not finite any more; they are not saved" in ended.err


def test_weights_that_are_no_numbers_without_a_bad_step_are_waited_for_once(tiny, tmp_path, monkeypatch):
    """No row will come of them: at the second save the run ends."""
    monkeypatch.setattr("swamla_titan.train.policies.streaks.are_finite", lambda parts, world: False)
    ended = run_with_faults((), (), str(tiny), *COMMON, *REWINDS)
    assert ended.code == 1
    assert ended.err.startswith("failed: step 4: loss ")
    assert "they are not saved" in ended.err
    assert saved(tmp_path / "run") == []


def test_the_checkpoint_of_another_model_is_no_target(tiny, tmp_path):
    settings = (str(tiny), *COMMON, *REWINDS)
    assert run_with_faults((), (), *settings, "--training.steps", "2", "--model.dim", "32").code == 0
    run, aside = tmp_path / "run", tmp_path / "aside"
    checkpoint(run, 2).rename(aside)
    assert run_with_faults(ROW, (), *settings, "--training.steps", "6").code == 0
    shutil.rmtree(checkpoint(run, 2))
    aside.rename(checkpoint(run, 2))
    ended = run_with_faults(ROW, (), *settings)
    assert ended.code == 1
    assert f"checkpoint skipped: {checkpoint(run, 2)} holds another model" in ended.out
    assert "There is no rewind" in ended.err
