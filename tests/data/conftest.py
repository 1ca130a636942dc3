"""Small corpora of known documents, read with the byte tokenizer so that tokens can be read back as text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import open_corpus
from swamla_titan.data.corpus import Corpus

NO_VALIDATION = Validation(fraction=0)


@dataclass
class CorpusMaker:
    """Writes documents to disk and opens them as a corpus."""

    folder: Path

    def texts(self, count: int) -> list[str]:
        # Of many lengths, and each recognisable wherever it is cut.
        return [f"<{i}:" + "abcdefg"[i % 7] * (i * 37 % 61) + ">" for i in range(count)]

    def write(self, texts: list[str], files: int = 1) -> None:
        for number in range(files):
            rows = texts[number::files]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
            (self.folder / f"part-{number}.jsonl").write_text(lines)

    def open(
        self,
        validation: Validation = NO_VALIDATION,
        seed: int = 7,
        recorded: dict[str, Any] | None = None,
        **keys: object,
    ) -> Corpus:
        settings = {"source": "local", "path": str(self.folder), "tokenizer": "byte", "streams": 4, "num_workers": 0}
        corpus = open_corpus(Data(**(settings | keys)), validation, seed, recorded=recorded)  # type: ignore[arg-type]
        _ = corpus.segments  # counted as at the start of a run, before a test damages what is read
        return corpus


@pytest.fixture
def maker(tmp_path: Path) -> CorpusMaker:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return CorpusMaker(folder)
