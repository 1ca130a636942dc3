"""Everything the order of the data depends on, opened and checked once at start-up."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.dealing import ORDER, Share, deal
from swamla_titan.data.document import Document, Source
from swamla_titan.data.held_out import HeldOut, choose_held_out
from swamla_titan.data.sources import open_source
from swamla_titan.data.tokenizer import Tokenizer, load_tokenizer
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
            "held out": self.held_out.threshold,
        }


def open_corpus(data: Data, validation: Validation, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the training data. UserError if it is missing, unreadable or empty, at start-up and not hours later.

    Documents are held out only when `validation.path` is empty. `tokenizer` is the loaded `data.tokenizer`, where
    the caller has it already.
    """
    source = open_source(data)
    if all(document.is_empty for document in all_documents(source)):  # stops at the first text
        raise UserError(f"{_described(data)}: there is no text in it, only empty documents.")
    fraction = 0.0 if validation.path else validation.fraction
    held_out = choose_held_out(all_documents(source), fraction)
    return Corpus(data, source, tokenizer or load_tokenizer(data.tokenizer), held_out, seed)


def all_documents(source: Source) -> Iterator[Document]:
    """Every document of a source, unit by unit, as the source orders them."""
    for unit in range(source.num_units):
        yield from source.read(unit)


def fingerprint_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, one line each; empty if cursors of one fit the other."""
    return [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def _described(data: Data) -> str:
    return "data.source = builtin" if data.source == "builtin" else f"data.path: {data.path}"
