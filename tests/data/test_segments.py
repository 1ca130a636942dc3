"""Streams read equal parts of the corpus, whatever its files are; nothing is lost and nothing doubled."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import division, open_corpus
from swamla_titan.data.division import described, uneven
from swamla_titan.data.retry import documents_by_unit
from swamla_titan.data.segments import Cut, Part, Segments, cut_by_size, cut_counted, ring, shared_units, sizes_of
from swamla_titan.data.sources import open_source
from swamla_titan.data.sources.text import FileRange
from swamla_titan.data.streams import PackedStream, TokenCache
from swamla_titan.data.tokenizer import ByteTokenizer, with_eot

SEQ_LEN = 1024

Lengths = dict[tuple[int, int], int]  # (unit, ordinal) -> tokens


def tokens_in(segments: Segments, segment: int, lengths: Lengths) -> Iterator[tuple[int, int, int]]:
    """(unit, ordinal, place) of each token of a segment."""
    for piece in chain(*segments.slices(segment)):
        for (unit, ordinal), length in lengths.items():
            end = ordinal + 1 if piece.end is None else piece.end
            if unit != piece.part.unit or ordinal % piece.part.every != piece.part.offset:
                continue
            if piece.first <= ordinal < end:
                begin, finish = (
                    int(at * length) if isinstance(at, float) else at for at in (piece.begin, piece.finish)
                )
                yield from ((unit, ordinal, place) for place in range(length)[begin:finish])


def all_once(lengths: Lengths) -> Counter:
    return Counter((unit, ordinal, place) for (unit, ordinal), length in lengths.items() for place in range(length))


@pytest.mark.parametrize("seed", range(40))
def test_counted_segments_hold_every_token_once_and_equally_many(seed):
    rng = random.Random(seed)
    streams = rng.choice([1, 2, 3, 8, 64])
    longest = rng.choice([1, 5, 200])
    lengths = {
        (unit, ordinal): rng.choice([1, longest, rng.randint(1, longest), 500 if rng.random() < 0.02 else 1])
        for unit in range(rng.choice([1, 3, 20]))
        for ordinal in range(rng.choice([0, 1, 2, 9]) + (unit == 0))
    }
    order = list(range(20))
    rng.shuffle(order)
    rows = sorted((order.index(unit), ordinal, length) for (unit, ordinal), length in lengths.items())
    segments = cut_counted(ring(order, {}), rows, streams)
    total = segments.tokens
    assert total == sum(lengths.values())
    held = [list(tokens_in(segments, segment, lengths)) for segment in range(streams)]
    assert Counter(token for segment in held for token in segment) == all_once(lengths)
    for segment in range(streams):
        assert len(held[segment]) == (segment + 1) * total // streams - segment * total // streams
    assert Segments.from_json(order, json.loads(json.dumps(segments.to_json())), streams) == segments


@pytest.mark.parametrize("seed", range(60))
def test_segments_by_size_hold_every_token_once(seed):
    rng = random.Random(seed)
    streams = rng.choice([1, 2, 3, 8, 64])
    units = rng.choice([1, 2, 7, 63, 64, 65, 200])
    spread = rng.choice([0, 1, 3])
    sizes = [10 ** (rng.random() * spread + 1) for _ in range(units)]
    kind = rng.choice(["known", "unknown", "both"])
    documents = [
        rng.choice([1, 1, 5]) if kind == "known" or (kind == "both" and rng.random() < 0.5) else None for _ in sizes
    ]
    lengths = {(unit, n): rng.randint(1, 9) for unit in range(units) for n in range(documents[unit] or 70)}
    order = rng.sample(range(units), units)
    shared = shared_units(sizes, documents, streams)
    assert all(documents[unit] is None for unit in shared)
    segments = cut_by_size(ring(order, shared), sizes, documents, streams)
    assert Counter(token for n in range(streams) for token in tokens_in(segments, n, lengths)) == all_once(lengths)
    found = sizes_of(segments, sizes, documents)
    assert len(found) == streams
    assert sum(found) == pytest.approx(streams)
    # What can be cut is cut exactly; else a segment is off by the halves of the parts at its ends.
    if kind == "known":
        assert found == pytest.approx([1.0] * streams)
    assert max(found) < 2.6
    assert min(found) > 0 or kind == "both"
    assert Segments.from_json(order, json.loads(json.dumps(segments.to_json())), streams) == segments


def test_a_unit_of_documents_not_counted_is_shared_only_where_it_must_be():
    assert shared_units([1.0] * 64, [None] * 64, 64) == {}
    assert shared_units([1.0] * 640, [None] * 640, 64) == {}
    assert shared_units([1.0], [None], 64) == {0: 64}
    assert sorted(shared_units([1.0] * 10, [None] * 10, 64).values()) == [6] * 6 + [7] * 4
    assert shared_units([1.0, 1.0, 98.0], [1, None, 5], 4) == {}
    assert shared_units([1.0, 99.0], [1, None], 4) == {1: 3}


def test_a_document_that_a_border_cuts_is_read_in_one_piece():
    """Its beginning ends an epoch, its end begins the next one, and what is longer than a segment is one of its own."""
    segments = cut_counted(ring([0], {}), [(0, 0, 10), (0, 1, 30), (0, 2, 10)], 5)
    assert segments.cuts == [Cut(0, 0, 0), Cut(0, 1, 0), Cut(0, 1, 10), Cut(0, 1, 20), Cut(0, 2, 0)]
    segments = cut_counted(ring([0], {}), [(0, 0, 10), (0, 1, 30), (0, 2, 10)], 4)
    head, whole, tail = segments.slices(1)
    assert (head, whole) == ([], []) or head[0].begin == 2
    head, whole, tail = segments.slices(0)
    assert not head
    assert (whole[0].first, whole[0].end) == (0, 1)
    assert (tail[0].first, tail[0].begin, tail[0].finish) == (1, 0, 2)
    head, whole, tail = segments.slices(3)
    assert (head[0].first, head[0].begin, head[0].finish) == (1, 27, None)
    assert (whole[0].first, whole[0].end, tail) == (2, None, [])


class Numbered(TokenCache):
    """Instead of a token, its number in the corpus: tells which were read how often."""

    def __init__(self, corpus) -> None:
        super().__init__(corpus.tokenizer)
        self.tokenizer = corpus.tokenizer
        self.starts: dict[tuple[int, int], int] = {}
        self.total = 0
        for unit, document in documents_by_unit(corpus.source, corpus.new_retry()):
            if not document.is_empty and document not in corpus.held_out:
                self.starts[unit, document.ordinal] = self.total
                self.total += len(with_eot(self.tokenizer, document.text))

    def tokens(self, document):
        start = self.starts[document.key[1:]]
        return document.cut(np.arange(start, start + len(with_eot(self.tokenizer, document.text)), dtype=np.int32))


def read_by_epochs(corpus, seq_len: int, epochs: int) -> list[np.ndarray]:
    """How often each token was read after each epoch's worth of tokens; streams take turns."""
    cache = Numbered(corpus)
    streams = [PackedStream(corpus, number, cache) for number in range(corpus.data.streams)]
    counts, found, sequences = np.zeros(cache.total, dtype=int), [], 0
    for epoch in range(1, epochs + 1):
        while sequences * seq_len < epoch * cache.total:
            np.add.at(counts, streams[sequences % len(streams)].next(seq_len).tokens[:-1], 1)
            sequences += 1
        found.append(counts.copy())
    return found


def uneven_corpora(folder, rng) -> dict[str, dict[str, object]]:
    def text(size):
        return "".join(rng.choices("abcdefgh \n", k=size))

    def lines(sizes):
        return "".join(json.dumps({"text": text(size), "other": size}) + "\n" for size in sizes)

    for name in ("one-large", "lines", "book", "parquet", "tiny", "mixed"):
        (folder / name).mkdir()
    (folder / "one-large" / "large.txt").write_text(text(100_000))
    for number in range(100):
        (folder / "one-large" / f"{number}.txt").write_text(text(1000))
    for number in range(3):
        (folder / "lines" / f"{number}.jsonl").write_text(lines(rng.choices([1, 30, 3000], k=50 * (1 + number))))
    (folder / "book" / "book.txt").write_text(text(50_000))
    (folder / "tiny" / "tiny.md").write_text("too little for one sequence of each stream")
    rows = [text(rng.choice([0, 5, 2000])) for _ in range(90)]
    pq.write_table(pa.table({"text": rows}), folder / "parquet" / "a.parquet", row_group_size=40)
    (folder / "mixed" / "a.jsonl").write_text(lines([10] * 20))
    (folder / "mixed" / "b.txt").write_text("ä" * 9000)
    (folder / "mixed" / "c.txt").write_text("- - -\n" * 500)
    return {
        "one-large": {"streams": 64},
        "lines": {"streams": 16},
        "lines, in order": {"streams": 7, "shuffle_documents": 1, "path": str(folder / "lines")},
        "book": {"streams": 64},
        "tiny": {"streams": 8},
        "parquet": {"streams": 5, "shuffle_documents": 4},
        "mixed": {"streams": 3, "text_separator": "- -", "shuffle_documents": 2},
        "hugging face": {"streams": 6, "source": "huggingface", "path": str(folder / "lines")},
        "gpt2": {"streams": 9, "tokenizer": "gpt2", "path": str(folder / "lines")},
    }


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_after_n_epochs_every_token_was_read_n_times(tmp_path, fraction):
    for name, keys in uneven_corpora(tmp_path, random.Random(5)).items():
        settings = {"source": "local", "path": str(tmp_path / name), "tokenizer": "byte", "num_workers": 0, **keys}
        if fraction and name in ("book", "tiny"):
            continue
        corpus = open_corpus(Data(**settings), Validation(fraction=fraction), 3)
        for epoch, counts in enumerate(read_by_epochs(corpus, 64, 3), start=1):
            assert corpus.segments[0].tokens == len(counts)
            # At the seams a stream may be ahead, or the next one behind, by a part of a sequence.
            off = np.abs(counts - epoch)
            assert off.sum() <= 64 * corpus.data.streams, name
            if len(counts) > 64 * corpus.data.streams:
                assert off.max() <= 1, name


def test_a_large_corpus_is_divided_by_estimate_and_the_error_does_not_grow(tmp_path, maker, monkeypatch):
    monkeypatch.setattr(division, "COUNTED_BYTES", 1000)
    rng = random.Random(9)
    for name, keys in uneven_corpora(tmp_path, rng).items():
        if name in ("tiny", "hugging face", "gpt2", "mixed"):  # less than a range for each stream is not a large corpus
            continue
        settings = {"source": "local", "path": str(tmp_path / name), "tokenizer": "byte", "num_workers": 0, **keys}
        corpus = open_corpus(Data(**settings), Validation(fraction=0), 3)
        assert corpus.segments[0].tokens is None
        off = [
            np.abs(counts - epoch).sum() / len(counts)
            for epoch, counts in enumerate(read_by_epochs(corpus, 64, 12), start=1)
        ]
        assert max(off[6:]) <= 1.3 * max(off[:6]) + 0.02, name
        assert max(off) < 0.5, name


def test_tokens_in_a_byte_are_looked_at_where_a_corpus_is_not_counted(tmp_path, monkeypatch):
    """Two files of equal size, one with three times as many tokens of GPT-2 as the other."""
    monkeypatch.setattr(division, "COUNTED_BYTES", 1000)
    (tmp_path / "words.txt").write_text("because " * 20_000)
    (tmp_path / "marks.txt").write_text("#a" * 80_000)
    data = Data(source="local", path=str(tmp_path), tokenizer="gpt2", streams=10, shuffle_documents=1)
    corpus = open_corpus(data, Validation(fraction=0), 0)
    lengths = [
        len(corpus.tokenizer.encode(document.text))
        for _, document in documents_by_unit(corpus.source, corpus.new_retry())
    ]
    assert lengths[0] > 2 * lengths[1]
    first = [cut for cut in corpus.segments[0].cuts if cut.part == 0]
    assert len(first) == pytest.approx(10 * lengths[0] / sum(lengths), abs=1)


def test_a_data_set_that_proves_too_large_to_be_counted_is_not_tokenized(maker, monkeypatch):
    maker.write(["x" * 100] * 50, files=2)
    monkeypatch.setattr(division, "COUNTED_BYTES", 4000)
    monkeypatch.setattr(ByteTokenizer, "encode_array", lambda *args: pytest.fail("tokenized"))
    corpus = maker.open(source="huggingface", streams=2)
    assert corpus.segments[0].tokens is None


def test_what_else_stands_in_a_line_is_no_text_where_a_corpus_is_not_counted(tmp_path, monkeypatch):
    """Two files of equal size: in one of them nine of ten bytes are of another field."""
    monkeypatch.setattr(division, "COUNTED_BYTES", 1000)
    rows = {"a": {"text": "t" * 1000}, "b": {"text": "t" * 80, "other": "o" * 909}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 1000)
    data = Data(source="local", path=str(tmp_path), tokenizer="byte", streams=8, shuffle_documents=1)
    corpus = open_corpus(data, Validation(fraction=0), 0)
    units = [unit for unit in range(corpus.source.num_units) if corpus.source.unit_files[unit] == "a.jsonl"]
    within = [cut for cut in corpus.segments[0].cuts if cut.part < len(units)]
    assert len(within) == 8  # 1,001 of 1,082 tokens are of this file


@pytest.mark.parametrize("streams", [3, 16])
def test_large_files_of_many_documents_are_divided_finely(tmp_path, monkeypatch, streams):
    monkeypatch.setattr(division, "COUNTED_BYTES", 1000)
    rng = random.Random(1)
    for number in range(12):
        size = rng.randint(20_000, 900_000)
        (tmp_path / f"{number}.jsonl").write_text('{"text": "twelve bytes"}\n' * (size // 25))
    data = Data(source="local", path=str(tmp_path), tokenizer="byte", streams=streams)
    corpus = open_corpus(data, Validation(fraction=0), 0)
    found = sizes_of(corpus.segments[0], corpus.source.unit_sizes, [None] * corpus.source.num_units)
    assert max(found) < 1.06
    assert min(found) > 0.94


def test_ranges_inside_one_long_document_do_not_read_it(tmp_path, monkeypatch):
    """Each would else look for the document's end: work that grows with the square of its length."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * (4 << 20)}) + "\n" + json.dumps({"text": "y"}) + "\n")
    source = open_source(Data(source="local", path=str(path), tokenizer="byte", streams=64))
    sizes = []
    fill = FileRange._fill
    monkeypatch.setattr(FileRange, "_fill", lambda *args: sizes.append(args[-1]) or fill(*args))
    read = [document.text[:1] for unit in range(source.num_units) for document in source.read(unit)]
    assert read == ["x", "y"]
    assert source.num_units > 100
    assert len(sizes) < 300  # of the one range that it begins in


def test_files_of_other_kinds_of_text_are_no_reason_for_a_warning(tmp_path, monkeypatch):
    """A file that has more tokens in a byte is divided among more streams."""
    monkeypatch.setattr(division, "COUNTED_BYTES", 1000)
    for name, text in (("words", "because "), ("marks", "#a&b(c)d")):
        rows = pa.table({"text": [text * 250] * 40})
        pq.write_table(rows, tmp_path / f"{name}.parquet", compression="none", use_dictionary=False)
    corpus = open_corpus(
        Data(source="local", path=str(tmp_path), tokenizer="gpt2", streams=8), Validation(fraction=0), 0
    )
    assert uneven(corpus.source, corpus.segments[0], 64) is None


def test_the_number_of_streams_that_is_even_is_found_quickly():
    class Shards:
        num_units, unit_sizes, text_bytes = 1_650, [1] * 1_650, None

        def num_documents(self, unit):
            return None

    streams = 6_553
    segments = cut_by_size(
        ring(range(1_650), shared_units([1.0] * 1_650, [None] * 1_650, streams)),
        [1.0] * 1_650,
        [None] * 1_650,
        streams,
    )
    message = uneven(Shards(), segments, 64)
    assert message
    assert "data.streams = 6600 is even" in message


def test_what_cannot_be_even_is_said_with_the_number_of_streams_that_would_be(tmp_path, maker, monkeypatch):
    maker.write(["x" * 1000])
    corpus = maker.open(streams=8)
    (segments,) = corpus.segments
    assert uneven(corpus.source, segments, 125) is None
    message = uneven(corpus.source, segments, 250)
    assert message
    assert "1,001 tokens" in message
    assert "data.streams = 4 reads it evenly" in message
    assert described(segments) == "1,001 tokens to train on, 125 for each of 8 streams"
    # shards of unknown size: 3 over 4 streams
    monkeypatch.setattr(division, "COUNTED_UNITS", 0)
    maker.write([f"{number} " * 50 for number in range(90)], files=3)
    corpus = maker.open(source="huggingface", streams=4)
    (segments,) = corpus.segments
    assert corpus.source.num_units == 3
    assert segments.parts == [Part(0, 2, 0), Part(0, 2, 1), *segments.parts[2:]] or len(segments.parts) == 4
    message = uneven(corpus.source, segments, 64)
    assert message
    assert "one stream's part is 2.0 times another's" in message
    assert "data.streams = 3 is even" in message
    assert described(segments) == "4 streams, divided by size"
    even = maker.open(source="huggingface", streams=3)
    assert uneven(even.source, even.segments[0], 64) is None


def test_what_one_process_counted_is_what_the_others_read(maker):
    maker.write(maker.texts(40), files=3)
    corpus = maker.open()
    other = maker.open().with_segments(corpus.segments)
    assert other.segments == corpus.segments
    assert json.loads(json.dumps(other.record())) == json.loads(json.dumps(corpus.record()))


def share_of(corpus, letter, size):
    """The share of a letter in as many tokens as the corpus has, dealt evenly over the streams."""
    streams = corpus.data.streams
    found = total = 0
    for number in range(streams):
        stream = PackedStream(corpus, number, TokenCache(corpus.tokenizer))
        for _ in range(size // SEQ_LEN // streams):
            tokens = stream.next(SEQ_LEN).tokens[1:]
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
def test_a_small_file_beside_a_data_set(maker, kind):
    (maker.folder / "notes.md").write_text("T" * 3000)
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


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1},
        {"tokens": "many"},
        {"cuts": []},
        {"cuts": [[0, 0, 0]] * 3},
        {"cuts": [[0, 0, 0], [9, 0, 0], [9, 0, 0], [9, 0, 0]]},
        {"cuts": [[0, 0, 0], [1, 0, 0], [0, 5, 0], [2, 0, 0]]},
        {"cuts": [[0, 0, 0], [0, 1, -2], [0, 2, 0], [2, 0, 0]]},
        {"cuts": [[0, 0]] * 4},
        {"cuts": [["0", 0, 0]] * 4},
        {"shared": [[7, 2]]},
        {"shared": [[0, 0]]},
        {"shared": [[0, 2**40]]},
        {"other": 1},
    ],
    ids=str,
)
def test_segments_of_a_checkpoint_that_do_not_fit_are_refused(maker, change):
    maker.write(maker.texts(30), files=3)
    corpus = maker.open()
    recorded = corpus.segments[0].to_json()
    assert corpus.with_recorded_segments([json.loads(json.dumps(recorded))]).segments == corpus.segments
    with pytest.raises(ValueError, match=r"segments|cuts|tokens|shared|other"):
        corpus.with_recorded_segments([recorded | change])
