"""A run that is killed and started again equals one that was not, bit for bit."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.train.step import GROUPS
from tests.distributed.job import run_killed
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, snapshot, start, train, wait_for
from tests.train.test_data_faults import opened_then
from tests.waiting import HANG, wait_until


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """By what overrides the configuration, the folder of a run that nothing befell: trained once for all tests."""

    @functools.cache
    def trained(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        tiny_config(folder)
        assert train(folder / "tiny.toml", *overrides) == 0
        return folder / "run"

    return trained


SELECTIVE = ("--model.mla_selective", "true", "--model.selection_head", "1", "--data.document_mask", "true")
ENGRAM = (
    *("--model.engram.layers", "0,2", "--model.engram.heads", "2", "--model.engram.d_mem", "16"),
    *("--model.engram.table_size", "101"),
)


@pytest.mark.parametrize(
    "model",
    [
        (),
        pytest.param(SELECTIVE, marks=pytest.mark.slow, id="selective"),
        pytest.param((*SELECTIVE, *ENGRAM), marks=pytest.mark.slow, id="selective and Engram"),
    ],
)
def test_30_steps_equal_15_a_kill_and_15_bit_for_bit(tiny, tmp_path, undisturbed, model):
    run, whole = tmp_path / "run", undisturbed(*model)
    with pytest.raises(AssertionError, match="rank 0 died"):
        # in the background the checkpoint may be written later than step 18 begins
        on_ranks(1, run_killed, 18, str(tiny), *model, "--checkpoint.async_mode", "disabled")
    assert max(metrics(run)) == 17
    assert train(tiny, *model) == 0
    assert_same_checkpoint(checkpoint(run, 30), checkpoint(whole, 30))
    assert metrics(run) == metrics(whole)
    assert metrics(run, "val_loss") == metrics(whole, "val_loss")
    assert metrics(run, "lr") == metrics(whole, "lr")


@pytest.mark.slow
@pytest.mark.parametrize("legs", [2, 3])
def test_a_second_resume_and_another_number_of_workers_change_nothing(tiny, tmp_path, undisturbed, legs):
    """The builtin corpus in windows of 64 tokens; 5 sequences from 6 streams: cursors stand at different places."""
    run, whole = tmp_path / "run", undisturbed()
    for workers, step in (("2", 7), ("0", 14), ("1", 21))[:legs]:
        process = start(tiny, "--checkpoint.interval", "7", "--data.num_workers", workers)
        wait_for(checkpoint(run, step), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train(tiny, "--checkpoint.interval", "7", "--data.num_workers", "0") == 0
    assert_same_checkpoint(checkpoint(run, 30), checkpoint(whole, 30))


@pytest.mark.gpu
def test_on_a_gpu_compiled_in_bfloat16_a_resumed_run_is_the_same_bit_for_bit(tiny, tmp_path, undisturbed):
    fast = ("--compile.enabled", "true", "--training.compute_dtype", "bfloat16", "--checkpoint.interval", "10")
    run, whole = tmp_path / "run", undisturbed(*fast)
    process = start(tiny, *fast)
    wait_for(checkpoint(run, 10), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not checkpoint(run, 30).exists(), "killed too late"
    assert train(tiny, *fast) == 0
    assert_same_checkpoint(checkpoint(run, 30), checkpoint(whole, 30))
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_ends_with_75_and_the_run_goes_on(tiny, tmp_path, undisturbed, number):
    # Five micro-batches a step: slow enough for the signal to come in time, on a busy machine too.
    slow = ("--training.local_batch_size", "1")
    run, whole = tmp_path / "run", undisturbed(*slow)
    process = start(tiny, *slow)
    wait_for(run / "metrics.jsonl", process)
    wait_until((run / "metrics.jsonl").read_text, lambda: "no step was taken", pause=0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 75, output
    assert f"stopped by {number.name}" in output
    saved = Checkpoints(run / "checkpoints", 0, known=GROUPS).newest_intact()
    assert saved is not None
    assert json.loads((saved / "train.json").read_text())["step"] < 30
    assert train(tiny, *slow) == 0
    assert_same_checkpoint(checkpoint(run, 30), checkpoint(whole, 30))


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path, capsys):
    assert train(tiny, "--training.steps", "3") == 0
    before = {name: content for name, content in snapshot(tmp_path / "run").items() if not name.startswith("logs/")}
    assert train(tiny, "--training.steps", "3") == 0
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in before} == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path, capsys, undisturbed):
    run, whole = tmp_path / "run", undisturbed()
    assert train(tiny) == 0
    victim = next(checkpoint(run, 30).glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert train(tiny) == 0
    output = capsys.readouterr().out
    assert "step-00000030" in output
    assert f"{victim.name} has changed since it was written" in output
    assert_same_checkpoint(checkpoint(run, 30), checkpoint(whole, 30))


@pytest.mark.parametrize("damage", ["cut", "missing file", "no manifest"])
def test_if_every_checkpoint_is_damaged_the_run_is_refused(tiny, tmp_path, capsys, damage):
    assert train(tiny, "--training.steps", "2") == 0
    only = checkpoint(tmp_path / "run", 2)
    data = next(only.glob("*.distcp"))
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "missing file":
        data.unlink()
    else:
        (only / "manifest.json").unlink()
    before = snapshot(tmp_path / "run")
    assert train(tiny) == 2
    assert "no intact checkpoint" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    "overrides, part",
    [
        (("--model.dim", "128"), "model.dim: 64 in the checkpoint, 128 now"),
        (("--training.global_batch_size", "6"), "training.global_batch_size: 5 in the checkpoint, 6 now"),
        (("--job.seed", "1"), "job.seed: 0 in the checkpoint, 1 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tiny, tmp_path, capsys, overrides, part):
    assert train(tiny, "--training.steps", "2") == 0
    before = snapshot(tmp_path / "run")
    assert train(tiny, *overrides) == 2
    error = capsys.readouterr().err
    assert "belongs to another run" in error
    assert part in error
    assert snapshot(tmp_path / "run") == before


def test_a_checkpoint_of_other_data_is_refused(tiny, tmp_path, capsys):
    assert train(tiny, "--training.steps", "2") == 0
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"document {i} " * 200)
    before = snapshot(tmp_path / "run")
    assert train(tiny, "--data.source", "local", "--data.path", str(text)) == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


def test_only_the_newest_k_are_kept_and_a_stranger_s_folder_is_left_alone(tiny, tmp_path):
    mine = tmp_path / "run" / "checkpoints" / "step-00000001"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("not a checkpoint")
    (mine.parent / "step-best").mkdir()
    # The folder has no manifest, so the first start refuses it; named otherwise it is none of our business.
    mine = mine.rename(mine.with_name("step-1"))
    assert train(tiny, "--training.steps", "6", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "2") == 0
    left = sorted(path.name for path in mine.parent.iterdir())
    assert left == ["step-00000004", "step-00000006", "step-1", "step-best"]


def test_a_damaged_checkpoint_never_counts_among_those_kept(tiny, tmp_path):
    run = tmp_path / "run"
    assert train(tiny, "--training.steps", "6", "--checkpoint.interval", "2") == 0
    victim = next(checkpoint(run, 6).glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert train(tiny, "--training.steps", "5", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "1") == 0
    assert checkpoint(run, 5).exists()
    newest = Checkpoints(run / "checkpoints", 1, known=GROUPS).newest_intact()
    assert newest == checkpoint(run, 5)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(tiny, "--training.local_batch_size", "1")
    wait_for(run / "metrics.jsonl", process)
    assert train(tiny) == 2
    assert f"another run writes there (process {process.pid} on" in capsys.readouterr().err
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, output
    assert train(tiny) == 0  # the lock went with its process


def test_a_run_refused_before_it_began_leaves_no_folder(tiny, tmp_path):
    assert train(tiny, "--data.tokenizer", "gtp2") == 2
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_with_a_message_and_the_checkpoint_before(tiny, tmp_path):
    assert train(tiny, "--training.steps", "2") == 0
    # The limit stands in for the disk: it is larger than the small files and smaller than the weights.
    command = f"trap '' XFSZ; ulimit -f 1000; exec {sys.executable} -m swamla_titan train {tiny} --training.steps 4"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith(f"failed: {checkpoint(tmp_path / 'run', 4)} could not be written (")
    assert "GiB are free there" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(tiny, "--training.steps", "4") == 0


def test_a_finished_run_s_configuration_is_not_replaced_by_one_that_trained_nothing(tiny, tmp_path):
    assert train(tiny, "--training.steps", "3") == 0
    before = (tmp_path / "run" / "config.toml").read_text()
    assert train(tiny, "--training.steps", "3", "--optimizer.lr", "0.5") == 0
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_weights_that_are_no_numbers_are_not_saved_when_the_data_turn_out_bad(tiny, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"document {i} " * 40}) for i in range(60)]
    text.write_text("\n".join(lines))
    diverging = ("--optimizer.lr", "1e30", "--training.max_grad_norm", "0", "--lr_schedule.warmup_steps", "0")
    diverging += ("--fault_tolerance.skip_bad_steps", "false")
    source = (
        "--data.source",
        "local",
        "--data.path",
        str(text),
        "--data.streams",
        "1",
        "--data.shuffle_documents",
        "1",
    )
    quiet = ("--metrics.log_interval", "1000", "--validation.interval", "0", "--validation.fraction", "0")
    long = ("--training.steps", "1000", "--checkpoint.interval", "1000")

    def break_a_line(corpus):
        text.write_text("\n".join([*lines[:40], "{" + lines[40][1:-1] + ")", *lines[41:]]))
        return corpus

    with opened_then(break_a_line):
        assert train(tiny, *diverging, *source, *quiet, *long) == 1
    assert "this step is not saved" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
