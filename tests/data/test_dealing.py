"""Streams own equal parts of the corpus, whatever its units are; nothing is lost and nothing doubled."""

import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.data.dealing import Share, deal
from swamla_titan.data.packing import PackedStream, TokenCache
from swamla_titan.data.sources import open_source

SEQ_LEN = 1024


@pytest.mark.parametrize("seed", range(200))
def test_any_sizes(seed):
    rng = random.Random(seed)
    streams = rng.choice([1, 2, 3, 8, 64])
    spread = rng.choice([0, 1, 6])
    sizes = [int(10 ** (rng.random() * spread + 1)) for _ in range(rng.choice([1, 2, 5, 30, 63, 64, 65, 300]))]
    if rng.random() < 0.3:
        sizes[0] = rng.choice([0, sum(sizes), 50 * sum(sizes)])
    dealt = deal(sizes, streams)
    assert len(dealt) == streams
    assert all(dealt)
    owners = Counter((share.unit, share.offset, share.every) for part in dealt for share in part)
    for unit in range(len(sizes)):
        every = next(share.every for part in dealt for share in part if share.unit == unit)
        assert {share: count for share, count in owners.items() if share[0] == unit} == {
            (unit, offset, every): 1 for offset in range(every)
        }
    # Streams give equally many sequences: a unit's weight is off by as much as its stream's load.
    part = sum(sizes) / streams
    for shares in dealt:
        load = sum(sizes[share.unit] / share.every for share in shares)
        assert part / 2.5 <= load <= 2.5 * part or part < 10
    assert deal(sizes, streams) == dealt


def test_equal_units_are_dealt_in_turns():
    assert deal([1] * 7, 3) == [[Share(u, 1, 0) for u in units] for units in ([0, 3, 6], [1, 4], [2, 5])]


def test_a_large_unit_is_spread_over_the_streams():
    # a batch smaller than the number of streams takes neighbours, and should not be all of one unit
    units = [part[0].unit for part in deal([30, 10], 8)]
    assert sorted(units) == [0] * 6 + [1] * 2
    assert set(units[:4]) == set(units[4:]) == {0, 1}


def share_of(corpus, letter, size):
    """The share of a letter in as many tokens as the corpus has, dealt evenly over the streams."""
    streams = corpus.data.streams
    found = total = 0
    for number in range(streams):
        stream = PackedStream(corpus, number, SEQ_LEN, TokenCache(corpus.tokenizer))
        for _ in range(size // SEQ_LEN // streams):
            tokens = stream.next_sequence()[1:]
            found += int((tokens == ord(letter)).sum())
            total += SEQ_LEN
    return found / total


def test_small_files_beside_one_row_group(maker):
    for number in range(63):
        (maker.folder / f"{number}.txt").write_text("t" * 40)
    rows = [f"{number} " + "p" * 1000 for number in range(2000)]
    pq.write_table(pa.table({"text": rows}), maker.folder / "large.parquet", compression="none")
    corpus = maker.open(streams=64)
    assert corpus.source.num_units == 64
    # by size 0.0013
    assert 0.0005 < share_of(corpus, "t", 2_000_000) < 0.005


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_readme_beside_a_data_set(maker, kind):
    (maker.folder / "README.md").write_text("T" * 3000)
    rows = ["p" * 1000 + str(number) for number in range(3000)]
    if kind == "jsonl":
        (maker.folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"text": rows}), maker.folder / "a.parquet", row_group_size=300, compression="none")
    # by size 0.001
    assert 0 < share_of(maker.open(streams=64), "T", 3_000_000) < 0.004


def test_thirds_in_units_of_many_sizes(maker):
    for letter, group in [("a", 1000), ("b", 30), ("c", 300)]:
        rows = [f"{number} " + letter * 500 for number in range(1000)]
        path = maker.folder / f"{letter}.parquet"
        pq.write_table(pa.table({"text": rows}), path, row_group_size=group, compression="none")
    corpus = maker.open(streams=6)
    for letter in "abc":
        assert share_of(corpus, letter, 1_500_000) == pytest.approx(1 / 3, abs=0.1)


def test_sizes_of_row_groups_are_in_the_fingerprint(maker):
    path = maker.folder / "a.parquet"

    def write(lengths):
        table = pa.table({"text": [str(number) * length for number, length in enumerate(lengths)]})
        pq.write_table(table, path, row_group_size=1, compression="none", write_statistics=False)
        return path.stat().st_size

    one = write([1000, 2000])
    before = maker.open(streams=2)
    assert write([2000, 1000]) == one
    assert maker.open(streams=2).fingerprint() != before.fingerprint()
    assert open_source(before.data).unit_sizes != before.source.unit_sizes
