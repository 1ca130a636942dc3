"""Sources that fail where a test wants it, in the process of the test and in loader processes."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swamla_titan.data import retry
from swamla_titan.data.corpus import Corpus
from swamla_titan.data.document import Document, Position, Source
from swamla_titan.data.faults import DataFault, Unreachable

ALWAYS = 10**9


@dataclasses.dataclass(frozen=True)
class Fails:
    """Document `ordinal` of unit `unit` cannot be read, the first `times` times; damage never passes."""

    unit: int
    ordinal: int
    times: int = ALWAYS
    damaged: bool = False


class Flaky:
    """A source that fails as told. How often it did is counted in files of `folder`, for all processes together."""

    def __init__(self, source: Source, fails: list[Fails], folder: Path, delay: float = 0.001) -> None:
        self.__setstate__({"source": source, "fails": fails, "folder": folder, "delay": delay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        retry.FIRST_DELAY = self.delay  # a loader process, too, begins with this

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        fails = {each.ordinal: each for each in self.fails if each.unit == unit}
        for document in self.source.read(unit, position, every, offset):
            fail = fails.get(document.ordinal)
            if fail and self.failed(fail) < fail.times:
                with (self.folder / f"{unit}-{document.ordinal}").open("a") as file:
                    file.write("x")
                if fail.damaged:
                    raise DataFault(self.source.unit_files[unit], f"document {document.ordinal}", "made no sense")
                raise Unreachable(self.source.unit_files[unit], "", "did not answer")
            yield document

    def failed(self, fail: Fails) -> int:
        """How often it has failed."""
        path = self.folder / f"{fail.unit}-{fail.ordinal}"
        return path.stat().st_size if path.exists() else 0


def flaky(corpus: Corpus, fails: list[Fails], folder: Path, delay: float = 0.001) -> Corpus:
    """The same corpus, read by a source that fails once its tokens are counted."""
    folder.mkdir(exist_ok=True)
    corpus = corpus.with_segments(corpus.segments)
    return dataclasses.replace(corpus, source=Flaky(corpus.source, fails, folder, delay))


def write_parquet(path: Path, texts: list[str], rows: int = 10) -> None:
    """A file with `rows` rows in a row group, incompressible enough for half of it to miss some."""
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="none", use_dictionary=False)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def four_files(folder: Path) -> Path:
    """A new folder with four parquet files of 24 rows with 50 tokens each, two row groups a file."""
    folder.mkdir()
    for number in range(4):
        texts = [f"<{number}.{i:02}".ljust(49, ".") for i in range(24)]
        write_parquet(folder / f"{number}.parquet", texts, rows=12)
    return folder
