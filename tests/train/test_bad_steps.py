"""Bad steps: what is judged bad, that it changes nothing, that the host does not wait, and when the run ends."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from swamla_titan.config.schedule import Position, Schedule
from swamla_titan.config.sections import Config, FaultTolerance, Float8, Training
from swamla_titan.data import SequenceOrder
from swamla_titan.data.mixture import Piece
from swamla_titan.train.bad_steps import BadStep, BadSteps
from swamla_titan.train.policies.streaks import remedies, warning, write_bad_batches
from swamla_titan.train.step import TrainStep
from tests.train.faults import Fault, run_with_faults
from tests.train.runs import checkpoint, metrics, tensors, train

CPU = torch.device("cpu")
SHORT = (
    *("--data.num_workers", "0", "--validation.interval", "0", "--lr_schedule.warmup_steps", "0"),
    *("--training.steps", "6", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0"),
)


def judged(policy: BadSteps, norms: list[float], first: int = 1) -> list[bool]:
    """The verdicts on steps of these gradient norms."""
    scalars = [torch.tensor(norm) for norm in norms]
    return [bool(policy.judge(step, torch.tensor(2.0), norm)) for step, norm in enumerate(scalars, first)]


def learnt(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that training moves: weights, moments, step counts."""
    found = {name: t for name, t in tensors(path).items() if name.startswith(("model.", "optimizer."))}
    assert any(name.endswith(".exp_avg_sq") for name in found)
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def history(path: Path) -> dict[str, list]:
    """The bad steps of a checkpoint, every number as text: NaN equals itself there."""
    return {n: str(t.tolist()) for n, t in tensors(path).items() if n.startswith("bad_steps.")}


def dumped(folder: Path, step: int) -> list[dict]:
    return json.loads((folder / "traces" / f"bad-steps-{step}.json").read_text())


# the rule


@pytest.mark.parametrize("loss", [2.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [2.0, math.nan, math.inf])
def test_what_is_not_finite_is_bad(loss, norm):
    policy = BadSteps(FaultTolerance(), CPU)
    flag = policy.judge(1, torch.tensor(loss), torch.tensor(norm))
    assert (flag.dtype, flag.shape) == (torch.float32, ())
    assert flag.item() == (not (math.isfinite(loss) and math.isfinite(norm)))


def test_a_spike_is_beyond_the_mean_by_so_many_deviations_of_the_last_good_steps():
    """Of 1, 3, 1, 3 the mean is 2 and the deviation 1: with 3 sigma the limit is 5."""
    config = FaultTolerance(spike_sigma=3.0, spike_window=4)
    for norm, is_bad in ((4.999, False), (5.001, True)):
        policy = BadSteps(config, CPU)
        assert judged(policy, [1, 3, 1, 3, norm]) == [False] * 4 + [is_bad]
    # The window: a bad norm is not in it, the good one moves it on to 3, 1, 3, 4: 2.75 + 3 * 1.0897 = 6.019.
    policy = BadSteps(config, CPU)
    assert judged(policy, [1, 3, 1, 3, 1e6, 5.5, math.nan, 4, 6.01]) == [False] * 4 + [True] * 3 + [False] * 2
    policy = BadSteps(config, CPU)
    assert judged(policy, [1, 3, 1, 3, 4, 6.03]) == [False] * 5 + [True]
    [bad] = policy.read()
    assert bad.step == 6
    assert bad.limit == pytest.approx(2.75 + 3 * math.sqrt(1.1875), rel=1e-12)


def test_nothing_is_a_spike_before_the_window_is_full_nor_without_sigma():
    policy = BadSteps(FaultTolerance(spike_sigma=1.0, spike_window=4), CPU)
    assert judged(policy, [1, 1, math.nan, 1e9, 1e9, 1e30]) == [False, False, True, False, False, True]
    policy = BadSteps(FaultTolerance(spike_sigma=0.0, spike_window=4), CPU)
    assert judged(policy, [1] * 8 + [1e30]) == [False] * 9


def test_counts_and_rows():
    policy = BadSteps(FaultTolerance(), CPU)
    judged(policy, [math.nan, 1, math.nan, math.inf, 1])
    assert [bad.step for bad in policy.read()] == [1, 3, 4]
    assert (policy.skipped, policy.streak) == (3, 0)
    judged(policy, [math.nan, math.nan], first=6)
    assert [bad.step for bad in policy.newest_streak()] == [6, 7]
    assert [bad.step for bad in policy.read()] == [6, 7]
    assert policy.read() == []
    assert (policy.skipped, policy.streak) == (5, 2)


def test_the_step_that_made_the_weights_is_the_last_good_one_or_that_of_the_checkpoint():
    policy = BadSteps(FaultTolerance(max_bad_steps=2), CPU)
    made = []
    for step, norm in enumerate([math.nan, 1, 1, math.nan, 1, math.nan, math.nan, 1], 1):
        judged(policy, [norm], first=step)
        policy.read()
        made.append(policy.trained)
        assert policy.too_many(step) == (step == 8)
    assert made == [0, 2, 3, 3, 5, 5, 5, 8]
    assert policy.trained_before_streak == 5  # of the row, not of the good step in which it was noticed
    policy.rewound(8, 3, policy.empty_window())
    policy.read()
    assert (policy.trained, policy.rewinds, policy.streak, policy.skipped) == (3, 1, 0, 4)
    judged(policy, [math.nan] * 2, first=9)
    assert [bad.step for bad in policy.newest_streak()] == [9, 10]
    # Without a history, as of a run that had no policy, every step has trained.
    other = BadSteps(FaultTolerance(), CPU)
    other.loaded(other.state_dict(), 7)
    assert other.trained == 7


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("pattern", ["", "x", "xx.xxx", "....xx.xxxx.x", "x.x.x.xx"])
def test_a_row_is_noticed_one_step_late_and_never_without_one(most, pattern):
    """After good and bad steps in any order, the row that is too long is seen at the end of the step after it."""
    verdicts = [mark == "x" for mark in pattern] + [True] * most + [False] * 3
    row, expected = 0, None
    policy = BadSteps(FaultTolerance(max_bad_steps=most), CPU)
    for step, bad in enumerate(verdicts, 1):
        judged(policy, [math.nan if bad else 1.0], first=step)
        row = row + 1 if bad else 0
        assert policy.too_many(step) == (expected == step)
        if expected == step:
            return
        if row == most:
            expected = step + 1
    pytest.fail("never noticed")


def test_a_resumed_policy_judges_on_as_if_nothing_had_happened():
    config = FaultTolerance(spike_sigma=2.0, spike_window=4, max_bad_steps=3)
    norms = [1, 2, 1, 2, 9, 1.5, 1, 8, 1, 2, 7, math.nan, 9, 1]
    whole = BadSteps(config, CPU)
    expected = [(judged(whole, [norm], step), whole.too_many(step)) for step, norm in enumerate(norms, 1)]
    assert expected[-1][1]
    for cut in range(1, len(norms)):
        first, second = BadSteps(config, CPU), BadSteps(config, CPU)
        found = [(judged(first, [n], step), first.too_many(step)) for step, n in enumerate(norms[:cut], 1)]
        for name, tensor in second.state_dict().items():
            tensor.copy_(first.state_dict()[name])
        second.loaded(second.state_dict(), cut)
        rest = enumerate(norms[cut:], cut + 1)
        found += [(judged(second, [n], step), second.too_many(step)) for step, n in rest]
        assert found == expected, cut
        assert [str(t.tolist()) for t in second.state_dict().values()] == [
            str(t.tolist()) for t in whole.state_dict().values()
        ]


def test_the_host_cannot_wait_for_a_judgement():
    """Tensors of the device "meta" have no values: whatever needed one on the host would raise."""
    meta = torch.device("meta")
    policy = BadSteps(FaultTolerance(spike_sigma=6.0), meta)
    flag = policy.judge(3, torch.empty((), device=meta), torch.empty((), device=meta))
    assert (flag.device, flag.dtype, flag.shape) == (meta, torch.float32, ())
    with pytest.raises(RuntimeError):
        flag.item()


def test_the_warning_names_steps_and_the_limit_of_spikes_and_no_endless_list():
    bad = [BadStep(7, math.nan, math.nan, 5.0), BadStep(9, 2.5, 93.127, 5.0), BadStep(10, 2.5, math.inf, 5.0)]
    assert warning(bad, 12) == (
        "skipped as bad, changing nothing: steps 7 (loss nan, gradient norm nan), 9 (loss 2.5, gradient norm 93.13 > 5)"
        ", 10 (loss 2.5, gradient norm inf); 12 in all"
    )
    assert warning(bad[:1], 1).endswith("step 7 (loss nan, gradient norm nan); 1 in all")
    assert " and 12 more; 99 in all" in warning([bad[0]] * 20, 99)


@pytest.mark.parametrize(
    "config, parts",
    [
        (Config(), ["lr_schedule.warmup_steps", "clip gradients more (training.max_grad_norm is 1)"]),
        (Config(training=Training(max_grad_norm=0.0)), ["training.max_grad_norm is 0: 1.0 is usual"]),
        (Config(float8=Float8("tensorwise")), ['float8.recipe = "off" to see whether "tensorwise" is at fault']),
        (
            Config(float8=Float8("native", fast_accumulation=True, output_head=True)),
            ['"off", or float8.fast_accumulation and float8.output_head = false, to see whether "native"'],
        ),
    ],
)
def test_what_to_try_names_clipping_and_the_recipe_in_use(config, parts):
    found = remedies(config)
    assert all(part in found for part in parts), found
    assert ("float8" in found) == (config.float8.recipe != "off")


@pytest.mark.parametrize("skips", [True, False])
def test_messages_of_runs_name_them(tiny, skips):
    recipe = ("--float8.recipe", "native", "--float8.linear_layers", "all", "--metrics.log_interval", "1")
    policy = ("--fault_tolerance.max_bad_steps", "2") if skips else ("--fault_tolerance.skip_bad_steps", "false")
    faults = (Fault(3, "nan gradient"), Fault(4, "nan loss"))
    ended = run_with_faults(faults, (), str(tiny), *SHORT, *recipe, *policy)
    assert ended.code == 1
    assert ended.err.startswith("failed: a streak of 2 bad steps" if skips else "failed: step 3: loss ")
    for text in (ended.err, ended.out.partition("skipped as bad")[2]) if skips else (ended.err,):
        assert "training.max_grad_norm is 1" in text
        assert 'whether "native" is at fault' in text


def test_the_dump_is_json_by_the_letter_and_names_sequences_and_streams(tmp_path):
    path = tmp_path / "traces" / "bad.json"
    steps = [BadStep(2, math.nan, math.inf, math.inf), BadStep(3, 2.0, 9.0, 4.0)]
    config = Config(training=Training(global_batch_size=3))
    order = SequenceOrder(5)
    write_bad_batches(path, steps, Schedule.of(config), order, {(3, stream): {"unit": stream} for stream in range(5)})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == [
        {"step": 2, "loss": "nan", "grad_norm": "inf", "first_sequence": 3, "last_sequence": 5, "streams": 5},
        {
            **{"step": 3, "loss": 2.0, "grad_norm": 9.0, "limit": 4.0},
            **{"first_sequence": 6, "last_sequence": 8, "streams": 5},
            "cursors": {"1": {"unit": 1}, "2": {"unit": 2}, "3": {"unit": 3}},
        },
    ]
    resized = Schedule.of(config, Position(5, 5 * 2048, 19))
    write_bad_batches(path, steps[1:], resized, order, {})  # the batch was of another size before
    assert (json.loads(path.read_text())[0]["first_sequence"], steps[1].step) == (10, 3)
    mixed = SequenceOrder(5, ["a", "b"], [Piece(0, {"a": 0.5, "b": 0.5})])
    write_bad_batches(path, steps[1:], Schedule.of(config), mixed, {(3, key): {"unit": key} for key in range(10)})
    [entry] = json.loads(path.read_text())
    assert entry["sources"] == ["a", "b"]
    assert list(entry["cursors"]) == [str(key) for key in sorted(mixed.cursor_keys(np.arange(6, 9)))]


# whole runs


@pytest.mark.parametrize("kind", ["nan gradient", "inf gradient", "nan loss", "nan batch", "spike"])
def test_a_bad_step_changes_nothing_and_training_goes_on_as_if_it_had_not_been_applied(tiny, tmp_path, kind):
    policy = ("--fault_tolerance.spike_sigma", "50", "--fault_tolerance.spike_window", "2")
    ended = run_with_faults((Fault(3, kind),), (), str(tiny), *SHORT, *policy)
    assert ended.code == 0, ended.err
    run, other = tmp_path / "run", tmp_path / "other"
    before, after = learnt(checkpoint(run, 2)), learnt(checkpoint(run, 3))
    assert_equal(before, after)
    assert {t.item() for n, t in after.items() if n.endswith(".step")} == {2.0}
    assert metrics(run, "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert ended.out.count("skipped as bad, changing nothing: step 3 (loss ") == 1
    assert "; 1 in all" in ended.out
    # The schedule is a function of the step, whatever was skipped.
    reference = run_with_faults((), (3,), str(tiny), *SHORT, "--job.dump_folder", str(other))
    assert reference.code == 0, reference.err
    assert metrics(run, "lr") == metrics(other, "lr")
    assert_equal(learnt(checkpoint(run, 6)), learnt(checkpoint(other, 6)))
    losses = metrics(run), metrics(other)
    assert [losses[0][step] for step in (4, 5, 6)] == [losses[1][step] for step in (4, 5, 6)]


@pytest.mark.parametrize("interval", ["1", "100"])
def test_too_many_in_a_row_are_saved_listed_and_end_the_run_which_can_go_on(tiny, tmp_path, interval):
    run = tmp_path / "run"
    most = ("--fault_tolerance.max_bad_steps", "3", "--metrics.log_interval", interval, "--checkpoint.interval", "100")
    faults = (Fault(2, "nan loss"), *(Fault(step, "nan gradient") for step in (4, 5, 6, 7)))
    settings = (*SHORT, *most, "--training.steps", "12")
    ended = run_with_faults(faults, (), str(tiny), *settings)
    assert ended.code == 1
    stopped = 6 if interval == "1" else 7  # at once where it is logged, else a step later
    assert ended.err.startswith(f"failed: a streak of {stopped - 3} bad steps, up to step {stopped} (loss ")
    dump = dumped(run, stopped)
    assert [entry["step"] for entry in dump] == list(range(4, stopped + 1))
    for entry in dump:
        assert (entry["first_sequence"], entry["last_sequence"]) == (5 * entry["step"] - 5, 5 * entry["step"] - 1)
        assert entry["grad_norm"] == "nan"
        assert math.isfinite(entry["loss"])
    # A stream's cursor before a batch says how many sequences it had given: all numbers below that are its own.
    for entry in dump[-3:]:
        read = {number % 6 for number in range(entry["first_sequence"], entry["last_sequence"] + 1)}
        assert entry["cursors"].keys() == {str(stream) for stream in read}
        for stream, cursor in entry["cursors"].items():
            assert cursor["sequences"] == len(range(int(stream), entry["first_sequence"], 6))
    assert metrics(run, "skipped_steps")[stopped] == 1 + stopped - 3
    # Saved, and the same command goes on behind the bad batches, with a new row.
    assert {t.item() for n, t in learnt(checkpoint(run, stopped)).items() if n.endswith(".step")} == {2.0}
    ended = run_with_faults((), (), str(tiny), *settings)
    assert ended.code == 0, ended.err
    assert metrics(run, "skipped_steps")[12] == 1 + stopped - 3
    whole = str(tmp_path / "whole")
    unapplied = (2, *range(4, stopped + 1))
    assert run_with_faults((), unapplied, str(tiny), *settings, "--job.dump_folder", whole).code == 0
    assert_equal(learnt(checkpoint(run, 12)), learnt(checkpoint(tmp_path / "whole", 12)))


def test_a_resumed_run_keeps_the_history_and_decides_alike_bit_for_bit(tiny, tmp_path):
    """Cut in the middle of a row of bad steps, and with a window that spans the cut."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    policy = ("--fault_tolerance.spike_sigma", "20", "--fault_tolerance.spike_window", "3")
    settings = (*SHORT, *policy, "--training.steps", "9", "--fault_tolerance.max_bad_steps", "3")
    faults = (Fault(2, "nan batch"), Fault(5, "spike"), Fault(6, "nan gradient"), Fault(8, "spike"))
    for folder in (run, whole):
        assert run_with_faults(faults, (), str(tiny), *settings, "--job.dump_folder", str(folder)).code == 0
    for cut in (7, 5, 3):
        for step in range(cut + 1, 10):
            (checkpoint(run, step) / "manifest.json").unlink()  # as a kill would leave them
        assert run_with_faults(faults, (), str(tiny), *settings).code == 0
        assert history(checkpoint(run, 9)) == history(checkpoint(whole, 9))
        assert_equal(learnt(checkpoint(run, 9)), learnt(checkpoint(whole, 9)))
    assert metrics(run, "skipped_steps") == metrics(whole, "skipped_steps")
    assert metrics(run, "skipped_steps")[9] == 4


def test_a_checkpoint_without_history_or_with_another_window_loads(tiny, tmp_path):
    run = tmp_path / "run"
    assert train(tiny, *SHORT, "--training.steps", "2", "--fault_tolerance.skip_bad_steps", "false") == 0
    assert history(checkpoint(run, 2)) == {}
    assert "skipped_steps" not in (run / "metrics.jsonl").read_text()
    nan = (Fault(3, "nan loss"),)
    assert run_with_faults(nan, (), str(tiny), *SHORT, "--training.steps", "4").code == 0
    assert metrics(run, "skipped_steps")[4] == 1
    other = ("--fault_tolerance.spike_window", "7", "--fault_tolerance.spike_sigma", "1e6")
    other = (*other, "--fault_tolerance.max_bad_steps", "90")
    assert train(tiny, *SHORT, *other, "--training.steps", "6") == 0
    assert metrics(run, "skipped_steps")[6] == 1  # the counts are still there
    norms = tensors(checkpoint(run, 6))["bad_steps.norms"].tolist()
    assert norms == pytest.approx([-1.0] * 5 + [metrics(run, "grad_norm")[step] for step in (5, 6)])


def test_a_step_does_not_wait_for_the_device(tiny, monkeypatch):
    """Whatever brings a value to the host raises while a step is computed, also a bad one."""
    steps, inside = [], False
    original = TrainStep.__call__

    def train_step(self, batch, number):
        nonlocal inside
        inside = True
        try:
            return original(self, batch, number)
        finally:
            inside = False
            steps.append(number)

    def forbid(name):
        allowed = getattr(Tensor, name)

        def called(*arguments, **options):
            on_the_way = inside and threading.current_thread() is threading.main_thread()  # not a checkpoint's
            assert not on_the_way, f"Tensor.{name} waits for the device"
            return allowed(*arguments, **options)

        monkeypatch.setattr(Tensor, name, called)

    monkeypatch.setattr(TrainStep, "__call__", train_step)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        forbid(name)
    spikes = ("--fault_tolerance.spike_sigma", "5", "--fault_tolerance.spike_window", "2")
    ended = run_with_faults((Fault(4, "nan loss"), Fault(5, "spike")), (), str(tiny), *SHORT, *spikes)
    assert ended.code == 0, ended.err
    assert steps == list(range(1, 7))


@pytest.mark.parametrize("interval", ["1", "100"])
def test_weights_that_are_no_numbers_themselves_are_not_saved(tiny, tmp_path, interval):
    """Gradients of the first step are numbers, and the step so large that the weights are none after it."""
    settings = (*SHORT, "--optimizer.lr", "1e30", "--optimizer.weight_decay", "1e10", "--checkpoint.interval", interval)
    ended = run_with_faults((), (), str(tiny), *settings)
    assert ended.code == 1
    step = 1 if interval == "1" else 2  # before saving, or when the next one turns out bad
    assert ended.err.startswith(f"failed: step {step}: loss ")
    assert "the weights are not finite any more; they are not saved" in ended.err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_without_the_policy_the_run_fails_at_the_first_and_nothing_is_saved(tiny, tmp_path):
    off = ("--fault_tolerance.skip_bad_steps", "false")
    ended = run_with_faults((Fault(3, "nan gradient"),), (), str(tiny), *SHORT, *off)
    assert ended.code == 1
    assert ended.err.startswith("failed: step 3: loss ")
    assert "this step is not saved" in ended.err
    assert not checkpoint(tmp_path / "run", 3).exists()
    assert checkpoint(tmp_path / "run", 2).exists()
