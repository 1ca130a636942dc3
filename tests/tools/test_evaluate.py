"""`evaluate` on a real checkpoint: loss on text equals validation's, and tasks get what the model says."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from swamla_titan.cli import main
from swamla_titan.model.generation import generate
from swamla_titan.system.written_aside import written_aside
from swamla_titan.tools.generate import load_model
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.harness_stub import PROMPTS, TEXTS, WRITTEN, stub
from tests.train.runs import checkpoint, metrics, train

QUICK = (
    *("--data.num_workers", "0", "--lr_schedule.warmup_steps", "0", "--training.steps", "3", "--optimizer.lr", "0.01"),
    *("--validation.interval", "3", "--validation.max_tokens", "1000000", "--ema.decay", "0.9"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a finished run, beside `held-out`, the text that it was validated on."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder)
    (folder / "held-out").mkdir()
    for number in range(3):
        (folder / "held-out" / f"{number}.txt").write_text(f"Text number {number} is one more. " * (3 + number))
    assert train(config, *QUICK, "--validation.path", str(folder / "held-out")) == 0
    return folder / "run"


@pytest.fixture
def evaluate(run: Path, tmp_path: Path):
    def results(*arguments: str) -> dict:
        """What the command writes to its file."""
        output = tmp_path / "results.json"
        assert main(["evaluate", str(run), "--output", str(output), *arguments]) == 0
        return json.loads(output.read_text())

    return results


@pytest.fixture
def refusal(run: Path, capsys: pytest.CaptureFixture[str]):
    def message(*arguments: str) -> str:
        """The one message of a command that is refused; it prints nothing else."""
        capsys.readouterr()
        assert main(["evaluate", str(run), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("error: ") == 1
        return captured.err

    return message


def test_the_loss_on_text_is_that_of_validation(run, evaluate, capsys):
    text = str(run.parent / "held-out")
    found = evaluate("--text", text)
    values = found["text"][text]
    assert values["loss"] == pytest.approx(metrics(run, "val_loss")[3], 1e-6)
    assert values["bits_per_byte"] == pytest.approx(metrics(run, "val_bits_per_byte")[3], 1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    size = sum(path.stat().st_size for path in Path(text).iterdir())
    assert values["bytes"] == size - 1  # the first one is not predicted
    assert values["tokens"] == size - 1 + 3  # and each end of text is
    assert (found["step"], found["ema"], found["dtype"]) == (3, False, "float32")
    assert f"{text}/bits_per_byte" in capsys.readouterr().out


def test_a_limit_counts_documents(run, evaluate):
    text = str(run.parent / "held-out")
    first = (Path(text) / "0.txt").stat().st_size
    assert evaluate("--text", text, "--limit", "1")["text"][text]["tokens"] == first


def test_the_average_and_other_dtypes_are_evaluated(run, evaluate):
    text = str(run.parent / "held-out")
    losses = {
        arguments: evaluate("--text", text, *arguments)["text"][text]["loss"]
        for arguments in ((), ("--ema",), ("--dtype", "bfloat16"))
    }
    assert losses[("--ema",)] > losses[()] + 0.01  # the weights have moved on from it
    assert losses[()] != losses["--dtype", "bfloat16"] == pytest.approx(losses[()], rel=0.02)


def test_tasks_are_scored_by_the_model(run, evaluate):
    with stub():
        found = evaluate("--tasks", "mean")["tasks"]
    model, total = load_model(checkpoint(run, 3), ema=False).model, 0.0
    for context, text in TEXTS:
        tokens = [*(context.encode() or [256]), *text.encode()]
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-65:][:-1]]))[0].log_softmax(dim=-1)
        total += sum(logits[-place, tokens[-place]].item() for place in range(1, len(text) + 1))
    assert found == pytest.approx({"mean/mean": total / 3, "mean/count": 3}, 1e-5)


def test_tasks_may_generate(run, evaluate):
    with stub():
        assert evaluate("--tasks", "writes")["tasks"] == {"writes/count": 3}
    model = load_model(checkpoint(run, 3), ema=False).model
    for (prompt, options), text in zip(PROMPTS, WRITTEN, strict=True):
        [expected] = generate(model, [list(prompt.encode())], options["max_gen_toks"], temperature=0, stop_token=256)
        assert text == bytes(expected).decode(errors="replace")


def write_half(path: Path) -> None:
    with written_aside(path) as file:
        file.write("half of it")
        raise OSError("no room")


def test_what_cannot_be_evaluated_is_refused(run, refusal, tmp_path, monkeypatch):
    assert "nothing to evaluate" in refusal()
    assert "--limit -1" in refusal("--text", "x", "--limit", "-1")
    assert "--text" in refusal("--text", str(tmp_path / "none"))
    (tmp_path / "empty.txt").touch()
    assert "--text" in refusal("--text", str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("a")
    assert "no byte of it is predicted" in refusal("--text", str(tmp_path / "short.txt"))
    assert "cannot be written" in refusal("--text", "x", "--output", str(tmp_path / "none" / "file.json"))
    os.mkfifo(tmp_path / "pipe")
    for output in ("", "/", str(tmp_path), str(tmp_path / "pipe")):
        assert "is no file" in refusal("--text", str(tmp_path / "none"), "--output", output)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "kept.json").write_text("kept")
    with pytest.raises(OSError, match="no room"):
        write_half(tmp_path / "kept.json")
    assert "--text" in refusal("--text", str(tmp_path / "none"), "--output", str(tmp_path / "kept.json"))
    assert (tmp_path / "kept.json").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "kept.json", "pipe", "short.txt"]
    with stub():
        assert "has no task 'meen'; did you mean mean?" in refusal("--tasks", "meen")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "pip install 'swamla-titan[eval]'" in refusal("--tasks", "mean")


def evaluated(run: str, output: str, text: str) -> int:
    with stub():
        return main(["evaluate", run, "--text", text, "--tasks", "mean", "--output", output])


@pytest.mark.slow
def test_ranks_share_the_work(run, tmp_path):
    text = str(run.parent / "held-out")
    results = []
    for ranks in (1, 3):
        output = tmp_path / f"{ranks}.json"
        assert on_ranks(ranks, evaluated, str(run), str(output), text) == [0] * ranks
        results.append(json.loads(output.read_text()))
    one, three = results
    assert three["text"][text] == pytest.approx(one["text"][text])
    assert three["tasks"] == pytest.approx(one["tasks"])
