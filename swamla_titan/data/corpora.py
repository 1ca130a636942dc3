"""The corpora of a mixture, each of them a source of [[data.sources]], and the order of sequences among them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from swamla_titan.config.mixture import data_of_sources, weights_of
from swamla_titan.config.schedule import Schedule
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.corpus import Corpus, open_corpus
from swamla_titan.data.faults import Fault
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.mixture import Piece, SequenceOrder
from swamla_titan.data.retry import all_documents
from swamla_titan.data.segments import Segments
from swamla_titan.data.tokenizer import Tokenizer, load_tokenizer
from swamla_titan.errors import UserError

_SHARED = ("tokenizer", "data.streams", "data.shuffle_documents", "order", "job.seed")  # of a fingerprint


@dataclass(frozen=True)
class Mixture:
    """Several corpora with one tokenizer, seed and number of streams; it is used like a Corpus.

    `names` and `corpora` are in the order of names. Stream k of source i has its cursor under i * streams + k.
    `pieces`: the weights, from the sequence on at which this mixture began: 0, or where a run continued with other
    sources or weights than before; `before` has the sequences that each source had given by then.
    """

    data: Data
    names: tuple[str, ...]
    corpora: tuple[Corpus, ...]
    pieces: tuple[Piece, ...]
    before: tuple[int, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer

    @cached_property
    def order(self) -> SequenceOrder:
        """Which source and slot each sequence comes from."""
        return SequenceOrder(self.data.streams, self.names, self.pieces)

    def counts(self, number: int) -> list[int]:
        """How many of the sequences before `number` each source has given."""
        return [before + count for before, count in zip(self.before, self.order.counts(number).tolist())]

    def with_weights(self, weights: Sequence[Piece]) -> "Mixture":
        """The same mixture with these weights, as far as they hold from where it began on."""
        first = self.pieces[0].first
        holds = max(index for index, piece in enumerate(weights) if piece.first <= first)
        return dataclasses.replace(self, pieces=(weights[holds]._replace(first=first), *weights[holds + 1 :]))

    @property
    def changes(self) -> dict[str, str]:
        """What differs from the recorded data, by the names in the fingerprint; "" where nothing does."""
        return {f"source.{name}": corpus.change for name, corpus in zip(self.names, self.corpora)}

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for saved cursors to be valid (JSON types, for checkpoints)."""
        every = [corpus.fingerprint() for corpus in self.corpora]
        shared = {key: every[0][key] for key in _SHARED}
        own = {f"{key}.{name}": each[key] for name, each in zip(self.names, every) for key in ("source", "held out")}
        return shared | own | {"data.sources": dict(zip(self.names, weights_of(self.data).values()))}

    def record(self) -> dict[str, Any]:
        """What reopens the same corpora (JSON types), see `Corpus.record`, and where the mixture began."""
        return {
            "sources": {name: corpus.record() for name, corpus in zip(self.names, self.corpora)},
            "first": self.pieces[0].first,
            "before": dict(zip(self.names, self.before)),
        }


TrainingData = Corpus | Mixture


def weights_by_stage(schedule: Schedule) -> list[Piece]:
    """The weights of a mixture as the stages of a run have them."""
    every = [Piece(stage.begin.sequences, weights_of(stage.config.data)) for stage in schedule.stages]
    return [each for last, each in zip([None, *every], every) if last is None or last.weights != each.weights]


def labelled(corpus: TrainingData) -> list[tuple[str, Corpus]]:
    """The corpora, each with a label for log lines: "NAME: " in a mixture, else nothing."""
    return [(f"{name}: " if name else "", each) for name, each in zip(corpus.names, corpus.corpora)]


def with_segments(data: TrainingData, segments: Sequence[tuple[Segments, ...]]) -> TrainingData:
    """The same data with the segments of each of their corpora that another process computed."""
    corpora = tuple(corpus.with_segments(each) for corpus, each in zip(data.corpora, segments))
    return dataclasses.replace(data, corpora=corpora) if isinstance(data, Mixture) else corpora[0]


def open_mixture(
    data: Data,
    validation: Validation,
    seed: int,
    tokenizer: Tokenizer | None = None,
    recorded: dict[str, Any] | None = None,
) -> Mixture:
    """Open the sources of [[data.sources]], see `open_corpus`.

    `recorded`: the `Mixture.record` of the checkpoint to resume from, or a `Corpus.record` of a run that had a single
    source, which continues as the source that it is.
    """
    recorded, tokenizer = recorded or {}, tokenizer or load_tokenizer(data.tokenizer)
    sections = data_of_sources(data)
    of_sources = recorded.get("sources", {})
    opened: dict[str, Corpus] = {}
    for name, section in sections.items():
        try:
            opened[name] = open_corpus(section, validation, seed, tokenizer, of_sources.get(name))
        except Fault:
            raise  # names the file
        except UserError as error:
            raise UserError(f"data.sources, {name}: {error.args[0]}", *error.args[1:]) from error
    if "fingerprint" in recorded:
        for name in [name for name, corpus in opened.items() if _is_same(corpus, recorded)][:1]:
            opened[name] = open_corpus(sections[name], validation, seed, tokenizer, recorded)
    corpora = _without_text_held_out_elsewhere(list(opened.values()), validation)
    before = recorded.get("before", {})
    return Mixture(
        data,
        tuple(opened),
        tuple(corpora),
        (Piece(recorded.get("first", 0), weights_of(data)),),
        tuple(before.get(name, 0) for name in opened),
    )


def _is_same(corpus: Corpus, recorded: dict[str, Any]) -> bool:
    same_source: bool = corpus.fingerprint()["source"] == recorded["fingerprint"]["source"]
    return same_source


def _without_text_held_out_elsewhere(corpora: list[Corpus], validation: Validation) -> list[Corpus]:
    """The corpora, each of which leaves out what another one holds out too, if it stands in both.

    Those that a checkpoint has recorded keep what they hold out.
    """
    new = [corpus for corpus in corpora if corpus.known_segments == (None,)]
    if not new or len(corpora) == 1 or validation.path or not validation.fraction:
        return corpora
    usual = int(validation.fraction * 2**64)
    # A small corpus has a threshold of its own; what it holds out can be listed.
    hashes = {index: _hashes(corpus) for index, corpus in enumerate(corpora) if corpus.held_out.threshold != usual}
    listed = {
        index: {each for each in found if each < corpora[index].held_out.threshold} for index, found in hashes.items()
    }
    found = list(corpora)
    for index, corpus in enumerate(corpora):
        if not any(corpus is each for each in new):
            continue
        threshold = corpus.held_out.threshold
        if len(hashes) < len(corpora) and index in hashes and any(each >= usual for each in hashes[index]):
            threshold = max(threshold, usual)  # as a large corpus has it
        others = frozenset().union(*(each for other, each in listed.items() if other != index))
        held_out = HeldOut(threshold, others & hashes[index] if index in hashes else others)
        if index not in hashes or any(each >= threshold and each not in others for each in hashes[index]):
            found[index] = dataclasses.replace(corpus, held_out=held_out)
    return found


def _hashes(corpus: Corpus) -> set[int]:
    documents = all_documents(corpus.source, corpus.new_retry(), [] if corpus.skips_files else None)
    return {document.hash for document in documents if not document.is_empty}
