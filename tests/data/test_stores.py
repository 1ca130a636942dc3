"""Object stores: which files are found there, and what happens when a store is slow, fails, or gives less."""

import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import open_corpus, retry
from swamla_titan.data.faults import DataFault, Unreachable
from swamla_titan.data.retry import Retry, all_documents
from swamla_titan.data.sources import open_source
from swamla_titan.data.streams import DocumentStream
from swamla_titan.errors import UserError
from tests.data.store import Store, serving

TEXTS = [f"text {i} " + "words and words " * (i % 50) for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FORMS = ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)


@pytest.fixture
def url(tmp_path):
    """Of a folder with TEXTS in four forms."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (folder / "a.jsonl.zst").write_bytes(pa.compress(LINES, "zstd", asbytes=True))
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet", row_group_size=100)
    with serving(folder) as url:
        yield url


def local(path, **keys):
    keys = {"source": "local", "path": path, "streams": 2, "tokenizer": "byte"} | keys
    return open_source(Data(**keys), Retry(keys.get("retry_seconds", 60)))


def texts(source):
    return [document.text for document in all_documents(source, Retry(60))]


def refused(path, **keys):
    with pytest.raises(UserError) as raised:
        open_corpus(Data(source="local", path=path, tokenizer="byte", **keys), Validation(fraction=0), 0)
    return str(raised.value)


def test_what_is_read_is_what_a_folder_would_give(url, tmp_path):
    for name, content in {
        "README.md": b"about",
        ".hidden.txt": b"x",
        "sub/notes.doc": b"x",
        "sub/b.jsonl": b"",
    }.items():
        (tmp_path / "bucket/sub").mkdir(exist_ok=True)
        (tmp_path / "bucket" / name).write_bytes(content)
    there, here = local(url), local(str(tmp_path / "bucket"))
    assert (there.fingerprint, there.description, there.record) == (here.fingerprint, here.description, here.record)
    assert "left out: 1 file of unknown kind (sub/notes.doc), 1 file about the data (README.md)" in there.description
    assert texts(there) == TEXTS * 4
    assert texts(local(f"{url}/a.jsonl")) == TEXTS
    assert texts(local(f"{url}/")) == TEXTS * 4


def test_validation_text_may_lie_there_too(url):
    corpus = open_corpus(Data(source="builtin", tokenizer="byte"), Validation(path=f"{url}/a.jsonl"), 0)
    assert len(corpus.held_out.exact) > 200


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["throttle", "break", "truncate"])
def test_a_store_that_fails_for_a_while_loses_and_doubles_nothing(url, name, how):
    """While the files are listed and opened, and while they are read."""
    Store.fails |= {("size", name): ("break", 2), ("read", name): (how, 2)}
    source = local(f"{url}/{name}")
    Store.fails[("read", name)] = how, 2
    assert texts(source) == TEXTS
    Store.fails |= {("list", "bucket"): ("throttle", 2), ("size", name): ("break", 2)}
    assert texts(local(url)) == TEXTS * 4
    assert not any(times for _, times in Store.fails.values())


@pytest.mark.parametrize("name", FORMS)
def test_one_that_does_not_answer_again_is_named_and_the_place_is_kept(url, name):
    corpus = open_corpus(
        Data(source="local", path=f"{url}/{name}", tokenizer="byte", streams=1, retry_seconds=0.05),
        Validation(fraction=0),
        0,
    )
    expected = [document.text for document, _ in zip_documents(DocumentStream(corpus, 0), 600)]
    documents = DocumentStream(corpus, 0)
    found = [next(documents) for _ in range(100)]
    Store.fails[("read", name)] = "throttle", 10**6
    with pytest.raises(Unreachable, match=rf"{name}.*SlowDown.*given up after") as raised:
        found.extend(zip_documents(documents, 10**6))
    assert raised.value.file.endswith(name)
    Store.fails.clear()
    again = DocumentStream(corpus, 0, found[-1][1])  # the last document again
    rest = [document.text for document, _ in zip_documents(again, 600 - len(found) + 1)]
    assert [document.text for document, _ in found[:-1]] + rest == expected


def zip_documents(stream, count):
    for _ in range(count):
        yield next(stream)


@pytest.mark.parametrize("name", FORMS)
def test_an_object_that_is_replaced_is_named(url, tmp_path, name):
    source = local(f"{url}/{name}")
    path = tmp_path / "bucket" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataFault, match=rf"{name}: it has \d+ bytes; when the run began, it had \d+"):
        texts(source)


@pytest.mark.parametrize("name", FORMS)
def test_what_may_not_be_read_or_is_gone_is_named_at_once(url, tmp_path, name):
    source = local(f"{url}/{name}")
    Store.fails[("read", name)] = "forbid", 10**6
    with pytest.raises(DataFault, match=f"{name}.*Access Denied"):
        texts(source)
    assert f"{name}: cannot be read: PermissionError: Access Denied" in refused(f"{url}/{name}")
    Store.fails.clear()
    (tmp_path / "bucket" / name).unlink()
    with pytest.raises(DataFault, match=name):
        texts(source)
    assert f"data.path: {url}/{name} does not exist" in refused(f"{url}/{name}")


def test_damaged_objects_are_named_or_skipped(url, tmp_path):
    bucket = tmp_path / "bucket"
    pq.write_table(pa.table({"body": ["x"]}), bucket / "b.parquet")
    assert 'b.parquet: no column "text" among body' in refused(url)
    (bucket / "b.parquet").write_bytes((bucket / "a.parquet").read_bytes()[:999])
    assert "b.parquet: not a whole parquet file" in refused(url)
    (bucket / "c.jsonl").write_bytes("Words.\n".encode("utf-16") * 99)
    source = local(url, on_error="skip_file")
    assert [fault.file.rpartition("/")[2] for fault in source.unreadable] == ["b.parquet", "c.jsonl"]
    assert texts(source) == TEXTS * 4


@pytest.mark.parametrize(
    "path, part",
    [
        ("teststore://bucket/none", "data.path: teststore://bucket/none does not exist."),
        ("teststore://bucket/a.png", "is of an unknown kind"),
        ("teststore://bucket/empty", "does not exist, or holds no files"),
        ("nothing://bucket", "nothing://bucket cannot be read: Protocol not known"),
    ],
)
def test_addresses_that_lead_nowhere(url, tmp_path, path, part):
    (tmp_path / "bucket/a.png").write_text("x")
    (tmp_path / "bucket/empty").mkdir()
    assert part in refused(path)


def test_a_store_whose_package_is_missing_says_which(monkeypatch):
    def missing(*unused, **keys):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for url, extra in (("s3://bucket/data", "s3"), ("simplecache::gs://bucket/data", "gs")):
        message = refused(url)
        assert f"{url} cannot be read: Install s3fs to access S3: pip install 'swamla-titan[{extra}]'" in message


def test_many_files_are_opened_with_few_requests_each(tmp_path):
    folder = tmp_path / "bucket"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number}.jsonl").write_bytes(LINES[: LINES.index(b"\n", 9000) + 1])
    with serving(folder) as url:
        source = local(url)
        assert source.num_units == 50
        assert sum(request == "read" for request, _ in Store.requests) == 50
