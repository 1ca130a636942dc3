"""What every kind of source must do: each document once an epoch, the same on any ranks, resumed exactly."""

import gzip
import json
import lzma
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data
from swamla_titan.data import division, open_corpus
from swamla_titan.tools.prepare import prepare
from tests.data.conftest import NO_VALIDATION
from tests.data.store import serving
from tests.data.test_loader import SEQ_LEN, all_cursors, global_batch, loaders

# Of many lengths, and each recognisable wherever it is cut.
TEXTS = [f"<{i}:" + "abcdefg"[i % 7] * (i * 37 % 61) + ">" for i in range(90)]
TOKENS = sum(len(text) + 1 for text in TEXTS)
FILES, SIZE = 6, 5  # files of the corpus, sequences of a step


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=4)
    return sink.getvalue().to_pybytes()


def separated(texts: list[str]) -> bytes:
    return "--".join(texts).encode()


LOCAL: dict[str, Any] = {"source": "local", "text_separator": "--"}
HUB: dict[str, Any] = {"source": "huggingface"}
# By kind: the ending of its files, their content, and the keys of [data].
KINDS = {
    "txt": ("txt", separated, LOCAL),
    "jsonl": ("jsonl", lines, LOCAL),
    "parquet": ("parquet", parquet, LOCAL),
    "jsonl.gz": ("jsonl.gz", lambda texts: gzip.compress(lines(texts), mtime=0), LOCAL),
    "jsonl.zst": ("jsonl.zst", lambda texts: pa.compress(lines(texts), "zstd", asbytes=True), LOCAL),
    "txt.xz": ("txt.xz", lambda texts: lzma.compress(separated(texts)), LOCAL),
    "folder of Hugging Face, parquet": ("parquet", parquet, HUB),
    "folder of Hugging Face, jsonl.gz": ("jsonl.gz", lambda texts: gzip.compress(lines(texts), mtime=0), HUB),
    "shards": ("jsonl", lines, LOCAL),
}
STORES = ["txt", "jsonl", "parquet", "jsonl.zst"]


@pytest.fixture(params=[*KINDS, *(f"store, {kind}" for kind in STORES)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The keys of [data] for TEXTS in files of one kind."""
    ending, content, keys = KINDS[request.param.removeprefix("store, ")]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"part-{number}.{ending}").write_bytes(content(TEXTS[number::FILES]))
    shared = keys | {"tokenizer": "byte", "streams": 4, "num_workers": 0, "shuffle_documents": 8}
    if request.param.startswith("store, "):
        with serving(folder) as url:
            yield shared | {"path": url}
    elif request.param == "shards":
        assert prepare(Data(**shared, path=str(folder)), str(tmp_path / "shards"), processes=1) == 0
        yield shared | {"source": "shards", "path": str(tmp_path / "shards"), "text_separator": ""}
    else:
        yield shared | {"path": str(folder)}


@pytest.mark.parametrize("counted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_twice_over_epochs_by_1_then_4_then_3_ranks(settings, monkeypatch, counted):
    """And opened again each time, as a resumed run does, with the segments that it recorded."""
    if not counted:
        if settings["source"] == "shards":
            pytest.skip("their tokens are known")
        monkeypatch.setattr(division, "COUNTED_BYTES", 0)
    steps = math.ceil(2.5 * TOKENS / (SIZE * SEQ_LEN))
    corpus = open_corpus(Data(**settings), NO_VALIDATION, 7)
    assert (corpus.segments[0].tokens is not None) == counted
    alone = loaders(corpus, SIZE, 1)
    expected: dict[int, Any] = {}
    for _ in range(steps):
        expected |= global_batch(alone)

    found: dict[int, Any] = {}
    cursors, done = None, 0
    for ranks, until in ((1, steps // 4), (4, steps * 3 // 4), (3, steps)):
        record = json.loads(json.dumps(corpus.record()))
        corpus = open_corpus(Data(**settings), NO_VALIDATION, 7, recorded=record)
        assert not corpus.change
        readers = loaders(corpus, SIZE, ranks, cursors=cursors, steps=done)
        for _ in range(done, until):
            found |= global_batch(readers)
        cursors, done = all_cursors(readers), until
    assert found == expected
    assert cursors == all_cursors(alone)


def test_each_document_is_read_once_an_epoch(settings):
    corpus = open_corpus(Data(**settings), NO_VALIDATION, 7)
    alone = loaders(corpus, SIZE, 1)
    streams: dict[int, list[int]] = {}
    for _ in range(math.ceil(2.5 * TOKENS / (SIZE * SEQ_LEN))):
        for number, (tokens, targets) in global_batch(alone).items():
            stream = streams.setdefault(number % 4, tokens[:1])
            stream += targets
    read = Counter(
        text for row in streams.values() for text in bytes(255 if t == 256 else t for t in row).split(b"\xff")
    )
    # Streams take equally many tokens: after 2.5 epochs' worth each document was read twice or three times, but those
    # that a border of segments or the end cuts.
    often = [read[text.encode()] for text in TEXTS]
    assert sum(2 <= count <= 3 for count in often) >= len(TEXTS) - 12
    assert max(often) <= 4
