"""Seconds until data can be read: to open many files, and to continue from a place deep in a corpus.

    python benchmarks/sources.py --files 10000 --megabytes 256

Writes files of random words to a temporary folder: many small ones, which are opened as a run does at its start, and a
few of the given size, of which 64 streams then continue from 90% of their segments. CPU only. The second column is the
processor's time, which other processes on the machine change less.
"""

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import division, open_corpus
from swamla_titan.data.sources import open_source
from swamla_titan.data.streams import DocumentStream

WORDS = [f"word{number}" for number in range(5000)]
FEW = 8  # files of the corpus that is continued


def texts(size: int) -> list[str]:
    """Documents of some 3,000 characters, `size` bytes of them."""
    chance, found = random.Random(1), 0
    made: list[str] = []
    while found < size:
        made.append(" ".join(chance.choices(WORDS, k=400)))
        found += len(made[-1])
    return made


def lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def parquet(documents: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": documents, "id": documents}), sink, row_group_size=1000)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": lines,
    "parquet": parquet,
    "jsonl.gz": lambda documents: gzip.compress(lines(documents), 1),
    "jsonl.zst": lambda documents: pa.compress(lines(documents), "zstd", asbytes=True),
}


def timed(what: str, work: Callable[[], object]) -> None:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"{what:<48} {clock:7.2f} s {processor:7.2f} s", flush=True)


def continue_deep(data: Data) -> None:
    """Open a corpus, read each stream's segment up to 90%, and time how long opening the streams there takes."""
    corpus = open_corpus(data, Validation(fraction=0), 0)
    _ = corpus.segments
    cursors = []
    for stream in range(data.streams):
        documents, first_epoch = DocumentStream(corpus, stream), []
        for _, cursor in documents:
            if cursor["epoch"]:
                break
            first_epoch.append(cursor)
        cursors.append(first_epoch[len(first_epoch) * 9 // 10])
    timed(f"continue 1 of {data.streams} streams", lambda: DocumentStream(corpus, 0, cursors[0]))
    timed(
        f"continue all {data.streams}",
        lambda: [DocumentStream(corpus, stream, cursor) for stream, cursor in enumerate(cursors)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--forms", nargs="+", default=[*FORMS], choices=[*FORMS])
    arguments = parser.parse_args()
    division.COUNTED_BYTES = 0  # as in a corpus too large to be counted
    small, large = texts(20_000), texts(arguments.megabytes * 10**6)
    for form in arguments.forms:
        with tempfile.TemporaryDirectory() as folder:
            content = FORMS[form](small)
            for number in range(arguments.files):
                (Path(folder) / f"{number:06}.{form}").write_bytes(content)
            data = Data(source="local", path=folder, tokenizer="byte")
            timed(f"{form}: open {arguments.files} files", lambda data=data: open_source(data))  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as folder:
            for number in range(FEW):
                (Path(folder) / f"{number}.{form}").write_bytes(FORMS[form](large[number::FEW]))
            continue_deep(Data(source="local", path=folder, tokenizer="byte"))


if __name__ == "__main__":
    main()
