"""A run of a mixture resumes exactly, and with checkpoint.allow = "data" continues with other sources and weights."""

import json
from pathlib import Path

import pytest
import torch

from swamla_titan.checkpoint.records import read_train_state
from tests.train.runs import checkpoint, metrics, tensors, train

SEQ_LEN, SIZE, STREAMS = 64, 5, 3
SHORT = (
    *("--data.num_workers", "0", "--data.streams", str(STREAMS), "--training.local_batch_size", "5"),
    *("--validation.interval", "0", "--validation.fraction", "0", "--model.num_layers", "1"),
    # The learning rate does not depend on the number of steps.
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--model.dropout", "0"),
    *("--metrics.batch_digests", "true", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0"),
)
ALLOW = ("--checkpoint.allow", "data")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for number, letter in enumerate("abcd"):
        (folder / letter).mkdir(parents=True)
        texts = [f"{letter}{each:03}".ljust(80, letter) for each in range(40 + number)]
        (folder / letter / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def mixed(corpus: Path, steps: int, weights: dict[str, float], **paths: str) -> tuple[str, ...]:
    tables = ", ".join(
        f'{{name = "{name}", path = "{corpus / paths.get(name, name)}", weight = {weight}}}'
        for name, weight in weights.items()
    )
    return (*SHORT, "--data.path", "", "--data.sources", f"[{tables}]", "--training.steps", str(steps))


def digests(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "batch_digests.jsonl").read_text().splitlines()]
    return {line["step"]: line["digest"] for line in lines}


def source_tokens(folder: Path, step: int) -> dict[str, int]:
    return read_train_state(checkpoint(folder, step)).source_tokens


def in_folder(folder: Path) -> tuple[str, str]:
    return ("--job.dump_folder", str(folder))


def test_a_mixture_resumes_twice_bit_for_bit(tiny, tmp_path, corpus):
    weights = {"b": 0.25, "a": 0.75}
    whole, parts = in_folder(tmp_path / "whole"), in_folder(tmp_path / "run")
    assert train(tiny, *mixed(corpus, 9, weights), *whole) == 0
    for steps in (3, 7, 9):
        assert train(tiny, *mixed(corpus, steps, dict(sorted(weights.items()))), *parts) == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    one, other = tensors(checkpoint(tmp_path / "whole", 9)), tensors(checkpoint(tmp_path / "run", 9))
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("model."))
    for name in ("tokens", "tokens/a", "tokens/b", "epochs/a", "loss/a"):
        assert metrics(tmp_path / "run", name)[9] == metrics(tmp_path / "whole", name)[9]
    assert source_tokens(tmp_path / "run", 9) == {"a": 34 * SEQ_LEN, "b": 11 * SEQ_LEN}
    # The checkpoint's own configuration trains on in the same order.
    again = checkpoint(tmp_path / "run", 9) / "config.toml"
    assert train(again, "--training.steps", "10") == 0
    assert train(tiny, *mixed(corpus, 10, weights), *whole) == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_other_weights_are_refused_and_with_leave_the_streams_continue(tiny, tmp_path, corpus, capsys):
    assert train(tiny, *mixed(corpus, 4, {"a": 0.5, "b": 0.5})) == 0
    run, capsys_text = tmp_path / "run", lambda: "".join(capsys.readouterr())
    capsys_text()
    changed = {"a": 0.2, "b": 0.8}
    assert train(tiny, *mixed(corpus, 8, changed)) == 2
    text = capsys_text()
    assert "data.sources: {'a': 0.5, 'b': 0.5} in the checkpoint, {'a': 0.2, 'b': 0.8} now" in text
    assert "--checkpoint.allow data" in text
    assert train(tiny, *mixed(corpus, 6, changed), *ALLOW) == 0
    text = capsys_text()
    for name in "ab":
        assert f"{name}: its streams continue, each after 3 to 4 sequences, in epoch 1" in text
    assert "from sequence 20 on the weights are a 0.2, b 0.8" in text
    assert "start over" not in text
    assert source_tokens(run, 4) == {"a": 10 * SEQ_LEN, "b": 10 * SEQ_LEN}
    assert source_tokens(run, 6) == {"a": 12 * SEQ_LEN, "b": 18 * SEQ_LEN}
    # From there on it is a run like any other: what was allowed once need not be allowed again.
    assert train(tiny, *mixed(corpus, 8, changed)) == 0
    assert "from sequence 20 on the weights are a 0.2, b 0.8" in capsys_text()
    assert source_tokens(run, 8) == {"a": 14 * SEQ_LEN, "b": 26 * SEQ_LEN}
    # As a run that was not stopped after the change.
    for step in (5, 6, 7, 8):
        (checkpoint(run, step)).rename(tmp_path / f"moved-{step}")
    before = digests(run)
    assert train(tiny, *mixed(corpus, 8, changed), *ALLOW) == 0
    assert digests(run) == before


def test_sources_are_added_changed_and_removed(tiny, tmp_path, corpus, capsys):
    assert train(tiny, *mixed(corpus, 4, {"a": 0.4, "b": 0.4, "c": 0.2})) == 0
    capsys.readouterr()
    after = mixed(corpus, 8, {"b": 0.5, "c": 0.25, "new": 0.25}, c="d", new="a")
    assert train(tiny, *after) == 2
    text = "".join(capsys.readouterr())
    for line in ("source.a: gone", "source.new: new", "source.c: text.jsonl has"):
        assert line in text
    assert "held out" not in text
    assert train(tiny, *after, *ALLOW) == 0
    text = "".join(capsys.readouterr())
    for line in (
        "a: gone",
        "b: its streams continue, each after 2 to 3 sequences, in epoch 1",
        "c: other data than before, its streams start at the beginning",
        "new: new, its streams start at the beginning",
    ):
        assert f"  {line}\n" in text, text
    state = read_train_state(checkpoint(tmp_path / "run", 8))
    assert state.source_tokens == {"a": 8 * SEQ_LEN, "b": 18 * SEQ_LEN, "c": 5 * SEQ_LEN, "new": 5 * SEQ_LEN}
    assert (state.step, state.tokens, state.sequences) == (8, 8 * SIZE * SEQ_LEN, 8 * SIZE)
    read = [sum(state.cursors[key]["sequences"] for key in range(first, first + STREAMS)) for first in (0, 3, 6)]
    assert read == [18, 5, 5]
    assert train(tiny, *mixed(corpus, 9, {"b": 0.5, "c": 0.25, "new": 0.25}, c="d", new="a")) == 0


def test_a_run_of_one_source_continues_as_a_source_of_a_mixture(tiny, tmp_path, corpus, capsys):
    plain = (*SHORT, "--data.path", str(corpus / "a"))
    assert train(tiny, *plain, "--training.steps", "3") == 0
    assert train(tiny, *mixed(corpus, 6, {"old": 0.6, "b": 0.4}, old="a"), *ALLOW) == 0
    text = "".join(capsys.readouterr())
    assert "  old: its streams continue, each after 5 sequences, in epoch 1\n" in text
    assert "  b: new, its streams start at the beginning\n" in text
    assert source_tokens(tmp_path / "run", 6) == {"old": (15 + 9) * SEQ_LEN, "b": 6 * SEQ_LEN}
    # Back to data without tables: they start over.
    assert train(tiny, *plain, "--training.steps", "7", *ALLOW) == 0
    assert "the data start over" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_another_number_of_streams_starts_all_sources_over(tiny, corpus, capsys):
    weights = {"a": 0.5, "b": 0.5}
    assert train(tiny, *mixed(corpus, 2, weights)) == 0
    assert train(tiny, *mixed(corpus, 3, weights), "--data.streams", "4", *ALLOW) == 0
    assert "the data start over" in "".join(capsys.readouterr())
    assert train(tiny, *mixed(corpus, 4, weights), "--data.streams", "4") == 0


def test_a_source_that_begins_another_epoch_says_so(tiny, tmp_path, corpus, capsys):
    weights = {"a": 0.1, "b": 0.9}
    assert train(tiny, *mixed(corpus, 14, weights)) == 0  # 3321 tokens of b are 52 sequences
    text = "".join(capsys.readouterr())
    assert text.count("data: b begins its epoch 2") == 1
    assert "data: a begins" not in text
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    [event] = [each for each in events if each["event"] == "epoch"]
    assert (event["source"], event["epoch"]) == ("b", 2)
    epochs = metrics(tmp_path / "run", "epochs/b")
    assert 0 < epochs[14] <= 1
    assert epochs[1] == metrics(tmp_path / "run", "epochs/a")[14] == 0
    assert train(tiny, *mixed(corpus, 15, weights)) == 0
    assert "begins its epoch" not in "".join(capsys.readouterr())


def test_validation_has_a_loss_of_each_source_and_the_joint_one(tiny, tmp_path, corpus):
    command = mixed(corpus, 4, {"a": 0.8, "b": 0.2})
    validated = ("--validation.interval", "2", "--validation.fraction", "0.1", "--validation.max_tokens", "400")
    assert train(tiny, *command, *validated) == 0
    run = tmp_path / "run"
    joint, of_a, of_b = (metrics(run, name) for name in ("val_loss", "val_loss/a", "val_loss/b"))
    assert joint.keys() == of_a.keys() == of_b.keys() == {2, 4}
    assert joint[4] == pytest.approx(0.8 * of_a[4] + 0.2 * of_b[4])
    assert of_a[4] < of_a[2]
    assert of_a[4] != of_b[4]
    assert {path.name for path in run.glob("held_out*")} == {"held_out.a.npz", "held_out.b.npz"}
    # With text of its own, validation has one loss.
    text = ("--validation.path", str(corpus / "d"), "--validation.interval", "2")
    assert train(tiny, *command, *text, *in_folder(tmp_path / "other")) == 0
    assert metrics(tmp_path / "other", "val_loss").keys() == {2, 4}
    assert not metrics(tmp_path / "other", "val_loss/a")


def test_files_that_are_skipped_are_named_with_their_source(tiny, tmp_path, corpus, capsys):
    """Files of one name, of which those of two sources end in what is no JSON."""
    for letter in "ab":
        path = corpus / letter / "text.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:30], "{" + "x" * (len(lines[30]) - 2) + "\n", *lines[31:]]))
    command = mixed(corpus, 8, {"a": 0.4, "b": 0.4, "c": 0.2})
    assert train(tiny, *command, "--data.on_error", "skip_file", "--training.global_batch_size", "20") == 0
    text = "".join(capsys.readouterr())
    run = tmp_path / "run"
    for name in "ab":
        assert f"data: {name}: " in text
    assert metrics(run, "skipped_files")[8] == 2
    entries = json.loads((run / "skipped_files.json").read_text())
    assert {entry["file"].partition(": ")[0] for entry in entries} == {"a", "b"}
    assert {entry["stream"] // STREAMS for entry in entries} <= {0, 1}
    assert (
        train(
            tiny,
            *mixed(corpus, 9, {"a": 0.4, "b": 0.4, "c": 0.2}),
            *("--data.on_error", "skip_file"),
            "--training.global_batch_size",
            "20",
        )
        == 0
    )
    assert metrics(run, "skipped_files")[9] == 2
