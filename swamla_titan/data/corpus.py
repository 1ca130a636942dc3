"""Everything the order of the data depends on, opened and checked once at start-up."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from swamla_titan.config.rules import RETRY_SECONDS
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.dealing import ORDER, Share, deal
from swamla_titan.data.document import Document, Source
from swamla_titan.data.faults import DataFault, Fault
from swamla_titan.data.held_out import HeldOut, choose_held_out, text_hash
from swamla_titan.data.patience import Patience, read_on
from swamla_titan.data.sources import open_local, open_source
from swamla_titan.data.tokenizer import Tokenizer, load_tokenizer, with_eot
from swamla_titan.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """The training data: its source, how it is tokenized and dealt into streams, and what is held out of it."""

    data: Data
    source: Source
    tokenizer: Tokenizer
    held_out: HeldOut
    seed: int
    fraction: float = 0.0  # of the documents that was asked to be held out
    # Found while it was opened, and passed over; the streams come upon them again, each where it reads.
    faults: list[Fault] = field(default_factory=list, compare=False)

    @property
    def skips_files(self) -> bool:
        """Whether what cannot be read is passed over, file by file."""
        return self.data.on_error == "skip_file"

    def new_patience(self, is_over: Callable[[], bool] | None = None) -> Patience:
        """For a process that reads it, until `is_over()`."""
        return patience_of(self.data, is_over)

    def record(self) -> dict[str, Any]:
        """What must be remembered (JSON types) to open the same corpus after files were damaged, see `open_corpus`."""
        return {"source": self.source.record(), "fraction": self.fraction, "held_out": self.held_out.threshold}

    @cached_property
    def dealing(self) -> list[list[Share]]:
        """What each stream owns."""
        return deal(self.source.unit_sizes, self.data.streams)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for saved cursors to mean the same places (JSON types, for checkpoints)."""
        return {
            "source": f"{self.data.source} {self.source.fingerprint}",
            "tokenizer": f"{self.tokenizer.name} {self.tokenizer.fingerprint}",
            "data.streams": self.data.streams,
            "data.shuffle_documents": self.data.shuffle_documents,
            "order": ORDER,
            "job.seed": self.seed,
            "held out": self.held_out.fingerprint,
        }


def open_corpus(
    data: Data,
    validation: Validation,
    seed: int,
    tokenizer: Tokenizer | None = None,
    recorded: dict[str, Any] | None = None,
) -> Corpus:
    """Opens the training data. UserError if it is missing, unreadable or empty, at start-up and not hours later.

    Held out are the documents of `validation.path` that validation reads, wherever copies of them stand in the
    training data, or without a path a share of the training data itself. `tokenizer` is the loaded
    `data.tokenizer`, where the caller has it already. `recorded` is what `Corpus.record` gave when the run began: with
    data.on_error = "skip_file" the corpus is the same as then, also where files were damaged since.
    """
    recorded = (recorded or {}) if data.on_error == "skip_file" else {}
    patience = patience_of(data)
    source = open_source(data, patience, recorded.get("source"))
    faults = list(source.passed_over)
    documents = all_documents(source, patience, faults if data.on_error == "skip_file" else None)
    if all(document.is_empty for document in documents):  # stops at the first text
        if faults:
            raise faults[-1]
        raise UserError(f"{_described(data)}: there is no text in it, only empty documents.")
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    if validation.path:
        read = path_documents(data, validation, tokenizer)
        held_out = HeldOut(0, frozenset(text_hash(document.text) for document, _ in read))
    elif validation.fraction == recorded.get("fraction") and source.record() == recorded["source"]:
        held_out = HeldOut(recorded["held_out"])  # found by reading what may not be readable any more
    elif validation.fraction == 0:
        held_out = HeldOut(0)
    else:
        faults = list(source.passed_over)  # it begins again, and comes upon them again
        documents = all_documents(source, patience, faults if data.on_error == "skip_file" else None)
        held_out = choose_held_out(documents, validation.fraction, data.text_separator)
    fraction = 0.0 if validation.path else validation.fraction
    return Corpus(data, source, tokenizer, held_out, seed, fraction, faults)


def patience_of(data: Data, is_over: Callable[[], bool] | None = None) -> Patience:
    """By data.retry_seconds; a trainer has put a number there in place of -1, see config/rules.py."""
    return Patience(data.retry_seconds if data.retry_seconds >= 0 else RETRY_SECONDS, is_over)


def all_documents(
    source: Source, patience: Patience | None = None, faults: list[Fault] | None = None
) -> Iterator[Document]:
    """Every document of a source, unit by unit, as the source orders them.

    With `faults`, a damaged file is passed over from the damage on, and why is added there; else its Fault is raised.
    So is that of a file which merely does not answer.
    """
    patience = patience or Patience()
    damaged = ""
    for unit in range(source.num_units):
        if source.file_of(unit) == damaged:
            continue
        try:
            yield from read_on(source, unit, None, 1, 0, patience)
        except DataFault as fault:
            if faults is None:
                raise
            faults.append(fault)
            damaged = source.file_of(unit)


def path_documents(data: Data, validation: Validation, tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents of `validation.path` that validation reads, each with its tokens."""
    # What validation means must not depend on what happens to be readable: nothing is passed over here.
    patience = patience_of(data)
    documents = all_documents(open_local(data, validation.path, "validation.path", patience=patience), patience)
    return up_to(validation.max_tokens + 1, documents, tokenizer)


def up_to(tokens: int, documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents that hold text, each with its tokens, until there are `tokens` of them; then reading stops."""
    for document in documents:
        if document.is_empty:
            continue
        row = with_eot(tokenizer, document.text)
        yield document, row
        tokens -= len(row)
        if tokens <= 0:
            return


def fingerprint_changes(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """What differs between two fingerprints: name -> a line about it; empty if cursors of one fit the other."""
    return {
        name: f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    }


def _described(data: Data) -> str:
    return "data.source = builtin" if data.source == "builtin" else f"data.path: {data.path}"
