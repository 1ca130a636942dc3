"""A run that is resumed with more data, or with other settings of validation."""

import json

import pytest

from swamla_titan.checkpoint.records import read_data_record
from swamla_titan.config import load_config
from swamla_titan.train.setup import open_data
from tests.checkpoint.test_allow import rows_fed
from tests.train.runs import checkpoint, metrics, train

QUIET = ("--data.num_workers", "0", "--lr_schedule.warmup_steps", "0", "--checkpoint.interval", "1")
NO_VALIDATION = ("--validation.interval", "0", "--validation.fraction", "0")


def write(folder, name, letter, count=30, size=80):
    lines = [json.dumps({"text": f"{letter}{number:03}".ljust(size, letter)}) + "\n" for number in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(lines))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "a", "a")
    write(folder, "b", "b")
    return folder


def settings(folder, *more):
    return ("--data.source", "local", "--data.path", str(folder), "--data.streams", "3", *QUIET, *more)


def text_of(rows) -> str:
    return "".join(chr(token) for row in rows for token in row if token < 256)


def said(capsys) -> str:
    return "".join(capsys.readouterr())


def test_files_that_are_added_are_named_and_read_after_the_epoch_that_runs(tiny, data, tmp_path, capsys):
    """60 documents of 81 tokens are 15.2 steps of 5 sequences of 64 tokens; 30 more are 7.6 steps."""
    command = settings(data, *NO_VALIDATION)
    whole = rows_fed(tiny, *command, "--training.steps", "15", "--job.dump_folder", str(tmp_path / "whole"))
    before = rows_fed(tiny, *command, "--training.steps", "6")
    write(data, "new", "n")
    capsys.readouterr()
    assert train(tiny, *command, "--dry-run") == 0
    after = rows_fed(tiny, *command, "--training.steps", "39")
    assert "1 new in this run (new.jsonl)" in said(capsys)
    # What the epoch had still to read comes first, as if nothing had been added.
    assert (before + after)[: 15 * 5 - 3] == whole[: 15 * 5 - 3]
    assert "n" not in text_of((before + after)[: 15 * 5 - 3])
    # Then what is new, once, and then all of it.
    rest = text_of((before + after)[16 * 5 :])
    new = [rest.count(f"n{number:03}") for number in range(30)]
    assert sum(new) >= 1.5 * 30  # once, and in the epoch of everything for the most part again
    assert max(new) <= 3
    old = sum(rest.count(f"a{number:03}") for number in range(30))
    assert 10 <= old <= 35
    saved = checkpoint(tmp_path / "run", 39)
    assert len(read_data_record(saved)["editions"]) == 3

    # Added a second time: a run that goes on knows all editions, on the same batches as one that was not stopped.
    write(data, "z", "z", count=10)
    assert train(tiny, *command, "--training.steps", "40") == 0
    assert "1 new in this run (z.jsonl)" in said(capsys)
    assert len(read_data_record(checkpoint(tmp_path / "run", 40))["editions"]) == 5
    on = rows_fed(tiny, *command, "--training.steps", "75")
    assert "new in this run" not in said(capsys)
    assert "z00" in text_of(on)


def test_each_stream_reads_what_was_added_once_before_it_reads_everything(tiny, data, tmp_path):
    command = settings(data, *NO_VALIDATION)
    assert train(tiny, *command, "--training.steps", "3") == 0
    for number, name in enumerate(("c", "d")):
        write(data, name, name, count=12)
        assert train(tiny, *command, "--training.steps", str(4 + number)) == 0
    config = load_config(tmp_path / "run" / "config.toml")
    _, corpus = open_data(config, read_data_record(checkpoint(tmp_path / "run", 5)))
    assert [source.description.split(",")[0] for source in corpus.sources] == [
        "2 files",
        "1 file",
        "3 files",
        "1 file",
        "4 files",
    ]
    assert [corpus.edition_after(edition) for edition in range(5)] == [1, 3, 3, 4, 4]


def test_a_file_that_changed_or_went_is_refused_by_name(tiny, data, capsys):
    command = settings(data, *NO_VALIDATION)
    assert train(tiny, *command, "--training.steps", "2") == 0
    (data / "a.jsonl").unlink()
    (data / "b.jsonl").write_text('{"text": "other"}\n')
    write(data, "c", "c")
    capsys.readouterr()
    assert train(tiny, *command, "--training.steps", "4") == 2
    error = capsys.readouterr().err
    assert "a.jsonl is gone; b.jsonl has 18 bytes, before " in error
    assert "c.jsonl is new" in error
    assert "--checkpoint.allow data" in error


def test_a_file_that_was_added_and_went_is_refused(tiny, data, capsys):
    command = settings(data, *NO_VALIDATION)
    assert train(tiny, *command, "--training.steps", "2") == 0
    write(data, "c", "c")
    assert train(tiny, *command, "--training.steps", "3") == 0
    (data / "c.jsonl").unlink()
    capsys.readouterr()
    assert train(tiny, *command, "--training.steps", "4") == 2
    assert "c.jsonl is gone" in capsys.readouterr().err


def validated(run) -> dict[int, int | None]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line.get("val_set") for line in lines if "val_loss" in line}


def test_validation_may_change_and_its_curve_says_so(tiny, data, tmp_path, capsys):
    command = settings(data, "--validation.interval", "1")
    some = ("--validation.fraction", "0.2", "--validation.max_tokens", "100")
    apart = ("--lr_schedule.min_lr_ratio", "1")
    whole = rows_fed(tiny, *command, *some, *apart, "--training.steps", "10", "--job.dump_folder", str(tmp_path / "w"))
    text = tmp_path / "held-out.txt"
    text.write_text("other text to validate on " * 20)
    changes = [
        (2, some),
        (4, ("--validation.fraction", "0.2", "--validation.max_tokens", "500")),
        (6, ("--validation.path", str(text))),
        (8, ("--validation.interval", "0")),
        (10, ("--validation.fraction", "0.4", "--validation.max_tokens", "800")),
    ]
    fed = []
    for steps, change in changes:
        fed += rows_fed(tiny, *command, *change, *apart, "--training.steps", str(steps))
        output = said(capsys)
        assert ("validation reads other text than before" in output) == (steps in (4, 6, 10))
        assert ("this run began without holding out what validation reads now" in output) == (steps in (6, 10))
    # What is trained on is what the run began with, whatever is validated.
    assert metrics(tmp_path / "run").keys() == metrics(tmp_path / "w").keys()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "w")
    assert len(fed) >= len(whole) > 0
    assert validated(tmp_path / "run") == {1: None, 2: None, 3: 2, 4: 2, 5: 3, 6: 3, 9: 4, 10: 4}


def test_a_checkpoint_of_the_order_before_says_that_it_cannot_go_on(tiny, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.corpus.ORDER", 2)
    command = settings(data, *NO_VALIDATION)
    assert train(tiny, *command, "--training.steps", "2") == 0
    monkeypatch.undo()
    capsys.readouterr()
    assert train(tiny, *command, "--training.steps", "4") == 2
    error = capsys.readouterr().err
    assert "order: this version reads data in another order than the one that wrote the checkpoint" in error
    assert train(tiny, *command, "--training.steps", "4", "--checkpoint.allow", "data") == 0
    assert "the data start over" in said(capsys)
