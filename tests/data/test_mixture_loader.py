"""Batches of a mixture: they do not depend on ranks and restarts, and hold each source in its share."""

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import KEYS, Data, DataSource, Validation
from swamla_titan.data import BatchLoader, Shape, open_corpus, open_mixture
from swamla_titan.data.loader import StepReader
from swamla_titan.data.mixture import Piece
from swamla_titan.data.retry import all_documents
from swamla_titan.errors import Damaged, UserError
from swamla_titan.tools.prepare import prepare

SEQ_LEN, SIZE, STEPS = 32, 12, 15
SHAPES = [Shape(0, SIZE, SEQ_LEN)]
WEIGHTS = {"jsonl": 0.5, "parquet": 0.35, "docs": 0.15}
EVERY_KIND = {"jsonl": 0.4, "parquet": 0.25, "docs": 0.15, "hub": 0.1, "shards": 0.1}
MARKS = {"jsonl": "j", "parquet": "p", "hub": "h"}


def rows(mark, count):
    return [f"{mark * (number % 9 + 3)}{number}" for number in range(count)]


@pytest.fixture
def folder(tmp_path):
    for name, mark in MARKS.items():
        path = tmp_path / name
        path.mkdir()
        for part in range(2):
            texts = rows(mark, 60)[part::2]
            if name == "jsonl":
                (path / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            else:
                pq.write_table(pa.table({"text": texts}), path / f"{part}.parquet", row_group_size=7)
    return tmp_path


def sections(folder, weights=WEIGHTS, **keys):
    kinds = {"docs": "builtin", "hub": "huggingface", "shards": "shards"}
    sources = [
        DataSource(name, weight, kinds.get(name, "local"), "" if name == "docs" else str(folder / name))
        for name, weight in weights.items()
    ]
    return Data(**{"tokenizer": "byte", "streams": 12, "num_workers": 0, "sources": tuple(sources)} | keys)


@pytest.fixture
def mixture(folder):
    return open_mixture(sections(folder), Validation(fraction=0), 7)


def loaders(mixture, ranks, cursors=None, steps=0):
    keys = {"cursors": cursors, "first": steps * SIZE}
    return [BatchLoader(mixture, SHAPES, rank=rank, world_size=ranks, **keys) for rank in range(ranks)]


def read(mixture, ranks, steps, cursors=None, before=0):
    """The global batches [steps * SIZE, T + 1] of some steps, their sources, and the cursors after them as JSON."""
    batches, every, merged = [], [], {}
    readers = loaders(mixture, ranks, cursors, before)
    for _ in range(steps):
        parts = [next(reader) for reader in readers]
        order = np.argsort(np.concatenate([part.sequences for part in parts]))
        assert {part.largest for part in parts} == {max(len(part.tokens) for part in parts)}
        tokens = np.concatenate([np.concatenate([part.tokens, part.targets[:, -1:]], axis=1) for part in parts])
        batches.append(tokens[order])
        every.append(np.concatenate([part.sources for part in parts])[order])
        for part in parts:
            merged |= part.cursors
    for reader in readers:
        reader.close()
    return np.concatenate(batches), np.concatenate(every), json.loads(json.dumps(merged))


def text_of(row):
    return bytes(token for token in row.tolist() if token < 256).decode("latin-1")


def require_same_on_any_ranks(mixture):
    expected, sources, cursors = read(mixture, 1, STEPS)
    assert max(cursor["epoch"] for cursor in cursors.values()) > 1
    one, _, kept = read(mixture, 1, 4)
    four, _, kept = read(mixture, 4, 5, kept, 4)
    three, _, kept = read(mixture, 3, 6, kept, 9)
    assert np.array_equal(np.concatenate([one, four, three]), expected)
    assert kept == cursors
    assert len(kept) == 12 * len(mixture.names)
    assert sources.tolist() == mixture.order.sources(np.arange(STEPS * SIZE)).tolist()


@pytest.mark.parametrize("packing", ["concatenate", pytest.param("best_fit", marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_ranks_and_resume_twice_across_epochs(folder, packing):
    data = sections(folder, packing=packing)
    require_same_on_any_ranks(open_mixture(data, Validation(fraction=0), 7))


@pytest.mark.slow
def test_batches_of_every_kind_of_source_do_not_depend_on_ranks(folder):
    assert {*KEYS["data.source"].choices} == {"local", "builtin", "huggingface", "shards"}
    assert prepare(Data(source="local", path=str(folder / "jsonl"), tokenizer="byte"), str(folder / "shards")) == 0
    (folder / "copied").symlink_to(folder / "jsonl")
    data = sections(folder, EVERY_KIND)
    local, *others = data.sources
    of_a_store = replace(local, path=f"file://{folder}/copied")
    require_same_on_any_ranks(open_mixture(replace(data, sources=(of_a_store, *others)), Validation(fraction=0), 7))


def test_a_source_that_cannot_be_read_on_is_skipped_and_the_others_are_not(folder):
    mixture = open_mixture(sections(folder, on_error="skip_file"), Validation(fraction=0), 7)
    _ = [corpus.segments for corpus in mixture.corpora]
    for part in range(2):
        damaged = folder / "jsonl" / f"{part}.jsonl"
        lines = damaged.read_text().splitlines(keepends=True)
        damaged.write_text("".join([*lines[:20], "{" + "x" * (len(lines[20]) - 2) + "\n", *lines[21:]]))
    expected, _, cursors = read(mixture, 1, STEPS)
    [reader] = loaders(mixture, 1)
    for _ in range(6):
        next(reader)
    found, kept = reader.excluded, json.loads(json.dumps(reader.cursors))
    jsonl = mixture.names.index("jsonl")
    assert found
    assert {each.stream // 12 for each in found} == {jsonl}
    rest = [
        BatchLoader(mixture, SHAPES, rank=rank, world_size=3, cursors=kept, excluded=found, first=6 * SIZE)
        for rank in range(3)
    ]
    merged = kept
    for step in range(6, STEPS):
        parts = [next(each) for each in rest]
        order = np.argsort(np.concatenate([part.sequences for part in parts]))
        tokens = np.concatenate([part.tokens for part in parts])[order]
        assert np.array_equal(tokens, expected[step * SIZE : (step + 1) * SIZE, :-1])
        for part in parts:
            merged = merged | {str(key): cursor for key, cursor in part.cursors.items()}
    assert merged == cursors


def test_processes_change_nothing(mixture):
    expected, _, _ = read(mixture, 1, 3)
    slots, cursors = list(range(12)), loaders(mixture, 1)[0].cursors
    readers = [StepReader(mixture, slots[worker::5], SHAPES, 0, cursors) for worker in range(5)]
    elsewhere = [iter(pickle.loads(pickle.dumps(reader))) for reader in readers]
    for step in range(3):
        parts = [next(reader) for reader in elsewhere]
        order = np.argsort(np.concatenate([part.sequences for part in parts]))
        found = np.concatenate([part.tokens for part in parts])[order]
        assert np.array_equal(found, expected[step * SIZE : (step + 1) * SIZE])


def test_each_step_has_each_source_to_within_one_sequence(mixture):
    found, sources, _ = read(mixture, 2, STEPS)
    for row, source in zip(found, sources.tolist()):
        name = mixture.names[source]
        letters = {letter for letter in text_of(row) if not letter.isdigit()}
        assert letters == {MARKS[name]} if name in MARKS else not letters <= {*MARKS.values()}
    for step in range(1, STEPS + 1):
        counts = Counter(sources[: step * SIZE].tolist())
        for source, name in enumerate(mixture.names):
            assert abs(counts[source] - WEIGHTS[name] * step * SIZE) < 1


def test_a_source_is_read_as_it_is_alone_and_the_order_of_tables_has_no_influence(folder, mixture):
    alone = mixture.corpora[mixture.names.index("jsonl")]
    [reader] = loaders(alone, 1)
    of_stream = {}
    for _ in range(STEPS):
        batch = next(reader)
        for number, row in zip(batch.sequences.tolist(), batch.tokens):
            of_stream.setdefault(number % 12, []).append(row.tolist())
    found, _, _ = read(mixture, 1, STEPS)
    keys = mixture.order.cursor_keys(np.arange(len(found)))
    begun = mixture.names.index("jsonl") * 12
    for slot in range(12):
        own = found[keys == begun + slot, :-1].tolist()
        assert own == of_stream[slot][: len(own)]
    turned = open_mixture(sections(folder, dict(reversed(WEIGHTS.items()))), Validation(fraction=0), 7)
    assert np.array_equal(read(turned, 1, 2)[0], found[: 2 * SIZE])
    assert turned.fingerprint() == mixture.fingerprint()


def test_one_table_is_read_as_data_without_tables(folder):
    keys = {"tokenizer": "byte", "streams": 12, "num_workers": 0}
    plain = open_corpus(Data(source="local", path=str(folder / "jsonl"), **keys), Validation(fraction=0), 7)
    single = open_mixture(sections(folder, {"jsonl": 1.0}), Validation(fraction=0), 7)
    [one], [other] = loaders(plain, 1), loaders(single, 1)
    for _ in range(3):
        batch, same = next(one), next(other)
        assert batch.tokens.tolist() == same.tokens.tolist()
        assert batch.cursors == same.cursors
        assert batch.sources is same.sources is None


def test_weights_that_change_are_read_from_their_sequence_on(mixture):
    weights = {"jsonl": 0.0, "parquet": 0.5, "docs": 0.5}
    changed = replace(mixture, pieces=(Piece(0, WEIGHTS), Piece(5 * SIZE, weights)))
    expected, sources, _ = read(changed, 1, 9)
    assert np.array_equal(expected[: 3 * SIZE], read(mixture, 1, 3)[0])
    counts = Counter(mixture.names[source] for source in sources[5 * SIZE :].tolist())
    assert counts["jsonl"] <= 1
    assert abs(counts["parquet"] - 2 * SIZE) <= 1
    first, _, kept = read(changed, 2, 4)
    rest, _, _ = read(changed, 3, 5, kept, 4)
    assert np.array_equal(np.concatenate([first, rest]), expected)


def test_cursors_that_cannot_be_those_of_the_mixture_are_refused(mixture):
    _, _, cursors = read(mixture, 1, 2)
    with pytest.raises(Damaged, match="its streams stand at 24"):
        loaders(mixture, 1, cursors, 3)
    moved = cursors | {"0": cursors["0"] | {"sequences": cursors["0"]["sequences"] + 1}}
    moved["12"] = moved["12"] | {"sequences": moved["12"]["sequences"] - 1}  # another source
    with pytest.raises(Damaged):
        loaders(mixture, 1, moved, 2)
    with pytest.raises(UserError, match=r"places of 4 streams. Set data.streams = 4"):
        loaders(mixture, 1, {key: cursors[key] for key in list(cursors)[:12]}, 2)


def test_a_source_that_cannot_be_opened_is_named(folder):
    (folder / "jsonl").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"data\.sources, jsonl: data\.path: .*jsonl does not exist"):
        open_mixture(sections(folder), Validation(fraction=0), 7)


def test_what_one_source_holds_out_no_other_trains_on(folder):
    copies = [json.dumps({"text": text}) + "\n" for text in rows("j", 60)]
    (folder / "copies").mkdir()
    (folder / "copies" / "all.jsonl").write_text(
        "".join([*copies, *(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 40))])
    )
    weights = {"jsonl": 0.5, "copies": 0.5}
    mixture = open_mixture(sections(folder, weights), Validation(fraction=0.1), 7)
    hashes = [
        {document.hash for document in all_documents(corpus.source) if document in corpus.held_out}
        for corpus in mixture.corpora
    ]
    assert all(hashes)
    for corpus in mixture.corpora:
        trained = {document.hash for document in all_documents(corpus.source) if document not in corpus.held_out}
        assert trained
        assert not trained & hashes[0]
        assert not trained & hashes[1]
    again = open_mixture(
        sections(folder, weights), Validation(fraction=0.5), 7, recorded=json.loads(json.dumps(mixture.record()))
    )
    assert again.fingerprint() == mixture.fingerprint()
