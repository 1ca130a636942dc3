"""Best fit: whole documents in sequences, the same after a resume, and each learned from as if it were alone."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from swamla_titan.data import IGNORED, BatchLoader, Shape, best_fit
from swamla_titan.data.best_fit import PACKINGS, BestFitStream
from swamla_titan.data.streams import DocumentStream, TokenCache, initial_cursor
from swamla_titan.model import ModelConfig, SWAMLAModel
from tests.data.steps import steps_read

EOT = 256
BEST_FIT = {"packing": "best_fit", "shuffle_documents": 5}


@pytest.fixture
def corpus(maker):
    maker.write(maker.texts(90))
    return maker.open(**BEST_FIT, streams=2)


def open_stream(corpus, cursor=None):
    return BestFitStream(corpus, 0, TokenCache(corpus.tokenizer), cursor)


def documents(corpus, count):
    stream = DocumentStream(corpus, 0)
    found = [next(stream)[0] for _ in range(count)]
    return [document.cut(np.array([*document.text.encode(), EOT])).tolist() for document in found]


def pieces(tokens):
    """The documents, and pieces of them, of a sequence without its padding."""
    real = tokens[tokens != IGNORED].tolist()
    ends = [index + 1 for index, token in enumerate(real) if token == EOT]
    return [real[begin:end] for begin, end in zip([0, *ends], [*ends, len(real)]) if begin < end]


@pytest.mark.parametrize("seq_len", [9, 30, 64, 500])
def test_every_document_is_placed_once_and_cut_only_if_it_is_longer_than_a_sequence(maker, seq_len, monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW_DOCUMENTS", 7)
    maker.write(maker.texts(90))
    corpus = maker.open(**BEST_FIT, streams=1)  # whose segment has no borders
    stream = open_stream(corpus)
    found: Counter[tuple[int, ...]] = Counter()
    begun: list[int] | None = None  # a document of several sequences
    for _ in range(200):
        tokens = stream.next(seq_len).tokens
        assert len(tokens) == seq_len + 1
        padding = np.flatnonzero(tokens == IGNORED)
        assert padding.tolist() == list(range(seq_len + 1 - len(padding), seq_len + 1))  # at the end alone
        for number, piece in enumerate(pieces(tokens)):
            if begun is not None and number == 0:
                assert piece[0] == begun[-1]  # overlaps by one, so that it is a target too
                piece = begun[:-1] + piece
            else:
                assert begun is None or number > 0
            begun = None if piece[-1] == EOT else piece
            if begun is None:
                found[tuple(piece)] += 1
            else:
                assert number == 0
                assert len(padding) == 0
    # All that were read, but for those that wait, each once.
    expected = Counter(tuple(each) for each in documents(corpus, sum(found.values()) + 7))
    assert not found - expected
    assert sum((expected - found).values()) <= 2 * 7


def test_a_stream_continues_from_every_cursor_with_the_same_sequences(corpus, monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW_DOCUMENTS", 9)
    rng = random.Random(1)
    lengths = [rng.choice([9, 30, 31, 64]) for _ in range(120)]
    stream, cursors, sequences = open_stream(corpus), [initial_cursor()], []
    for length in lengths:
        packed = stream.next(length)
        sequences.append(packed.tokens.tolist())
        cursors.append(json.loads(json.dumps(packed.cursor)))
    assert any(int(cursor["taken"], 16) for cursor in cursors[1:])
    assert any(cursor["token"] for cursor in cursors)
    for start in range(0, 120, 7):
        again = open_stream(corpus, cursors[start])
        for index in range(start, min(start + 25, 120)):
            packed = again.next(lengths[index])
            assert (packed.tokens.tolist(), packed.cursor) == (sequences[index], cursors[index + 1])


def test_padding_is_small_where_documents_are_short(maker):
    """A quarter of what sequences would waste that take documents as they come."""
    rng = random.Random(2)
    maker.write(["x" * min(int(rng.lognormvariate(4, 1)), 900) for _ in range(3000)])
    corpus = maker.open(**BEST_FIT, streams=1)
    stream, padding = open_stream(corpus), 0
    for _ in range(100):
        padding += int((stream.next(512).tokens == IGNORED).sum())
    in_order, room, sequences = 0, 0, 0
    for document in documents(corpus, 2000):
        if len(document) > room:
            in_order, room, sequences = in_order + room, 513, sequences + 1
        room -= min(len(document), room)
    assert padding / (100 * 513) < 0.02
    assert padding / (100 * 513) < in_order / (sequences * 513) / 4


@pytest.mark.parametrize(("world_size", "workers"), [(3, 1), (2, 2)])
def test_batches_do_not_depend_on_ranks_and_workers(maker, world_size, workers):
    maker.write(maker.texts(60))
    corpus, shapes = maker.open(**BEST_FIT), [Shape(0, 3, 30), Shape(9, 5, 64)]

    assert steps_read(corpus, shapes, world_size, workers) == steps_read(corpus, shapes, 1, 1)


def test_padding_has_no_target_and_a_document_of_its_own(maker):
    maker.write(maker.texts(60))
    corpus = maker.open(**BEST_FIT, document_mask=True)
    with BatchLoader(corpus, [Shape(0, 12, 100)]) as loader:
        batch = next(loader)
    ignored = batch.targets == IGNORED
    assert 0 < int(ignored.sum()) < 400
    for index in range(12):
        text = batch.text(index)
        padding = slice(len(text), 100)
        assert ignored[index, padding].all()
        assert not ignored[index, : len(text) - 1].any()
        ids = batch.document_ids[index]
        assert len(text) == 100 or (ids[padding] == ids[-1]).all()
        assert len(text) == 100 or ids[len(text) - 1] < ids[-1]
        assert (batch.tokens[index, padding] == 0).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_one_by_one_give_the_same_losses_under_the_document_mask(maker, packing):
    """The plain reference: each document, or piece of one, as a sequence of its own."""
    maker.write(maker.texts(60))
    corpus = maker.open(**{**BEST_FIT, "packing": packing}, document_mask=True)
    model = SWAMLAModel(
        ModelConfig(num_layers=3, dim=32, num_heads=2, vocab_size=257, max_seq_len=128, swa_window=12, kv_lora_rank=16)
    ).double()
    model.requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(4)
    with BatchLoader(corpus, [Shape(0, 6, 100)]) as loader:
        batch = next(loader)
    logits = model(batch.tokens, document_ids=batch.document_ids)
    found = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    checked = 0
    for index in range(6):
        ids = batch.document_ids[index]
        for number in ids.unique():
            own = ids == number
            if (batch.targets[index, own] == IGNORED).all():
                continue
            alone = model(batch.tokens[index, own][None])[0]
            expected = cross_entropy(alone, batch.targets[index, own], reduction="none")
            torch.testing.assert_close(found[index, own], expected, rtol=1e-10, atol=1e-10)
            checked += int(own.sum())
    assert checked > 550


def test_invalid_bytes_count_where_a_document_is_placed(maker):
    (maker.folder / "a.txt").write_bytes(b"bad \xff byte" * 10)
    (maker.folder / "b.txt").write_bytes(b"good byte")
    corpus = maker.open(**BEST_FIT, streams=1)
    stream = open_stream(corpus)
    found = [stream.next(150) for _ in range(6)]
    assert {packed.replaced for packed in found} <= {0, 10, 20}
    assert sum(packed.replaced for packed in found) >= 10
    again = open_stream(corpus, found[0].cursor)
    assert [again.next(150).replaced for _ in range(5)] == [packed.replaced for packed in found[1:]]


def test_a_file_that_cannot_be_read_is_skipped_and_the_window_begins_anew(maker):
    maker.write(maker.texts(60), files=3)
    corpus = maker.open(**BEST_FIT, streams=1, on_error="skip_file")
    cursor = open_stream(corpus).next(64).cursor
    for number in range(2):
        (maker.folder / f"part-{number}.jsonl").write_text("{")
    changed = dataclasses.replace(corpus)
    again = open_stream(changed, cursor)
    found = [again.next(64) for _ in range(20)]
    assert any(packed.excluded for packed in found)
    excluded = [each for packed in found[:10] for each in packed.excluded]
    resumed = BestFitStream(changed, 0, TokenCache(corpus.tokenizer), found[9].cursor, excluded)
    assert [resumed.next(64).tokens.tolist() for _ in range(10)] == [packed.tokens.tolist() for packed in found[10:]]
