"""The corpora of a mixture, each of them a source of [[data.sources]], and the order of sequences among them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from swamla_titan.config.mixture import data_of_sources, weights_of, weights_problem
from swamla_titan.config.schedule import Schedule
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.corpus import Corpus, open_corpus
from swamla_titan.data.document import Cursor
from swamla_titan.data.exclusions import Exclusion
from swamla_titan.data.faults import Fault
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.mixture import Piece, SequenceOrder
from swamla_titan.data.retry import all_documents
from swamla_titan.data.segments import Segments
from swamla_titan.data.streams import initial_cursor
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

    def begun_at(self, sequences: int, cursors: Mapping[int, Cursor], weights: Sequence[Piece]) -> "Mixture":
        """The same mixture with other weights, which begins with sequence `sequences`, where the cursors stand."""
        streams = self.data.streams
        before = tuple(
            sum(cursors[source * streams + slot]["sequences"] for slot in range(streams)) if cursors else 0
            for source in range(len(self.names))
        )
        holds = max(number for number, piece in enumerate(weights) if piece.first <= sequences)
        pieces = weights[holds]._replace(first=sequences), *weights[holds + 1 :]
        return replace(self, before=before, pieces=pieces)

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
            "weights": [[piece.first, dict(piece.weights)] for piece in self.pieces],
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
    return replace(data, corpora=corpora) if isinstance(data, Mixture) else corpora[0]


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
    before, pieces = recorded.get("before", {}), [Piece(0, weights_of(data))]
    if before.keys() == opened.keys():
        pieces = [Piece(*each) for each in recorded["weights"]]
    for piece in pieces:
        if problem := weights_problem([*piece.weights.items()]):
            raise ValueError(problem)
    counts = tuple(before.get(name, 0) for name in opened)
    return Mixture(data, tuple(opened), tuple(corpora), tuple(pieces), counts)


class Continued(NamedTuple):
    """Where the streams of a run continue whose sources, or their weights, are others than before.

    `source_tokens` and the other fields are those of a TrainState. `report`: a line for each source that is there now,
    or was.
    """

    cursors: dict[int, Cursor]
    excluded: list[Exclusion]
    source_tokens: dict[str, int]
    report: list[str]


def continued(
    data: TrainingData,
    recorded: Mapping[str, Any],
    cursors: Mapping[int, Cursor],
    excluded: Iterable[Exclusion],
    tokens: Mapping[str, int],
) -> Continued | None:
    """What a run with these data continues from; None if none of the streams can continue.

    `recorded`: the record of the data that the checkpoint holds, with its cursors, exclusions and tokens by source, ""
    being the source of a run without [[data.sources]]. Sources that are as they were keep their streams, others begin.
    """
    before = recorded.get("sources") or {"": recorded}
    if isinstance(data, Corpus) or not all(_is_alike(data, each) for each in before.values()):
        return None
    streams, found = data.data.streams, Continued({}, [], dict(tokens), [])
    earlier, left = {name: number for number, name in enumerate(sorted(before))}, set(before)
    for source, (name, corpus) in enumerate(zip(data.names, data.corpora)):
        same = [each for each in (name, "") if each in left and before[each]["fingerprint"] == corpus.fingerprint()]
        first, old = source * streams, earlier[same[0]] * streams if same and cursors else None
        for slot in range(streams):
            found.cursors[first + slot] = initial_cursor() if old is None else cursors[old + slot]
        if old is not None:
            own = (each for each in excluded if each.stream // streams * streams == old)
            found.excluded.extend(replace(each, stream=each.stream - old + first) for each in own)
            found.source_tokens[name] = found.source_tokens.pop(same[0], 0)
            where = _described([found.cursors[first + slot] for slot in range(streams)])
            found.report.append(f"{name}: its streams continue, {where}")
        elif name in before:
            found.source_tokens.pop(name, None)
            found.report.append(f"{name}: other data than before, its streams start at the beginning")
        else:
            found.report.append(f"{name}: new, its streams start at the beginning")
        left -= {name, *same}
    found.report.extend(f"{name or 'the source until now'}: gone" for name in sorted(left))
    return found


def _is_alike(data: TrainingData, recorded: Mapping[str, Any]) -> bool:
    """Whether a recorded corpus has the tokenizer, seed and streams of the present ones."""
    now = data.fingerprint()
    return all(recorded["fingerprint"].get(key) == now[key] for key in _SHARED)


def _described(cursors: Sequence[Cursor]) -> str:
    """Where the streams of a source stand."""
    sequences, epochs = ([cursor[key] for cursor in cursors] for key in ("sequences", "epoch"))
    read = _range(min(sequences), max(sequences))
    return f"each after {read} sequences, in epoch {_range(min(epochs) + 1, max(epochs) + 1)}"


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


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
    large = int(validation.fraction * 2**64)  # the threshold of a large corpus
    # A small one has a threshold of its own; what it holds out can be listed.
    small = {
        number: _hashes(corpus)
        for number, corpus in enumerate(corpora)
        if corpus.held_out.threshold != int(corpus.fraction * 2**64)
    }
    listed = {
        number: {each for each in own if each < corpora[number].held_out.threshold} for number, own in small.items()
    }

    def held_out(number: int, corpus: Corpus) -> HeldOut:
        others = frozenset().union(*(found for other, found in listed.items() if other != number))
        if number not in small:
            return HeldOut(corpus.held_out.threshold, others)
        threshold = corpus.held_out.threshold if len(small) == len(corpora) else max(corpus.held_out.threshold, large)
        found = HeldOut(threshold, others & small[number])
        is_left = any(each >= threshold and each not in others for each in small[number])
        return found if is_left else corpus.held_out  # a source of copies alone

    return [
        replace(corpus, held_out=held_out(number, corpus)) if any(corpus is each for each in new) else corpus
        for number, corpus in enumerate(corpora)
    ]


def _hashes(corpus: Corpus) -> set[int]:
    if corpus.source.index is not None:
        return {each for _, hashes in corpus.source.index.scan() for each in hashes.tolist()}
    documents = all_documents(corpus.source, corpus.new_retry(), [] if corpus.skips_files else None)
    return {document.hash for document in documents if not document.is_empty}
