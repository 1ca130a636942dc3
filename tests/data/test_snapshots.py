"""Snapshots of datasets as the Hub's client keeps them: links to blobs, and a card that names configurations."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data
from swamla_titan.data.retry import all_documents
from swamla_titan.data.sources import open_source

# The layout of FineWeb-Edu: a configuration for each crawl, and `default` for all of them.
CRAWLS = ["CC-MAIN-2013-20", "CC-MAIN-2024-10"]
CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: CC-MAIN-2013-20
  data_files:
  - split: train
    path: data/CC-MAIN-2013-20/*
- config_name: CC-MAIN-2024-10
  data_files:
  - split: train
    path: data/CC-MAIN-2024-10/*
---
# FineWeb-Edu
"""


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The folder of a commit in a cache of the Hub's client."""
    repository = tmp_path / "hub/datasets--HuggingFaceFW--fineweb-edu"
    blobs, folder = repository / "blobs", repository / "snapshots/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    blobs.mkdir(parents=True)

    def link(name: str, blob: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path(*[".."] * len(path.relative_to(repository).parent.parts)) / "blobs" / blob.name)

    (blobs / "card").write_text(CARD)
    link("README.md", blobs / "card")
    for crawl in CRAWLS:
        for number in range(2):
            blob = blobs / f"{crawl}{number}"
            texts = [f"{crawl} {number} {row}" for row in range(6)]
            columns = {"text": texts, "id": texts, "dump": [crawl] * 6, "score": [3.5] * 6, "int_score": [4] * 6}
            pq.write_table(pa.table(columns), blob, row_group_size=3)
            link(f"data/{crawl}/train-{number:05}-of-00002.parquet", blob)
    return folder


def texts(**keys: object) -> list[str]:
    return [
        document.text for document in all_documents(open_source(Data(**{"streams": 2, "tokenizer": "byte"} | keys)))
    ]


def of(crawl: str) -> list[str]:
    return [f"{crawl} {number} {row}" for number in range(2) for row in range(6)]


@pytest.mark.parametrize("crawl", CRAWLS)
def test_a_crawl_by_its_name_or_by_its_folder(snapshot, crawl):
    assert texts(source="huggingface", path=str(snapshot), name=crawl) == of(crawl)
    assert texts(source="local", path=str(snapshot / "data" / crawl)) == of(crawl)


def test_all_crawls(snapshot):
    assert texts(source="huggingface", path=str(snapshot), name="default") == of(CRAWLS[0]) + of(CRAWLS[1])
    source = open_source(Data(source="local", path=str(snapshot)))
    assert [document.text for document in all_documents(source)] == of(CRAWLS[0]) + of(CRAWLS[1])
    assert "left out: 1 file about the data (README.md)" in source.description
    assert source.num_units == 8  # row groups, from which reading continues
    assert json.dumps(source.record)
