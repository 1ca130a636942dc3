"""The corpus: everything that determines the order of the data, opened and validated once at the start."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swamla_titan.config.rules import RETRY_SECONDS
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.changes import changed_files, changed_settings, files_by_name
from swamla_titan.data.division import divide, divide_documents
from swamla_titan.data.document import Document, Index, Source, text_hash
from swamla_titan.data.faults import DataFault, Fault
from swamla_titan.data.held_out import HeldOut, ValidationSet, ValidationText, choose_held_out, pack
from swamla_titan.data.mixture import SequenceOrder
from swamla_titan.data.order import Shuffle, permutation
from swamla_titan.data.retry import Retry, all_documents, read_on
from swamla_titan.data.segments import ORDER, DocumentRing, DocumentSegments, Segments
from swamla_titan.data.sources import open_source
from swamla_titan.data.sources.local import open_local
from swamla_titan.data.tokenizer import Tokenizer, load_tokenizer, tokens_of
from swamla_titan.errors import UserError

_UNITS, _STREAMS = 2, 3  # what a permutation is for; streams.py has others


@dataclass(frozen=True)
class Corpus:
    """The training data: sources, tokenizer, segments, and which documents are held out.

    `source` has all files. Where files were added to a run, `earlier` has the earlier editions: the files that the run
    began with, then those that were added, and so on. A stream finishes its epoch, reads once what was added, and from
    then on everything, see `edition_after`.
    """

    data: Data
    source: Source
    tokenizer: Tokenizer
    held_out: HeldOut
    seed: int
    fraction: float = 0.0  # of the documents that were to be held out
    # Found while it was opened, and skipped; the streams find them again, each where it reads.
    faults: list[Fault] = field(default_factory=list, compare=False)
    earlier: tuple[Source, ...] = ()
    # What validation reads of the source, if it is not what training leaves out, because the setting was changed.
    validated: HeldOut | None = None
    # Of each edition, if they are known from the checkpoint or from the process that counted.
    known_segments: tuple[Segments | None, ...] = field(default=(None,), compare=False)
    # Since the checkpoint was written: files that were added, or what differs if the run cannot continue with them.
    added_files: tuple[str, ...] = ()
    change: str = ""

    @property
    def corpora(self) -> "tuple[Corpus, ...]":
        """The corpora that sequences come from: this one. A Mixture has several."""
        return (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `corpora`."""
        return ("",)

    @cached_property
    def order(self) -> SequenceOrder:
        """Which corpus and stream each sequence comes from."""
        return SequenceOrder(self.data.streams)

    @property
    def changes(self) -> dict[str, str]:
        """What differs from the recorded data, by the names in the fingerprint; "" where nothing does."""
        return {"source": self.change}

    @property
    def skips_files(self) -> bool:
        """Whether files that cannot be read are skipped."""
        return self.data.on_error == "skip_file"

    @property
    def read_by_validation(self) -> HeldOut:
        """The documents that validation reads of the source, if validation.path is empty."""
        return self.validated or self.held_out

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of all editions, the last one being `source`."""
        return (*self.earlier, self.source)

    def edition_after(self, edition: int) -> int:
        """The edition that a stream reads after an epoch of `edition`.

        Editions are: the files of the run's beginning, those added, both, those added later, all, ... Every stream
        reads what was added once, and an edition of everything until there is a larger one.
        """
        last = len(self.sources) - 1
        return last if edition in (last, last - 1) else edition + 1 + edition % 2

    def new_retry(self, is_closed: Callable[[], bool] | None = None) -> Retry:
        """The retries of a process that reads the corpus, until `is_closed()`."""
        return retry_of(self.data, is_closed)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of [data] that determine the text of documents; a change of one is a change of the data."""
        return {name: getattr(self.data, name) for name in ("source", *self.source.keys)}

    def record(self) -> dict[str, Any]:
        """What reopens the same corpus after files were damaged or added (JSON types), see `open_corpus`."""
        return {
            "settings": self.settings,
            "editions": [
                {"source": source.record, "segments": segments.to_json()}
                for source, segments in zip(self.sources, self.segments)
            ],
            "fraction": self.fraction,
            "held_out": self.held_out.threshold,
            "held_out_texts": sorted(self.held_out.exact),
            "fingerprint": self.fingerprint(),
        }

    @cached_property
    def segments(self) -> tuple[Segments, ...]:
        """The segments of each edition; those that are not known are computed now."""
        return tuple(
            known or self._divided(source, number)
            for number, (source, known) in enumerate(zip(self.sources, self.known_segments))
        )

    def _divided(self, source: Source, edition: int) -> Segments:
        streams = self.data.streams
        if source.index:
            return divide_documents(source.index, self._ring(source.index, edition), streams, self.held_out)
        order = self._order(source.num_units, edition, _UNITS)
        retry = self.new_retry()
        return divide(source, order, streams, self.tokenizer, self.held_out, retry, self.skips_files)

    def with_recorded_segments(self, recorded: Iterable[dict[str, Any] | None]) -> "Corpus":
        """The same corpus with the segments that a checkpoint recorded; ValueError if they do not fit the data."""
        known = [
            None if each is None else self._restored(source, number, each)
            for number, (source, each) in enumerate(zip(self.sources, recorded))
        ]
        return dataclasses.replace(self, known_segments=tuple(known))

    def _restored(self, source: Source, edition: int, recorded: dict[str, Any]) -> Segments:
        if source.index:
            return DocumentSegments.restored(self._ring(source.index, edition), recorded, self.data.streams)
        return Segments.from_json(self._order(source.num_units, edition, _UNITS), recorded, self.data.streams)

    def _ring(self, index: Index, edition: int) -> DocumentRing:
        """All documents of an index, shuffled, or with data.shuffle_documents = 1 as they are."""
        is_shuffled = self.data.shuffle_documents > 1
        order = Shuffle(int(index.starts[-1]), self.seed, edition, _UNITS) if is_shuffled else None
        return DocumentRing(index.starts, order)

    @cached_property
    def first_segments(self) -> list[int]:
        """The segment that each stream reads first."""
        return self._order(self.data.streams, _STREAMS)

    def _order(self, size: int, *purpose: int) -> list[int]:
        """An order of `size` things: shuffled, or with data.shuffle_documents = 1 as they are.

        Shuffled, neighbours in a folder are not all in one stream, nor the streams of a batch all in one file.
        """
        if self.data.shuffle_documents == 1:
            return list(range(size))
        return permutation(size, self.seed, *purpose).tolist()

    def with_segments(self, segments: tuple[Segments, ...]) -> "Corpus":
        """The same corpus with the segments that another process computed."""
        return dataclasses.replace(self, known_segments=segments)

    @property
    def validates_on_training_text(self) -> bool:
        """Whether validation reads text that the run did not hold out when it began."""
        if self.validated is None:
            return False
        unseen = (number < self.held_out.threshold or number in self.held_out.exact for number in self.validated.exact)
        return self.validated.threshold > self.held_out.threshold or not all(unseen)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for saved cursors to be valid (JSON types, for checkpoints)."""
        return {
            "source": f"{self.data.source} {self.sources[0].fingerprint}",
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
    """Open the training data; UserError if they are missing, unreadable or empty, at the start and not hours later.

    Held out are copies of the documents of `validation.path`, as far as validation reads that, or without a path a
    fraction of the training data. `tokenizer` is the loaded `data.tokenizer`, if the caller has it.

    `recorded` is the `Corpus.record` of the checkpoint to resume from. If the data are the same, or have more files,
    the run keeps its segments and its held-out documents, whatever `validation` says now. With data.on_error =
    "skip_file" it keeps them even if files were damaged since.
    """
    recorded = recorded or {}
    retry = retry_of(data)
    known = recorded.get("editions", [])
    if known and not recorded["fingerprint"]["source"].startswith(f"{data.source} "):
        known = []  # of another kind of source
    editions = _open_editions(data, retry, known)
    source = editions.sources[-1]
    faults = list(source.unreadable)
    documents = all_documents(source, retry, faults if data.on_error == "skip_file" else None)
    if all(document.is_empty for document in documents):  # stops at the first text
        if faults:
            raise faults[-1]
        where = "data.source = builtin" if data.source == "builtin" else f"data.path: {data.path}"
        raise UserError(f"{where}: there is no text in it, only empty documents.")
    if recorded and recorded["fingerprint"]["source"] == f"{data.source} {source.old_fingerprint}":
        source = dataclasses.replace(source, fingerprint=source.old_fingerprint)  # the run keeps what it began with
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    if source.index:
        source.index.require_tokenizer(tokenizer.name, tokenizer.fingerprint)
    corpus = Corpus(data, source, tokenizer, HeldOut(0), seed, 0.0, faults)
    if any(segments is not None for segments in editions.segments):
        before = dataclasses.replace(
            corpus,
            held_out=HeldOut(recorded["held_out"], frozenset(recorded["held_out_texts"])),
            fraction=recorded["fraction"],
            earlier=tuple(editions.sources[:-1]),
            added_files=editions.added,
        )
        if before.fingerprint() == recorded["fingerprint"]:
            before = before.with_recorded_segments(editions.segments)
            if before.fraction == validation.fraction and not validation.path:
                return before
            return dataclasses.replace(before, validated=_held_out(before, validation))
    return dataclasses.replace(
        corpus,
        held_out=_held_out(corpus, validation),
        fraction=0.0 if validation.path else validation.fraction,
        change=changed_settings(recorded.get("settings", {}), corpus.settings) or editions.change,
    )


class _Editions(NamedTuple):
    """The sources of a run, see `Corpus.earlier`.

    segments: the recorded ones; None for an edition that is new.
    change: what differs from the recorded data, if the run cannot continue with them.
    added: the files that were added.
    """

    sources: list[Source]
    segments: list[dict[str, Any] | None]
    change: str = ""
    added: tuple[str, ...] = ()


def _open_editions(data: Data, retry: Retry, recorded: list[dict[str, Any]]) -> _Editions:
    """Open the sources of all editions; `recorded`: the editions of a `Corpus.record`, empty for a new run.

    Files that were added to a folder make two more editions, one of them alone and one of everything. UserError if
    there are no data, or they cannot be read.
    """
    if not recorded:
        return _Editions([open_source(data, retry)], [None])

    def reopened(entries: list[dict[str, Any]]) -> Source:
        return open_local(data, data.path, retry=retry, entries=entries)

    source = open_source(data, retry, recorded[-1]["source"])
    segments = [edition["segments"] for edition in recorded]
    earlier = [edition["source"].get("files", []) for edition in recorded]
    if source.record == recorded[-1]["source"]:
        return _Editions([*map(reopened, earlier[:-1]), source], segments)
    before, now = files_by_name(recorded[-1]["source"]), files_by_name(source.record)
    if data.source != "local" or any(now.get(name) != entry for name, entry in before.items()):
        return _Editions([source], [None], changed_files(before, now))
    added = {name: entry for name, entry in now.items() if name not in before}
    sources = [*map(reopened, earlier), reopened(list(added.values())), source]
    return _Editions(sources, [*segments, None, None], added=tuple(added))


def _held_out(corpus: Corpus, validation: Validation) -> HeldOut:
    """The documents to hold out by `validation`; adds what cannot be read to the corpus' faults."""
    if validation.path:
        read = _path_documents(corpus.data, validation, corpus.tokenizer)
        return HeldOut(0, frozenset(text_hash(document.text) for document, _ in read))
    if validation.fraction == 0:
        return HeldOut(0)
    faults: list[Fault] = list(corpus.source.unreadable)  # reading begins again, and finds the others again
    documents = all_documents(corpus.source, corpus.new_retry(), faults if corpus.skips_files else None)
    found = choose_held_out(documents, validation.fraction, corpus.data.text_separator)
    corpus.faults[:] = faults
    return found


def validation_text(corpus: Corpus, validation: Validation, kept: Path | None = None) -> ValidationText | None:
    """The documents of `validation.path`, or those held out of the training data, up to validation.max_tokens.

    None if there is no path and nothing is held out (validation.fraction = 0). The order is that of the source, without
    shuffling, so it is the same in every run. `kept`: the file where the run may have kept held-out text. UserError if
    there is no text.
    """
    basis: dict[str, Any] | None = None
    if validation.path:
        documents = _path_documents(corpus.data, validation, corpus.tokenizer)
        missing = f"validation.path: {validation.path} holds no text, only empty documents."
    elif validation.fraction > 0:
        basis = {
            "data": f"{corpus.data.source} {corpus.source.fingerprint}",
            "data.tokenizer": f"{corpus.tokenizer.name} {corpus.tokenizer.fingerprint}",
            "validation.fraction": corpus.read_by_validation.fingerprint,
            "validation.max_tokens": validation.max_tokens,
        }
        if kept and (found := ValidationText.kept(kept, basis)):
            return found
        # Faults are ignored: they were reported already, or will be when training reads the file.
        faults: list[Fault] | None = [] if corpus.skips_files else None
        documents = _up_to(validation.max_tokens + 1, held_out_documents(corpus, faults), corpus.tokenizer)
        missing = (
            f"validation.fraction = {validation.fraction} holds out no document of the training data. "
            "Raise it, or give validation.path, or set it to 0 to train without validation."
        )
    else:
        return None
    text = np.concatenate([np.empty(0, dtype=np.int32), *(tokens for _, tokens in documents)])
    text = text[: validation.max_tokens + 1]
    if len(text) < 2:
        raise UserError(missing)
    return ValidationText(text, basis)


def held_out_documents(corpus: Corpus, faults: list[Fault] | None) -> Iterator[Document]:
    """The documents of the source that validation reads; `faults`: see `documents_by_unit`."""
    source, held_out, retry = corpus.source, corpus.read_by_validation, corpus.new_retry()
    if source.index is None:
        yield from (document for document in all_documents(source, retry, faults) if document in held_out)
        return
    start = 0
    for _, hashes in source.index.scan():
        for number in (start + np.flatnonzero(held_out.among(hashes))).tolist():
            unit = int(np.searchsorted(source.index.starts, number, side="right")) - 1
            try:
                yield next(read_on(source, unit, {"ordinal": number - int(source.index.starts[unit])}, 1, 0, retry))
            except DataFault as fault:
                if faults is None:
                    raise
                faults.append(fault)
        start += len(hashes)


def build_validation_set(
    corpus: Corpus, validation: Validation, seq_len: int, text: ValidationText | None = None
) -> ValidationSet | None:
    """Pack `text` into sequences, by default the `validation_text`; None if there is none."""
    text = text or validation_text(corpus, validation)
    return pack(text.tokens, seq_len, corpus.tokenizer, corpus.data.document_mask) if text else None


def retry_of(data: Data, is_closed: Callable[[], bool] | None = None) -> Retry:
    """Retries by `data.retry_seconds`; a trainer has replaced its -1 by a number, see config/rules.py."""
    return Retry(data.retry_seconds if data.retry_seconds >= 0 else RETRY_SECONDS, is_closed)


def _path_documents(data: Data, validation: Validation, tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents of `validation.path` that validation reads, each with its tokens."""
    # Nothing is skipped, because a validation loss must not depend on which files can be read.
    retry = retry_of(data)
    documents = all_documents(open_local(data, validation.path, "validation.path", retry=retry), retry)
    return _up_to(validation.max_tokens + 1, documents, tokenizer)


def text_sequences(data: Data, path: str, tokenizer: Tokenizer, seq_len: int, limit: int = 0) -> ValidationSet:
    """The documents of a file or folder as the sequences of a validation; the first `limit` of them, 0: all.

    `data` says what in the files is text. UserError if there is none.
    """
    retry = retry_of(data)
    documents = all_documents(open_local(data, path, "--text", retry=retry), retry)
    rows = [tokens for _, tokens in itertools.islice(_up_to(sys.maxsize, documents, tokenizer), limit or None)]
    text = np.concatenate([np.empty(0, dtype=np.int32), *rows])
    if len(text) < 2:
        raise UserError(f"--text {path}: holds no text that could be predicted")
    return pack(text, seq_len, tokenizer, data.document_mask)


def _up_to(tokens: int, documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Non-empty documents, each with its tokens, until there are `tokens` tokens."""
    for document in documents:
        if document.is_empty:
            continue
        encoded = tokens_of(document, tokenizer)
        yield document, encoded
        tokens -= len(encoded)
        if tokens <= 0:
            return
