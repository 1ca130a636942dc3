"""What is read from disk, in which units, and every message about input that cannot be read."""

import dataclasses
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.corpus import open_corpus
from swamla_titan.data.document import MIB
from swamla_titan.data.retry import all_documents
from swamla_titan.data.sources import open_source, pinned
from swamla_titan.data.sources.text import FileRange
from swamla_titan.errors import RunFailed, UserError


def local(path, **keys):
    return open_source(Data(**({"source": "local", "path": str(path), "streams": 4} | keys)))


def texts(source, **keys):
    return [document.text for unit in range(source.num_units) for document in source.read(unit, **keys)]


def check_positions(source):
    """Reading on from any document's position gives what follows it, and shares of a unit add up to it."""
    for unit in range(source.num_units):
        documents = list(source.read(unit))
        assert [document.ordinal for document in documents] == list(range(len(documents)))
        for document in documents:
            position = json.loads(json.dumps(document.position))
            after = [other.text for other in source.read(unit, position)]
            assert after == [other.text for other in documents[document.ordinal + 1 :]]
        for offset in range(3):
            part = [document.text for document in source.read(unit, None, 3, offset)]
            assert part == [document.text for document in documents[offset::3]]
        if len(documents) > 2:
            rest = source.read(unit, documents[0].position, 2, 0)
            assert [document.ordinal for document in rest] == list(range(2, len(documents), 2))


def test_builtin_topics_in_order():
    from pydoc_data.topics import topics

    source = open_source(Data(source="builtin"))
    assert texts(source) == [topics[name] for name in sorted(topics)]
    check_positions(source)


def test_folder_of_all_kinds(tmp_path):
    (tmp_path / "b.txt").write_text("text b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.MD").write_text("text x")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2", "n": 1}')
    (tmp_path / "d.json").write_text('{"text": "d1"}\r\n')
    pq.write_table(pa.table({"text": ["e1", None, "e2"]}), tmp_path / "e.parquet", row_group_size=2)
    for hidden in (".hidden.txt", "notes.doc"):
        (tmp_path / hidden).write_text("not read")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/x.txt").write_text("not read")
    source = local(tmp_path)
    assert texts(source) == ["text x", "text b", "c1", "c2", "d1", "e1", "", "e2"]
    check_positions(source)


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert texts(local(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize("separator", ["\n\n", "---", "<|doc|>", "x"])
def test_separator_splits_a_file_the_same_way_in_any_ranges(tmp_path, separator):
    documents = [f"number {i}" + "." * (i % 23) for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_text(separator.join(documents))
    size = path.stat().st_size
    for step in (1, 7, 50, size):
        ranges = [
            FileRange(str(path), size, start, min(size, start + step), separator.encode(), MIB)
            for start in range(0, size, step)
        ]
        assert [document.text for part in ranges for document in part.read(None, 1, 0)] == documents


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_separator_that_overlaps_itself_loses_and_doubles_nothing(tmp_path, cut):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n\n\ntwo\n\n\nthree")
    size = path.stat().st_size
    ranges = [FileRange(str(path), size, a, b, b"\n\n", MIB) for a, b in [(0, cut), (cut, size)]]
    found = [document.text.strip() for part in ranges for document in part.read(None, 1, 0)]
    assert found == ["one", "two", "three"]


def test_separated_files_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.sources.text.CHUNK", 5)
    documents = [f"doc {i} " + "y" * (i * 7 % 31) for i in range(30)]
    (tmp_path / "a.txt").write_text("<|sep|>".join(documents))
    source = local(tmp_path, text_separator="<|sep|>")
    assert texts(source) == documents
    check_positions(source)


def test_large_jsonl_is_cut_in_units(tmp_path, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.sources.local.RANGES_PER_STREAM", 4)
    rows = [f"{i} " + "z" * 997 for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = local(tmp_path, streams=2)  # a megabyte in ranges of an eighth
    assert source.num_units == 8
    assert texts(source) == rows
    assert local(tmp_path, streams=64).num_units == 62  # never less than 16 KiB each
    large = local(tmp_path, streams=2, max_document_mib=1)
    assert large.fingerprint == source.fingerprint


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    one, two = local(tmp_path / "one"), local(tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    (tmp_path / "two/a.txt").write_text("other size")
    assert local(tmp_path / "two").fingerprint != one.fingerprint


def test_bytes_that_are_no_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff \xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "na\xefve \\ud800"}\n')
    pq.write_table(pa.table({"text": [b"ok", b"\xff"]}), tmp_path / "c.parquet")
    found = list(all_documents(local(tmp_path)))
    assert [document.text for document in found] == ["caf\ufffd and \ufffd \ufffd", "na\ufffdve \ufffd", "ok", "\ufffd"]
    assert [document.replaced for document in found] == [2, 2, 0, 1]


def refused(path, **keys):
    with pytest.raises(UserError) as error:
        open_corpus(Data(**({"source": "local", "path": str(path), "tokenizer": "byte"} | keys)), Validation(), 0)
    return str(error.value)


def test_missing_path(tmp_path):
    assert f"data.path: {tmp_path}/none does not exist" in refused(tmp_path / "none")
    assert "data.path is empty" in refused("")


def test_link_to_nothing(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert f"{tmp_path}/a.txt: cannot be read: No such file" in refused(tmp_path)


def test_unknown_kind(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    for path in (tmp_path / "a.doc", tmp_path):
        message = refused(path)
        assert str(path) in message
        assert ".jsonl" in message


def test_what_is_read_and_what_is_left_out_is_described(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1200)
    (tmp_path / "notes.doc").write_text("x")
    assert local(tmp_path).description == "1 file, 1.2 kB in 1 unit; left out: 1 file of unknown kind (notes.doc)"
    assert local(tmp_path / "a.txt").description == "1 file, 1.2 kB in 1 unit"
    assert "topics" in open_source(Data(source="builtin")).description
    assert "units" not in open_source(Data(source="huggingface", path=str(tmp_path))).description


def test_compressed_files_of_other_kinds_are_not_left_out(tmp_path):
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "b.jsonl.lz4").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "b.jsonl.lz4"):
        message = refused(path)
        for part in ("b.jsonl.lz4", "Decompress", ".gz, .bz2, .xz, .zst"):
            assert part in message


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.txt").write_text("text x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "circle").symlink_to(folder)
    (folder / "one").symlink_to(tmp_path / "elsewhere")
    (folder / "two").symlink_to(tmp_path / "elsewhere")
    assert texts(local(folder)) == ["text x"]


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    assert f"{tmp_path}: there is no text in it" in refused(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    assert "there is no text in it" in refused(tmp_path / "b.jsonl")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    # a root user may read everything, so the refusal is made here
    monkeypatch.setattr("builtins.open", _no_permission)
    message = refused(tmp_path)
    assert "a.txt: cannot be read: Permission denied" in message


def _no_permission(path, *args):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed cannot be read" in refused(tmp_path)


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"text": "cut', ["line 3", "not valid JSON"]),
        ('["text"]', ["line 3", "expected a JSON object"]),
        ('{"body": "x", "id": 1}', ["line 3", 'no field "text"', '"body", "id"', "data.text_key"]),
        ('{"text": 5}', ["line 3", "not a string but 5"]),
        ("[" * 100_000, ["line 3", "not valid JSON"]),
    ],
)
def test_bad_json_line(tmp_path, line, parts):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    message = refused(path)
    for part in [str(path), *parts]:
        assert part in message


def test_too_large_documents_are_refused_before_they_are_read(tmp_path):
    huge = 5 << 30  # sparse: takes no room on disk, and would not fit in memory here
    for name in ("a.txt", "b.jsonl", "c.txt"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "fine"}\n{"text": "' if name == "b.jsonl" else b"fine<sep>")
            file.truncate(huge)
    message = refused(tmp_path / "a.txt", max_document_mib=2)
    for part in ("a.txt", "5120.0 MiB", "data.max_document_mib = 2", "data.text_separator"):
        assert part in message
    assert "b.jsonl, line 2: a document is larger" in refused(tmp_path / "b.jsonl", max_document_mib=2)
    assert "c.txt, from byte 9" in refused(tmp_path / "c.txt", max_document_mib=2, text_separator="<sep>")
    # the range that starts inside of it refuses as well, in whatever stream it is read
    source = local(tmp_path / "c.txt", max_document_mib=2, text_separator="<sep>")
    with pytest.raises(UserError, match=r"c\.txt, from byte 16777216: a document is larger"):
        next(source.read(1))


def test_too_large_row(tmp_path):
    pq.write_table(pa.table({"text": ["fine", "x" * (MIB + 1)]}), tmp_path / "a.parquet")
    message = refused(tmp_path, max_document_mib=1)
    assert "a.parquet, row 1 of row group 0: a document of 1.0 MiB" in message


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    assert f"{path}: not a whole parquet file" in refused(path)
    pq.write_table(pa.table({"text": [f"row {i} {os.urandom(40).hex()}" for i in range(5000)]}), path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    assert f"{path}: not a whole parquet file" in refused(path)
    data[100:2000] = os.urandom(1900)
    path.write_bytes(data)
    assert str(path) in refused(path)


def test_parquet_columns(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    message = refused(tmp_path)
    for part in ("a.parquet", 'no column "text"', "body, n", "data.text_key"):
        assert part in message
    assert "does not hold strings but int64" in refused(tmp_path, text_key="n")
    assert texts(local(tmp_path, text_key="body")) == ["a"]


def test_parquet_units_are_row_groups(tmp_path):
    rows = [f"row {i}" for i in range(25)]
    table = pa.table({"text": pa.array(rows).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    source = local(tmp_path)
    assert source.num_units == 3
    assert texts(source) == rows
    check_positions(source)


@pytest.fixture(params=["parquet", "jsonl"])
def dataset_folder(request, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [[f"file {number} row {i}" for i in range(23)] for number in range(2)]
    for number, part in enumerate(rows):
        if request.param == "parquet":
            table = pa.table({"id": list(range(23)), "text": part})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=5)
        else:
            lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(part)]
            (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder, rows[0] + rows[1]


def test_huggingface_reads_and_resumes(dataset_folder):
    folder, rows = dataset_folder
    source = open_source(Data(source="huggingface", path=str(folder)))
    assert source.num_units >= 2
    assert texts(source) == rows
    check_positions(source)
    moved = folder.parent / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    assert open_source(Data(source="huggingface", path=str(moved))).fingerprint == source.fingerprint
    other = open_source(Data(source="huggingface", path=str(moved), text_key="id"))
    assert other.fingerprint != source.fingerprint


def test_huggingface_fingerprint_follows_the_content_of_a_folder(dataset_folder):
    folder, _ = dataset_folder
    before = open_source(Data(source="huggingface", path=str(folder))).fingerprint
    path = next(folder.glob("0.*"))
    (folder / f"2{path.suffix}").write_bytes(path.read_bytes())
    (folder / f"1{path.suffix}").unlink()
    assert open_source(Data(source="huggingface", path=str(folder))).fingerprint != before


def test_huggingface_reads_one_commit_of_the_hub(dataset_folder, monkeypatch, caplog):
    import datasets
    import huggingface_hub

    local_dataset = datasets.load_dataset(str(dataset_folder[0]), split="train", streaming=True)
    asked = []

    def load(path, name, *, revision, **keys):
        asked.append(revision)
        return local_dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    commits = ["abc", "abc", "def"]
    info = type("Info", (), {})

    def dataset_info(self, path, **keys):
        if not commits:
            raise ConnectionError("offline mode is enabled")
        info.sha = commits.pop(0)
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    data = Data(source="huggingface", path="some/data")
    found = [open_source(pinned(data)).fingerprint for _ in range(3)]
    assert asked == ["abc", "abc", "def"]
    assert found[0] == found[1] != found[2]
    assert not caplog.records
    open_source(pinned(data))
    assert asked[-1] is None
    open_source(pinned(dataclasses.replace(data, revision="v1")))
    assert asked[-1] == "v1"
    assert "offline mode is enabled" in caplog.text


def test_huggingface_messages(dataset_folder):
    folder, _ = dataset_folder

    def message(**keys):
        with pytest.raises(UserError) as error:
            open_source(Data(**({"source": "huggingface", "path": str(folder)} | keys)))
        return str(error.value)

    missing = message(text_key="body")
    assert 'no column "body"' in missing
    assert "id, text" in missing
    assert "nope" in message(split="nope")
    assert "other" in message(name="other")
    assert "/nowhere/at/all" in message(path="/nowhere/at/all")
    assert "data.path is empty" in message(path="")
    source = open_source(Data(source="huggingface", path=str(folder), text_key="id"))
    with pytest.raises(UserError, match='row 0: the column "id" is not a string but 0'):
        next(source.read(0))


def test_huggingface_that_stops_answering_is_no_users_error(dataset_folder, monkeypatch):
    folder, _ = dataset_folder
    source = open_source(Data(source="huggingface", path=str(folder)))

    class Broken:
        def __iter__(self):
            yield {"text": "first"}
            raise ConnectionError("reset by peer")

        def state_dict(self):
            return {}

    monkeypatch.setattr(type(source.units[0].dataset), "shard", lambda *args, **keys: Broken())
    reader = source.read(0)
    assert next(reader).text == "first"
    with pytest.raises(RunFailed, match=r"shard 0, row 1: reading stopped.*reset by peer"):
        next(reader)
