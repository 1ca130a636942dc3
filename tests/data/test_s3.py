"""S3 as s3fs speaks it, with a server of moto's that fails, throttles and truncates; needs the extra `s3` and moto."""

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data
from swamla_titan.data import retry
from swamla_titan.data.faults import Unreachable
from swamla_titan.data.retry import Retry, all_documents
from swamla_titan.data.sources import open_source
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, train

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow

TEXTS = [f"text {i} " + "words and words " * (i % 50) for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FORMS = ["a.jsonl", "a.parquet", "a.jsonl.gz"]


class Failing:
    """A WSGI application that answers some requests in another way: `fails` has (how, the end of a path, times)."""

    def __init__(self, application: Callable) -> None:
        self.application = application
        self.fails: list[list] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict, start_response: Callable) -> Iterator[bytes]:
        with self.lock:
            fail = next((each for each in self.fails if environ["PATH_INFO"].endswith(each[1]) and each[2] > 0), None)
            is_read = environ["REQUEST_METHOD"] == "GET"
            if fail and is_read:
                fail[2] -= 1
        if not fail or not is_read:
            return self.application(environ, start_response)
        if fail[0] == "truncate":

            def shorter(status: str, headers: list, *more: object) -> object:
                return start_response(status, headers, *more)  # with the length of all

            body = b"".join(self.application(environ, shorter))
            return iter([body[: len(body) // 2]])
        status, code = ("503 Slow Down", "SlowDown") if fail[0] == "throttle" else ("500 Error", "InternalError")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return iter([body])


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Failing, str]]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    failing = Failing(DomainDispatcherApplication(create_backend_app))
    serving = make_server("127.0.0.1", 0, failing, threaded=True)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield failing, f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()


@pytest.fixture
def store(server, tmp_path, monkeypatch) -> Iterator[tuple[Failing, str]]:
    """The server, and the URL of a folder there; the environment is what a user sets."""
    failing, endpoint = server
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=100)
    system = s3fs.S3FileSystem()
    if not system.exists("bucket"):
        system.mkdir("bucket")
        system.pipe("bucket/data/a.jsonl", LINES)
        system.pipe("bucket/data/a.jsonl.gz", gzip.compress(LINES, mtime=0))
        system.pipe("bucket/data/README.md", b"about")
        system.pipe("bucket/data/folder/", b"")
        system.put(str(tmp_path / "a.parquet"), "bucket/data/a.parquet")
    yield failing, "s3://bucket/data"
    failing.fails.clear()


def local(path: str, seconds: float = 60):
    return open_source(Data(source="local", path=path, streams=2, tokenizer="byte"), Retry(seconds))


def texts(source, seconds: float = 60) -> list[str]:
    return [document.text for document in all_documents(source, Retry(seconds))]


def test_a_bucket_is_read_like_a_folder(store):
    source = local(store[1])
    assert source.description.startswith("3 files, ")
    assert "1 file about the data (README.md)" in source.description
    assert texts(source) == TEXTS * 3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["throttle", "fail", "truncate"])
def test_a_store_that_fails_for_a_while_loses_and_doubles_nothing(store, name, how):
    failing, url = store
    failing.fails.append([how, f"/{name}", 3])
    source = local(f"{url}/{name}")
    failing.fails.append([how, f"/{name}", 3])
    assert texts(source) == TEXTS
    assert not any(times for _, _, times in failing.fails)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["throttle", "fail", "truncate"])
def test_one_that_fails_for_good_is_named(store, name, how):
    failing, url = store
    source = local(f"{url}/{name}")
    failing.fails.append([how, f"/{name}", 10**6])
    with pytest.raises(Unreachable, match=f"{name}.*given up after"):
        texts(source, seconds=0.2)


def test_a_run_reads_from_there_and_continues(store, tmp_path):
    """With a process that reads ahead, and a store that throttles now and then; the same batches as from a folder."""
    failing, url = store
    config = tiny_config(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.jsonl").write_bytes(LINES)
    shared = ("--data.num_workers", "1", "--validation.interval", "2", "--checkpoint.interval", "3")
    here = ("--data.path", str(tmp_path / "here/a.jsonl"), "--job.dump_folder", str(tmp_path / "expected"))
    assert train(config, *shared, *here, "--training.steps", "6") == 0
    failing.fails.append(["throttle", "/a.jsonl", 5])
    there = ("--data.path", f"{url}/a.jsonl")
    for steps in ("3", "6"):
        assert train(config, *shared, *there, "--training.steps", steps) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "expected")
    assert checkpoint(tmp_path / "run", 6).is_dir()
