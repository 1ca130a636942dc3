"""No padding, no target lost or doubled; document ids; cursors to the token; micro-batches."""

import json

import numpy as np
import pytest
import torch

from swamla_titan.data.batches import (
    IGNORED,
    Shape,
    StepBatch,
    document_ids,
    micro_batch_count,
    micro_batches,
    sequences_per_rank,
    waits_for_streams,
)
from swamla_titan.data.streams import DocumentStream, PackedStream, TokenCache, initial_cursor
from swamla_titan.data.tokenizer import load_tokenizer
from tests.data.steps import steps_read

EOT = 256


def open_stream(corpus, stream, cursor=None):
    return PackedStream(corpus, stream, TokenCache(corpus.tokenizer), cursor)


def token_row(corpus, stream, length):
    """What the sequences of a stream are cut from: each document's bytes, and end of text."""
    documents = DocumentStream(corpus, stream)
    row = []
    while len(row) < length:
        document, _ = next(documents)
        row += document.cut(np.array([*document.text.encode(), EOT])).tolist()
    return row[:length]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 500])
def test_targets_are_the_token_row(maker, seq_len):
    maker.write(maker.texts(30))
    corpus = maker.open(shuffle_documents=5)
    stream = open_stream(corpus, 2)
    count = 2000 // seq_len
    sequences = [stream.next(seq_len).tokens for _ in range(count)]
    row = token_row(corpus, 2, seq_len * count + 1)
    assert all(len(sequence) == seq_len + 1 for sequence in sequences)
    assert np.concatenate([sequence[1:] for sequence in sequences]).tolist() == row[1:]
    assert np.concatenate([sequence[:-1] for sequence in sequences]).tolist() == row[:-1]


@pytest.mark.parametrize("seq_len", [1, 9, 300])
def test_resume_from_every_sequence(maker, seq_len):
    maker.write(maker.texts(9))
    corpus = maker.open(shuffle_documents=3, streams=2)
    stream = open_stream(corpus, 0)
    cursors, sequences = [initial_cursor()], []
    for _ in range(60):
        tokens, cursor, *_ = stream.next(seq_len)
        sequences.append(tokens.tolist())
        cursors.append(json.loads(json.dumps(cursor)))
    assert [cursor["sequences"] for cursor in cursors] == list(range(61))
    for start in range(0, 60, 7):
        again = open_stream(corpus, 0, cursors[start])
        found = [again.next(seq_len) for _ in range(60 - start)]
        assert [packed.cursor for packed in found] == cursors[start + 1 :]
        assert [packed.tokens.tolist() for packed in found] == sequences[start:]


def test_streams_start_at_different_places_of_one_document(maker):
    (maker.folder / "book.txt").write_text("".join(f"{i:05} " for i in range(5000)))
    corpus = maker.open(streams=8, shuffle_documents=1)
    first = [open_stream(corpus, stream).next(60).tokens for stream in range(8)]
    assert bytes(first[0][:12].astype(np.uint8)) == b"00000 00001 "
    assert len({sequence.tobytes() for sequence in first}) == 8


def test_long_documents_are_tokenized_once_for_all_streams(maker, monkeypatch):
    (maker.folder / "book.txt").write_text("x" * TokenCache.LONG_CHARS)
    corpus = maker.open(streams=4)
    calls = []
    encode = corpus.tokenizer.encode_array
    monkeypatch.setattr(corpus.tokenizer, "encode_array", lambda text: calls.append(1) or encode(text))
    cache = TokenCache(corpus.tokenizer)
    for stream in range(4):
        PackedStream(corpus, stream, cache).next(10)
    assert len(calls) == 1
    # ... and only as many are kept as there is room for
    monkeypatch.setattr(TokenCache, "MAX_TOKENS", 10)
    other, _ = next(DocumentStream(corpus, 0))
    other.key = (0, 5, 0)
    cache.tokens(other)
    assert list(cache._kept) == [(0, 5, 0)]


def test_replaced_bytes_are_counted_once(maker):
    (maker.folder / "a.txt").write_bytes(b"bad \xff byte" * 10)
    corpus = maker.open(streams=1)
    stream = open_stream(corpus, 0)
    first = stream.next(50)
    assert first.replaced == 10
    again = open_stream(corpus, 0, first.cursor)
    assert again.next(50).replaced == 0
    assert sum(again.next(50).replaced for _ in range(10)) >= 10  # the next epoch reads it again


def test_document_ids():
    tokens = torch.tensor([[1, 2, EOT, 3, EOT, EOT, 4], [EOT, 1, 2, 3, 4, 5, EOT]])
    ids = document_ids(tokens, EOT)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    for row, number in zip(tokens, ids):
        assert number.tolist() == [int((row[:t] == EOT).sum()) for t in range(7)]


def batch_of(rows, seq_len=3, ids=True):
    tokens = torch.arange(rows * seq_len).view(rows, seq_len) + 1
    return StepBatch(0, torch.arange(rows), tokens, tokens + 1, tokens * 2 if ids else None, 0)


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("ids", [True, False])
def test_micro_batches_have_one_shape_and_keep_every_row(rows, ids):
    batch = batch_of(rows, ids=ids)
    parts = list(micro_batches(batch, 4, 2))
    assert len(parts) == 2
    for part in parts:
        assert part.tokens.shape == part.targets.shape == (4, 3)
        assert part.targets[part.sequences :].eq(IGNORED).all()
        assert not part.targets[: part.sequences].eq(IGNORED).any()
        assert (part.document_ids is None) == (not ids)
        assert part.tokens.dtype == part.targets.dtype == torch.int64
    for name in ("tokens", "targets", "document_ids")[: 3 if ids else 2]:
        kept = torch.cat([getattr(part, name)[: part.sequences] for part in parts])
        assert torch.equal(kept, getattr(batch, name))


def test_a_count_that_is_too_small_is_noticed():
    with pytest.raises(AssertionError):
        list(micro_batches(batch_of(5), 2, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size, streams, local", [(8, 64, 2), (7, 5, 2), (5, 4, 4), (64, 6, 8), (1, 3, 1)])
def test_micro_batch_count_is_what_the_fullest_rank_needs(world_size, size, streams, local):
    for step in range(12):
        owned = [0] * world_size
        for number in range(step * size, (step + 1) * size):
            owned[number % streams % world_size] += 1
        count = micro_batch_count(step * size, size, streams, world_size, local)
        assert (count - 1) * local < max(owned) <= count * local
        assert sequences_per_rank(step * size, size, streams, world_size) == owned


def test_streams_that_keep_ranks_waiting_are_said():
    message = waits_for_streams(512, 64, 512, 1)
    assert message
    assert "8 micro-batches where 1 would do" in message
    assert "a multiple of 512, such as 512" in message
    message = waits_for_streams(96, 64, 48, 1)
    assert message
    assert "such as 96" in message
    for size, streams, world_size, local in ((512, 512, 512, 1), (8, 8, 3, 3), (256, 64, 8, 32), (7, 5, 1, 2)):
        assert waits_for_streams(size, streams, world_size, local) is None


def test_gpt2_tokens_are_packed(maker):
    maker.write(["hello world", "hello world"])
    corpus = maker.open(tokenizer="gpt2", streams=1)
    sequence = open_stream(corpus, 0).next(5).tokens
    assert sequence.tolist() == [31373, 995, 50256, 31373, 995, 50256]
    assert load_tokenizer("gpt2").decode(sequence.tolist()) == "hello worldhello world"


def test_sequences_of_several_lengths_lose_no_target(maker):
    maker.write(maker.texts(30))
    corpus = maker.open(shuffle_documents=5)
    lengths = [7, 7, 100, 3, 64, 1, 500, 2]
    stream, found = open_stream(corpus, 2), []
    for length in lengths:
        packed = stream.next(length)
        assert len(packed.tokens) == length + 1
        found += packed.tokens[1:].tolist()
        again = open_stream(corpus, 2, json.loads(json.dumps(packed.cursor)))
        assert again.next(9).tokens.tolist() == open_stream(corpus, 2, packed.cursor).next(9).tokens.tolist()
    assert found == token_row(corpus, 2, sum(lengths) + 1)[1:]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (3, 1), (4, 2)])
def test_batches_of_several_shapes_are_the_same_for_any_ranks_and_workers(maker, world_size, workers):
    maker.write(maker.texts(40))
    corpus = maker.open(streams=5)
    shapes = [Shape(0, 3, 8), Shape(6, 3, 20), Shape(9, 7, 20), Shape(30, 2, 5)]

    found = steps_read(corpus, shapes, world_size, workers)
    assert [(min(step), len(step), len(next(iter(step.values()))) - 1) for step in found] == [
        *((0, 3, 8), (3, 3, 8), (6, 3, 20), (9, 7, 20), (16, 7, 20), (23, 7, 20)),
        *((30, 2, 5), (32, 2, 5), (34, 2, 5)),
    ]
    assert found == steps_read(corpus, shapes, 1, 1)
