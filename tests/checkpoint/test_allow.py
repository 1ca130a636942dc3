"""checkpoint.allow: a run goes on from another's checkpoint, with the data where they were or from their beginning."""

import json

import pytest
import torch

from swamla_titan.config import load_config
from swamla_titan.data import IGNORED, BatchLoader, Shape, open_corpus
from swamla_titan.model import SWAMLAModel
from tests.config.runner import before_every_call_of
from tests.train.runs import checkpoint, metrics, tensors, train

QUICK = ("--validation.interval", "0", "--data.num_workers", "0", "--lr_schedule.warmup_steps", "0")
FIRST = (*QUICK, "--training.steps", "3")
MORE = (*QUICK, "--training.steps", "5")


def rows_fed(config, *overrides: str) -> list[list[int]]:
    """The rows of tokens that a run computes, in their order."""
    rows = []

    def look(module, tokens, targets, document_ids):
        rows.extend(tokens[(targets != IGNORED).any(dim=1)].tolist())

    with before_every_call_of(SWAMLAModel, look):
        assert train(config, *overrides) == 0
    return rows


def sequences(run, count: int) -> list[list[int]]:
    """The first global sequences of the data of a finished run."""
    config = load_config(run / "config.toml")
    corpus = open_corpus(config.data, config.validation, config.job.seed)
    with BatchLoader(corpus, [Shape(0, count, config.training.seq_len)], num_workers=0) as loader:
        return next(loader).tokens.tolist()


def said(capsys) -> str:
    return "".join(capsys.readouterr())


def record(path) -> dict:
    return json.loads((path / "train.json").read_text())


def test_another_batch_size_goes_on_with_the_next_sequence(tiny, tmp_path, capsys):
    assert train(tiny, *FIRST) == 0
    smaller = (*MORE, "--training.global_batch_size", "4")
    assert train(tiny, *smaller) == 2
    fed = rows_fed(tiny, *smaller, "--checkpoint.allow", "batch")
    assert "as checkpoint.allow permits:\n  training.global_batch_size: 5 in the checkpoint, 4 now" in said(capsys)
    assert fed == sequences(tmp_path / "run", 23)[15:]
    after = record(checkpoint(tmp_path / "run", 5))
    assert (after["sequences"], after["tokens"]) == (23, 23 * 64)
    # It is a run of batches of 4 from now on, and needs no leave.
    assert rows_fed(tiny, *smaller, "--training.steps", "6") == sequences(tmp_path / "run", 27)[23:]


def test_another_length_goes_on_with_the_next_token(tiny, tmp_path):
    assert train(tiny, *FIRST) == 0
    fed = rows_fed(tiny, *MORE, "--training.seq_len", "32", "--checkpoint.allow", "batch")
    # Sequence 15 is of stream 3, of 6 streams, whose third one it is: what comes after two of 64 tokens.
    corpus = sequences(tmp_path / "run", 6 * 5)  # of 32 tokens
    assert fed[0] == corpus[3 + 6 * 4]
    assert record(checkpoint(tmp_path / "run", 5))["tokens"] == 3 * 5 * 64 + 2 * 5 * 32


@pytest.mark.parametrize("change", [("--job.seed", "1"), ("--data.shuffle_documents", "3"), ("--data.streams", "5")])
def test_with_other_data_they_begin_anew_and_the_weights_go_on(tiny, tmp_path, capsys, change):
    assert train(tiny, *FIRST) == 0
    assert train(tiny, *MORE, *change, "--checkpoint.allow", "batch") == 2
    fed = rows_fed(tiny, *MORE, *change, "--checkpoint.allow", "data")
    assert "; the data start over:" in said(capsys)
    assert fed == sequences(tmp_path / "run", 10)
    after = record(checkpoint(tmp_path / "run", 5))
    assert (after["step"], after["sequences"], after["tokens"]) == (5, 10, 25 * 64)
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4, 5]
    # Another two steps on what followed: the record is one to resume from.
    assert rows_fed(tiny, *MORE, *change, "--training.steps", "6") == sequences(tmp_path / "run", 15)[10:]


@pytest.mark.parametrize("on_error", ["stop", "skip_file"])
def test_a_run_goes_on_with_other_files(tiny, tmp_path, on_error):
    files = {}
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"the {name} document {i} " * 50)
        files[name] = ("--data.source", "local", "--data.path", str(tmp_path / name), "--data.on_error", on_error)
    assert train(tiny, *FIRST, *files["one"]) == 0
    assert train(tiny, *MORE, *files["other"]) == 2
    fed = rows_fed(tiny, *MORE, *files["other"], "--checkpoint.allow", "data")
    text = bytes(token for row in fed for token in row if token < 256).decode()
    assert "other document" in text
    assert "one document" not in text
    assert fed == sequences(tmp_path / "run", 10)


def test_what_the_weights_leave_open_may_differ_and_their_shapes_may_not(tiny, tmp_path, capsys):
    assert train(tiny, *FIRST, "--optimizer.lr", "0") == 0
    before = tensors(checkpoint(tmp_path / "run", 3))
    window = (*MORE, "--optimizer.lr", "0", "--model.swa_window", "8")
    assert train(tiny, *window) == 2
    assert "--checkpoint.allow model" in capsys.readouterr().err
    assert train(tiny, *window, "--checkpoint.allow", "model") == 0
    after = tensors(checkpoint(tmp_path / "run", 5))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("model."))
    wider = (*MORE, "--training.steps", "7", "--model.ffn_hidden_dim", "96", "--checkpoint.allow", "model")
    assert train(tiny, *wider) == 2
    assert "holds another model:" in capsys.readouterr().err


def test_all_that_differs_must_be_allowed_and_the_refusal_names_what_to_allow(tiny, tmp_path, capsys):
    assert train(tiny, *FIRST) == 0
    both = (*MORE, "--job.seed", "1", "--training.global_batch_size", "4", "--model.swa_window", "8")
    assert train(tiny, *both, "--checkpoint.allow", "data") == 2
    error = capsys.readouterr().err
    assert "model.swa_window: 16 in the checkpoint, 8 now" in error
    assert "job.seed" not in error
    assert "--checkpoint.allow batch,data,model" in error
    assert train(tiny, *both, "--checkpoint.allow", "batch,data,model") == 0
