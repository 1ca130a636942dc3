"""Google Cloud Storage as gcsfs speaks it, with a server that fails, throttles and truncates; needs the extra `gs`."""

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data
from swamla_titan.data import retry
from swamla_titan.data.faults import Unreachable
from swamla_titan.data.retry import Retry, all_documents
from swamla_titan.data.sources import open_source

gcsfs = pytest.importorskip("gcsfs")
pytestmark = pytest.mark.slow

TEXTS = [f"text {i} " + "words and words " * (i % 50) for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FORMS = ["a.jsonl", "a.parquet", "a.jsonl.gz"]
OBJECTS = "/storage/v1/b/bucket/o"


class Bucket(BaseHTTPRequestHandler):
    """The part of the JSON API that reading needs: listing, metadata, and ranges of media."""

    content: ClassVar[dict[str, bytes]] = {}
    fails: ClassVar[list[list]] = []  # how, the end of an object's name, and how many times
    lock = threading.Lock()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if path.rstrip("/") == OBJECTS:
            self.list(query.get("prefix", ""), query.get("delimiter", ""))
            return
        name = path.partition("/o/")[2]
        if name not in self.content:
            self.answer(404, json.dumps({"error": {"code": 404, "message": "no such object"}}).encode())
        elif "/download/" not in path and query.get("alt") != "media":
            self.answer(200, json.dumps(self.metadata(name)).encode())
        else:
            self.media(name)

    def media(self, name: str) -> None:
        with self.lock:
            fail = next((each for each in self.fails if name.endswith(each[1]) and each[2] > 0), None)
            if fail:
                fail[2] -= 1
        if fail and fail[0] != "truncate":
            code = 429 if fail[0] == "throttle" else 503
            self.answer(code, json.dumps({"error": {"code": code, "message": "not now"}}).encode())
            return
        data, code = self.content[name], 200
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            data, code = data[int(begin) : int(end) + 1 if end else None], 206
        self.answer(code, data, len(data) // 2 if fail else None)

    def list(self, prefix: str, delimiter: str) -> None:
        below = [name for name in sorted(self.content) if name.startswith(prefix)]
        here = [name for name in below if not delimiter or delimiter not in name[len(prefix) :]]
        folders = sorted({prefix + name[len(prefix) :].split("/")[0] + "/" for name in below if name not in here})
        self.answer(200, json.dumps({"items": [self.metadata(each) for each in here], "prefixes": folders}).encode())

    def metadata(self, name: str) -> dict[str, str]:
        link = f"http://{self.headers['Host']}/download{OBJECTS}/{name}?alt=media"
        size = str(len(self.content[name]))
        return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": size, "mediaLink": link}

    def answer(self, code: int, data: bytes, sent: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:sent])
        self.close_connection = sent is not None

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def url(tmp_path, monkeypatch) -> Iterator[str]:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=100)
    content = {"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES, mtime=0), "README.md": b"about"}
    content["a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    monkeypatch.setattr(Bucket, "content", {f"data/{name}": each for name, each in content.items()})
    monkeypatch.setattr(Bucket, "fails", [])
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=partial(asyncio.sleep, 0)))
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield "gs://bucket/data"
        server.shutdown()


def local(path: str, seconds: float = 60):
    return open_source(Data(source="local", path=path, streams=2, tokenizer="byte"), Retry(seconds))


def texts(source, seconds: float = 60) -> list[str]:
    return [document.text for document in all_documents(source, Retry(seconds))]


def test_a_bucket_is_read_like_a_folder(url):
    source = local(url)
    assert source.description.startswith("3 files, ")
    assert "1 file about the data (README.md)" in source.description
    assert texts(source) == TEXTS * 3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["throttle", "fail", "truncate"])
def test_a_store_that_fails_for_a_while_loses_and_doubles_nothing(url, name, how):
    Bucket.fails.append([how, f"/{name}", 2])
    source = local(f"{url}/{name}")
    Bucket.fails.append([how, f"/{name}", 2])
    assert texts(source) == TEXTS
    assert not any(times for _, _, times in Bucket.fails)


@pytest.mark.parametrize("how", ["throttle", "fail", "truncate"])
def test_one_that_fails_for_good_is_named(url, how):
    source = local(f"{url}/a.jsonl")
    Bucket.fails.append([how, "/a.jsonl", 10**6])
    with pytest.raises(Unreachable, match=r"a\.jsonl.*given up after"):
        texts(source, seconds=0.2)
