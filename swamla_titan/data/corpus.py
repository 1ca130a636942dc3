"""Everything the order of the data depends on, opened and checked once at start-up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.dealing import ORDER, Share, deal
from swamla_titan.data.document import Document, Source
from swamla_titan.data.held_out import HeldOut, choose_held_out, text_hash
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


def open_corpus(data: Data, validation: Validation, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the training data. UserError if it is missing, unreadable or empty, at start-up and not hours later.

    Held out are the documents of `validation.path` that validation reads, wherever copies of them stand in the
    training data, or without a path a share of the training data itself. `tokenizer` is the loaded
    `data.tokenizer`, where the caller has it already.
    """
    source = open_source(data)
    if all(document.is_empty for document in all_documents(source)):  # stops at the first text
        raise UserError(f"{_described(data)}: there is no text in it, only empty documents.")
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    if validation.path:
        read = path_documents(data, validation, tokenizer)
        held_out = HeldOut(0, frozenset(text_hash(document.text) for document, _ in read))
    else:
        held_out = choose_held_out(all_documents(source), validation.fraction, data.text_separator)
    return Corpus(data, source, tokenizer, held_out, seed)


def all_documents(source: Source) -> Iterator[Document]:
    """Every document of a source, unit by unit, as the source orders them."""
    for unit in range(source.num_units):
        yield from source.read(unit)


def path_documents(data: Data, validation: Validation, tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents of `validation.path` that validation reads, each with its tokens."""
    documents = all_documents(open_local(data, validation.path, "validation.path"))
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
