"""Compressed files: they give the documents of the file that they stand for, or are named as what they are."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import open_corpus
from swamla_titan.data.document import MIB
from swamla_titan.data.faults import DataFault
from swamla_titan.data.retry import all_documents
from swamla_titan.data.sources import text as text_source
from swamla_titan.data.sources.text import ENDLESS, FileRange
from tests.data.test_sources import check_positions, local, refused, texts

COMPRESS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
DOCUMENTS = [f"<{i}:" + "abcdefg"[i % 7] * (i * 37 % 61) + ">" for i in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    "name, data, keys",
    [
        ("a.jsonl", LINES, {}),
        ("a.JSON", LINES, {}),
        ("a.txt", "--".join(DOCUMENTS).encode(), {"text_separator": "--"}),
        ("a.md", b"\xef\xbb\xbf" + "naïve".encode() * 9, {}),
    ],
)
def test_it_gives_the_documents_of_the_file_that_was_compressed(tmp_path, monkeypatch, ending, name, data, keys):
    monkeypatch.setattr(text_source, "CHUNK", 100)
    for kind in ("plain", "compressed"):
        (tmp_path / kind).mkdir()
    (tmp_path / "plain" / name).write_bytes(data)
    (tmp_path / "compressed" / f"{name}.{ending}").write_bytes(COMPRESS[ending](data))
    source = local(tmp_path / "compressed", **keys)
    assert texts(source) == texts(local(tmp_path / "plain", **keys))
    assert source.text_bytes == pytest.approx(len(data), rel=1e-3)
    if len(data) < 10_000:
        check_positions(source)


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_empty_file_is_empty_compressed_too(tmp_path, ending):
    (tmp_path / f"a.jsonl.{ending}").write_bytes(COMPRESS[ending](b""))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert texts(local(tmp_path)) == DOCUMENTS


@pytest.mark.parametrize("ending", COMPRESS)
def test_files_of_several_parts_are_read_to_the_last(tmp_path, ending):
    """As tools that compress in parallel write them, or cat."""
    half = LINES.index(b"\n", len(LINES) // 2) - 7
    parts = LINES[:half], b"", LINES[half:]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(b"".join(map(COMPRESS[ending], parts)))
    assert texts(local(tmp_path)) == DOCUMENTS


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_large_file_is_known_by_its_beginning(tmp_path, ending):
    """Its text is estimated, and its first record checked, without reading it all."""
    chance = "".join(chr(97 + i * i % 26) for i in range(997))
    rows = [f"{i} {chance[i % 990 :]}" for i in range(3000)]
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (tmp_path / f"a.jsonl.{ending}").write_bytes(COMPRESS[ending](data))
    assert 0.3 < local(tmp_path).text_bytes / len(data) < 3
    assert 'Set data.text_key to one of the fields there: "text"' in refused(tmp_path, text_key="body")


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_what_is_damaged_is_read_up_to_the_damage_and_named(tmp_path, ending, damage):
    blocks = [json.dumps({"text": f"{i}-" + "abcdefghij"[i % 10] * (i % 997)}) + "\n" for i in range(4000)]
    data = "".join(blocks).encode()
    content = bytearray(COMPRESS[ending](data))
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(content)
    source = local(tmp_path)
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(byte ^ 0x5A for byte in content[middle : middle + 64])
        path.write_bytes(content)
    found: list[str] = []
    with pytest.raises(DataFault) as raised:
        found.extend(document.text for document in source.read(0))  # keeps those before the fault
    assert f"a.jsonl.{ending}" in str(raised.value)
    assert raised.value.may_pass or damage == "changed"  # a byte may also change the text, which is then no JSON
    assert len(found) > 100 or ending != "gz"  # other formats have blocks of up to 900 kB, which are read as a whole
    assert found == [json.loads(line)["text"] for line in blocks[: len(found)]]


@pytest.mark.parametrize(
    "content, part",
    [
        (b"plain text, no more\n" * 99, "it is not whole .gz data but begins with b'plain text"),
        (COMPRESS["zst"](LINES), "it is not whole .gz data but Zstandard data"),
        (COMPRESS["gz"]("Words.\n".encode("utf-16") * 99), "it is text in UTF-16"),
        (COMPRESS["gz"](b"[1, 2]\n"), "line 1: expected a JSON object, found a list"),
        (COMPRESS["gz"](b'\n\n{"body": 1}\n'), 'line 3: no field "text"'),
    ],
)
def test_what_is_something_else_is_named_before_the_run_begins(tmp_path, content, part):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(content)
    assert part in refused(tmp_path)
    source = local(tmp_path, on_error="skip_file")
    assert texts(source) == DOCUMENTS
    assert [fault.file.rpartition("/")[2] for fault in source.unreadable] == ["b.jsonl.gz"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_short_file_that_was_cut_is_said_to_be(tmp_path, ending):
    whole = COMPRESS[ending](b'{"text": "a"}\n')
    (tmp_path / f"b.jsonl.{ending}").write_bytes(whole[:-3])
    assert f"its .{ending} data are not whole (they end too early" in refused(tmp_path)


def test_a_text_that_decompresses_to_more_than_a_document_may_have_is_refused(tmp_path):
    """And is not read to its end, which might not fit into memory."""
    data = gzip.compress(b"a" * (3 * MIB), mtime=0)
    (tmp_path / "a.txt.gz").write_bytes(data)
    corpus = open_corpus(Data(source="local", path=str(tmp_path), tokenizer="byte"), Validation(fraction=0), 0)
    assert len(next(all_documents(corpus.source)).text) == 3 * MIB
    for keys in ({}, {"text_separator": "-"}):
        with pytest.raises(DataFault, match=r"a document is larger than data\.max_document_mib = 1"):
            texts(local(tmp_path, max_document_mib=1, **keys))


def test_a_file_that_changes_under_a_reader_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(COMPRESS["gz"](LINES))
    source = local(tmp_path)
    path.write_bytes(COMPRESS["gz"](LINES + LINES[:999]))
    with pytest.raises(DataFault, match=r"a\.jsonl\.gz: it has .* bytes; when the run began, it had"):
        texts(source)


def test_places_in_a_text_are_those_of_its_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(COMPRESS["gz"](LINES + b"{no JSON\n"))
    size = path.stat().st_size
    with pytest.raises(DataFault, match="line 201: not valid JSON"):
        list(FileRange(str(path), size, 0, ENDLESS, b"\n", MIB, "text", ".gz").read(None, 1, 0))
