"""Files and folders whose names are no UTF-8 or would drive a terminal, and a run that nobody can hear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import load_config
from tests.train.runs import checkpoint, metrics, train

FAST = ("--training.steps", "2", "--validation.interval", "0", "--metrics.tensorboard", "true")
FOLDER = "漢"  # others than text are refused as values of keys
STRANGE, ESCAPED = os.fsdecode(b"\xff\n\x1b[31m") + "漢", "\\udcff\\n\\x1b[31m漢"


def test_names_are_told_escaped_and_written_as_utf8(tiny, tmp_path, capsys):
    data, run = tmp_path / f"data{FOLDER}", tmp_path / f"run{FOLDER}"
    data.mkdir()
    for number in range(3):
        (data / f"{number}{STRANGE}.txt").write_text("some text to train on. " * 200)
    good, bad = ('{"text": "good"}\n' * 40), "{no json\n"
    (data / f"bad{STRANGE}.jsonl").write_text(good + bad)
    of_data = ("--data.source", "local", "--data.path", str(data), "--data.num_workers", "0", "--data.streams", "5")
    of_run = ("--job.dump_folder", str(run))

    assert main(["check", str(tiny), *FAST, *of_data, *of_run]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert train(tiny, *FAST, *of_data, *of_run) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/data{FOLDER}/bad{ESCAPED}.jsonl, line 41: not valid JSON")
    assert error.count("\n") == 1

    assert train(tiny, *FAST, *of_data, *of_run, "--data.on_error", "skip_file") == 0
    out = capsys.readouterr().out
    log = (run / "logs" / "rank-0.log").read_text(encoding="utf-8")
    for text in (out, log):
        assert "\x1b" not in text
        assert f"checkpoint {tmp_path}/run{FOLDER}/checkpoints/step-00000002" in text
    assert sorted(metrics(run)) == [1, 2]
    assert load_config(run / "config.toml").job.dump_folder == str(run)
    if (run / "skipped_files.json").exists():
        entries = json.loads((run / "skipped_files.json").read_text(encoding="utf-8"))
        assert {entry["file"] for entry in entries} == {f"bad{STRANGE}.jsonl"}
    prompt = os.fsdecode(b"\xff") + "漢"
    assert main(["generate", str(checkpoint(run, 2)), "--prompt", prompt, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("\\udcff漢")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", pytest.param(">/dev/full 2>&1", marks=pytest.mark.slow)])
def test_a_run_that_nobody_can_hear_is_done(tiny, tmp_path, streams):
    """With a loader process, to which the streams are passed on."""
    command = f'unset PYTHONUNBUFFERED; exec "$0" -m swamla_titan train "$@" {streams}'
    arguments = [sys.executable, str(tiny), *FAST[:4]]
    done = subprocess.run(["bash", "-c", command, *arguments], env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    run = tmp_path / "run"
    assert sorted(metrics(run)) == [1, 2]
    assert all("loss" in json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert "done; let it write" in (run / "logs" / "rank-0.log").read_text()
    assert stray(run) == set()


def stray(run: Path) -> set[str]:
    """Files that hold lines of the console although they are no logs."""
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {path.name for path in files if b"let it write" in path.read_bytes()}
