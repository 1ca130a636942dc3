"""`train --dry-run`: refuses what training would, shows the plan, and writes nothing."""

import fcntl
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from swamla_titan.cli import main
from tests.train.runs import snapshot, train

NO_DATA = ("--data.source", "local", "--data.path", "nowhere")
ALWAYS_FLOAT8 = tuple(
    f"--float8.{each}" for each in ("recipe=tensorwise", "linear_layers=all", "fsdp_all_gather=always")
)


@pytest.fixture
def dry_run(tiny, tmp_path, capsys):
    def run(*arguments: str) -> tuple[int, str]:
        """Exit code, and all that was said; nothing may have been written."""
        capsys.readouterr()
        before = snapshot(tmp_path)
        code = main(["train", str(tiny), "--dry-run", *arguments])
        assert snapshot(tmp_path) == before
        assert not dist.is_initialized()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_run_that_can_begin(dry_run, tmp_path):
    code, said = dry_run()
    assert code == 0
    assert said.startswith("1 rank: one process\n")
    assert "\nmemory of a GPU\n" in said
    assert "60 files, " in said
    assert f"run: {tmp_path / 'run'} begins at step 1" in said
    assert not (tmp_path / "run").exists()


def test_the_number_of_ranks_is_given_or_the_launchers(dry_run, monkeypatch):
    assert dry_run("--gpus", "4")[1].startswith("4 ranks: dp_shard 4\n")
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert dry_run()[1].startswith("1 rank: ")  # left over from some other launcher
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert dry_run()[1].startswith("2 ranks: dp_shard 2\n")
    monkeypatch.setenv("RANK", "1")
    assert dry_run() == (0, "")


def test_a_run_that_goes_on_and_one_that_is_finished(dry_run, tiny, tmp_path):
    assert train(tiny, "--training.steps", "2", "--validation.interval", "0", "--data.num_workers", "0") == 0
    code, said = dry_run("--validation.interval", "0", "--gpus", "2")
    assert (code, f"continues from {tmp_path / 'run/checkpoints/step-00000002'}" in said) == (0, True)
    code, said = dry_run("--validation.interval", "0", "--training.steps", "2", "--lr_schedule.warmup_steps", "1")
    assert (code, "has taken all 2 steps" in said) == (0, True)
    code, said = dry_run("--model.dim", "96")
    assert (code, "belongs to another run" in said, "model.dim" in said) == (2, True, True)
    code, said = dry_run("--data.streams", "4")
    assert code == 2
    assert "streams" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--training.seq_len", "0"), "[training] seq_len = 0"),
        (("--gpus", "6", "--parallel.dp_shard", "4"), "do not fit 6 processes"),
        (("--gpus", "-1"), "--gpus -1: expected a number from 1"),
        (("--data.source", "local", "--data.path", "nowhere"), "nowhere"),
        (("--data.tokenizer", "bite"), 'there is no tokenizer "bite"'),
        (("--gpus", "4", "--parallel.pipeline", "4"), "more than the 3 layers"),
        ((*ALWAYS_FLOAT8, "--gpus", "1"), "every rank has full weights"),
        ((*ALWAYS_FLOAT8, "--gpus", "3"), "3 ranks cannot share the "),
        ((*ALWAYS_FLOAT8, "--gpus", "3", *NO_DATA), "3 ranks cannot share the "),  # before data is opened
        (("--float8.recipe", "native", *NO_DATA), "would convert none of "),
    ],
)
def test_wrong_input_is_refused(dry_run, arguments, message):
    code, said = dry_run(*arguments)
    assert code == 2
    assert message in said


def test_a_dump_folder_that_cannot_be_used_is_refused(dry_run, tmp_path):
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = dry_run("--job.dump_folder", str(folder))
        assert (code, "cannot be written" in said) == (2, True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder belongs")
    code, said = dry_run()
    assert (code, "cannot be written" in said) == (2, True)


def test_a_dump_folder_where_another_run_writes_is_refused(dry_run, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        lock.write("process 7 on a machine")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = dry_run()
        assert (code, "another run writes there (process 7 on a machine)" in said) == (2, True)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert dry_run()[0] == 0


@pytest.mark.parametrize("kept_from_it", ["locked", "a file", "cache", "checkpoints"])
def test_of_several_faults_it_reports_the_one_that_training_does(dry_run, tiny, tmp_path, capsys, kept_from_it):
    overrides = ["--float8.recipe", "native"]  # which would convert none
    (tmp_path / "run").mkdir()
    lock = (tmp_path / "run" / ".lock").open("w")
    if kept_from_it == "locked":
        fcntl.flock(lock, fcntl.LOCK_EX)
    elif kept_from_it == "a file":
        overrides += ["--job.dump_folder", str(tiny / "run")]
    elif kept_from_it == "cache":
        overrides += ["--compile.enabled", "true", "--compile.cache_folder", str(tiny / "cache")]
    else:
        (tmp_path / "run" / "checkpoints").touch()
    code, said = dry_run(*overrides)
    assert code == main(["train", str(tiny), *overrides]) == 2
    # What is said in brackets depends on how it was found: by looking, or by trying.
    assert said.partition("(")[0] == capsys.readouterr().err.partition("(")[0]
    assert ("would convert none" in said) == (kept_from_it == "checkpoints")
    lock.close()


def test_a_cache_folder_that_cannot_be_made_is_refused(dry_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    compiled = ("--compile.enabled", "true")
    code, said = dry_run(*compiled, "--compile.cache_folder", str(tmp_path / "file" / "cache"))
    assert (code, "compile.cache_folder" in said) == (2, True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    code, said = dry_run(*compiled)
    assert (code, "TORCHINDUCTOR_CACHE_DIR" in said) == (2, True)
    assert dry_run()[0] == 0
    assert dry_run(*compiled, "--compile.cache_folder", str(tmp_path / "cache"))[0] == 0
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_refused(dry_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, said = dry_run("--metrics.wandb", "true")
    assert (code, "metrics.wandb = true needs the package" in said) == (2, True)


def test_gpus_without_dry_run_is_refused(tiny, tmp_path, capsys):
    assert main(["train", str(tiny), "--gpus", "2"]) == 2
    assert "--gpus is for --dry-run" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
