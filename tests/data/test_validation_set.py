"""Held-out text: what is in it, in which order, and how ranks share it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from swamla_titan.config.sections import Validation
from swamla_titan.data import IGNORED, build_validation_set, validation_text
from swamla_titan.data.batches import document_ids
from swamla_titan.data.corpus import all_documents
from swamla_titan.data.document import Document, Prepared, text_hash
from swamla_titan.data.held_out import choose_held_out
from swamla_titan.data.streams import DocumentStream
from swamla_titan.errors import UserError

SEQ_LEN = 24
EOT = 256


def held_out_row(corpus):
    row = []
    for document in all_documents(corpus.source):
        if document in corpus.held_out:
            row += [*document.text.encode(), EOT]
    return row


def flat_targets(part):
    return part.targets[part.targets != IGNORED].tolist()


def test_held_out_documents_in_order_and_no_target_lost(maker):
    maker.write(maker.texts(50), files=3)
    validation = Validation(fraction=0.3)
    corpus = maker.open(validation, document_mask=True)
    row = held_out_row(corpus)
    found = build_validation_set(corpus, validation, SEQ_LEN)
    assert len(row) > 5 * SEQ_LEN
    assert flat_targets(found) == row[1:]
    assert found.tokens.flatten()[: len(row) - 1].tolist() == row[:-1]
    assert found.tokens.shape == found.targets.shape == (math.ceil((len(row) - 1) / SEQ_LEN), SEQ_LEN)
    assert torch.equal(found.document_ids, document_ids(found.tokens, EOT))
    # the byte tokenizer: a byte each, none for end of text and for what is ignored
    text = (found.targets != IGNORED) & (found.targets != EOT)
    assert torch.equal(found.target_bytes, text.long())


def test_bytes_of_targets_are_the_bytes_of_the_text(maker):
    maker.write([f"naïve text number {i} — with wörds" for i in range(8)])
    validation = Validation(fraction=0.5)
    corpus = maker.open(validation, tokenizer="gpt2")
    found = build_validation_set(corpus, validation, SEQ_LEN)
    texts = [document.text for document in all_documents(corpus.source) if document in corpus.held_out]
    first = len(corpus.tokenizer.token_bytes(int(found.tokens[0, 0])))  # the only token that is no target
    assert int(found.target_bytes.sum()) == sum(len(text.encode()) for text in texts) - first


def test_stops_at_max_tokens(maker, monkeypatch):
    maker.write(maker.texts(200))
    validation = Validation(fraction=0.5, max_tokens=100)
    corpus = maker.open(validation)
    read = []
    whole = corpus.source.read

    def counted(*args):
        for document in whole(*args):
            read.append(document)
            yield document

    monkeypatch.setattr(corpus.source, "read", counted)
    found = build_validation_set(corpus, validation, SEQ_LEN)
    assert flat_targets(found) == held_out_row(corpus)[1:101]
    assert len(read) < 250  # of which held_out_row read 200


def test_validation_path(maker, tmp_path):
    maker.write(maker.texts(5))
    (tmp_path / "val.txt").write_text("validation text")
    validation = Validation(path=str(tmp_path / "val.txt"))
    found = build_validation_set(maker.open(validation), validation, SEQ_LEN)
    assert flat_targets(found) == [*b"validation text", EOT][1:]
    assert found.document_ids is None


def test_text_of_validation_path_is_not_trained_on(maker):
    texts = maker.texts(40)
    maker.write(texts, files=4)
    path = str(maker.folder / "part-1.jsonl")
    corpus = maker.open(Validation(path=path))
    left = [document.text for document in all_documents(corpus.source) if document not in corpus.held_out]
    assert sorted(left) == sorted(set(texts) - set(texts[1::4]))
    # only what validation reads, and a change of it is a change of the training data
    part = maker.open(Validation(path=path, max_tokens=len(texts[1]) + 5))
    held_out = [document.text for document in all_documents(part.source) if document in part.held_out]
    assert held_out == texts[1:6:4]
    assert part.fingerprint() != corpus.fingerprint()
    with pytest.raises(UserError, match="every document of the training data is held out"):
        next(DocumentStream(maker.open(Validation(path=str(maker.folder))), 0))


def test_nothing_to_validate_on(maker, tmp_path):
    maker.write(maker.texts(5))
    assert build_validation_set(maker.open(), Validation(fraction=0), SEQ_LEN) is None
    for path, part in [("none.txt", "validation.path: .*none.txt does not exist"), ("empty.txt", "holds no text")]:
        (tmp_path / "empty.txt").write_text("")
        validation = Validation(path=str(tmp_path / path))
        with pytest.raises(UserError, match=part):
            build_validation_set(maker.open(validation), validation, SEQ_LEN)


def test_a_share_that_holds_out_nothing_is_refused(maker, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.held_out.SMALL_DOCUMENTS", 2)
    maker.write(maker.texts(5))
    validation = Validation(fraction=1e-9)
    with pytest.raises(UserError, match=r"validation\.fraction = 1e-09 holds out no document"):
        build_validation_set(maker.open(validation), validation, SEQ_LEN)


@pytest.mark.parametrize("text, small", [("ä" * 40, True), ("ä" * 60, False), ("a" * 60, True)])
def test_text_and_its_shards_hold_out_the_same(monkeypatch, text, small):
    """A corpus is small or not by its bytes, of which shards know the number, and each text counts once."""
    monkeypatch.setattr("swamla_titan.data.held_out.SMALL_BYTES", 100)
    texts = [text[:-2], text[:-2], "end"]
    documents = [Document(each, i, {}) for i, each in enumerate(texts)]
    sizes = [len(each.encode()) for each in texts]
    prepared = [Prepared(np.zeros(1, np.uint16), text_hash(each), size) for each, size in zip(texts, sizes)]
    shards = [Document("", i, {}, prepared=each) for i, each in enumerate([prepared[0], prepared[2]])]
    found = choose_held_out(documents, 0.5)
    assert found == choose_held_out(shards, 0.5)
    assert (found.threshold != 1 << 63) == small


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("local", [1, 4])
def test_ranks_get_equally_many_micro_batches(maker, world_size, local):
    maker.write(maker.texts(50))
    validation = Validation(fraction=0.5)
    found = build_validation_set(maker.open(validation), validation, SEQ_LEN)
    parts = [list(found.micro_batches(rank, world_size, local)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch.tokens.shape == (local, SEQ_LEN) for part in parts for batch in part)
    kept = [row for part in parts for batch in part for row in batch.targets[: batch.sequences].tolist()]
    assert sorted(kept) == sorted(found.targets.tolist())
    filler = [batch.targets[batch.sequences :] for part in parts for batch in part]
    assert torch.cat(filler).eq(IGNORED).all()


HELD_OUT = Validation(fraction=0.3, max_tokens=200)


@pytest.fixture
def unread(maker, monkeypatch):
    """A function that opens the corpus again, whose documents then cannot be read."""

    def refuse(*arguments):
        raise AssertionError("the corpus was read for held-out text")

    def opened(validation=HELD_OUT, **keys):
        corpus = maker.open(validation, **keys)
        monkeypatch.setattr(corpus.source, "read", refuse)
        return corpus

    return opened


def test_kept_text_is_that_which_reading_finds(maker, unread, tmp_path):
    """Whatever the length of a sequence is, and without reading the corpus."""
    maker.write(maker.texts(50), files=3)
    kept = tmp_path / "held_out.npz"
    validation_text(maker.open(HELD_OUT), HELD_OUT, kept).keep(kept)
    for keys in ({}, {"document_mask": True}):
        expected = build_validation_set(maker.open(HELD_OUT, **keys), HELD_OUT, SEQ_LEN // 2)
        corpus = unread(**keys)
        found = build_validation_set(corpus, HELD_OUT, SEQ_LEN // 2, validation_text(corpus, HELD_OUT, kept))
        assert found.fingerprint == expected.fingerprint
        assert torch.equal(found.tokens, expected.tokens)
        assert (found.document_ids is None) == (expected.document_ids is None)


@pytest.mark.parametrize(
    "changed, keys",
    [
        ("validation.max_tokens", {"validation": dataclasses.replace(HELD_OUT, max_tokens=150)}),
        ("validation.fraction", {"validation": dataclasses.replace(HELD_OUT, fraction=0.4)}),
        ("data.tokenizer", {"tokenizer": "gpt2"}),
        ("data", {"text_key": "other"}),
    ],
)
def test_kept_text_of_other_data_is_chosen_again(maker, tmp_path, caplog, changed, keys):
    texts = maker.texts(50)
    rows = [json.dumps({"text": text, "other": text}) + "\n" for text in texts]
    (maker.folder / "part.jsonl").write_text("".join(rows))
    kept = tmp_path / "held_out.npz"
    validation_text(maker.open(HELD_OUT), HELD_OUT, kept).keep(kept)
    validation = keys.get("validation", HELD_OUT)
    corpus = maker.open(**({"validation": validation} | keys))
    found = validation_text(corpus, validation, kept)
    assert f"held_out.npz is held-out text of another {changed}: it is chosen again" in caplog.text
    assert found.tokens.tolist() == validation_text(corpus, validation).tokens.tolist()
    found.keep(kept)
    caplog.clear()
    assert validation_text(corpus, validation, kept).tokens.tolist() == found.tokens.tolist()
    assert not caplog.text


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"text", "half", "form"])
def test_damaged_kept_text_is_chosen_again(maker, tmp_path, caplog, damage):
    maker.write(maker.texts(50))
    kept = tmp_path / "held_out.npz"
    corpus = maker.open(HELD_OUT)
    text = validation_text(corpus, HELD_OUT, kept)
    if damage == "form":
        dataclasses.replace(text, tokens=text.tokens.astype(np.float32)).keep(kept)
    else:
        text.keep(kept)
        kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2] if damage == "half" else damage)
    assert validation_text(corpus, HELD_OUT, kept).tokens.tolist() == text.tokens.tolist()
    assert "held_out.npz cannot be read" in caplog.text


def test_text_that_cannot_be_kept_is_a_warning(maker, tmp_path, caplog):
    maker.write(maker.texts(50))
    text = validation_text(maker.open(HELD_OUT), HELD_OUT)
    text.keep(tmp_path / "nowhere" / "held_out.npz")
    assert "the next start chooses held-out text again" in caplog.text
    (tmp_path / "val.txt").write_text("validation text")
    other = validation_text(maker.open(), Validation(path=str(tmp_path / "val.txt")))
    other.keep(tmp_path / "held_out.npz")  # of a path, which is read again
    assert not (tmp_path / "held_out.npz").exists()
