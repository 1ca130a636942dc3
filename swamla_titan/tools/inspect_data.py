"""`data inspect`: what a run would read: documents, lengths, held-out text, and the sequences of a step."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from swamla_titan.config import Config
from swamla_titan.config.mixture import data_of_sources
from swamla_titan.config.schedule import Schedule
from swamla_titan.data import BatchLoader, Corpus, Tokenizer, TrainingData, described, labelled, shapes_of
from swamla_titan.data.corpus import held_out_documents
from swamla_titan.data.division import training_tokens
from swamla_titan.data.document import Cursor, Document
from swamla_titan.data.faults import Fault
from swamla_titan.data.retry import all_documents
from swamla_titan.data.shards import new_digest, read_manifest
from swamla_titan.data.sources.local import readable_size
from swamla_titan.data.streams import indexed_cursor
from swamla_titan.data.tokenizer import tokens_of
from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from swamla_titan.escaping import one_line, several_lines
from swamla_titan.system.progress import Progress
from swamla_titan.train.setup import open_data

_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_SHOWN_HELD_OUT, _SHOWN_CHARS = 3, 100
_READ = 16 << 20  # bytes at a time
_BORDER = "---- end of document ----"


def inspect(config: Config, step: int, sequences: int, documents: int, verify: bool) -> int:
    """Print what the data of a configuration are; returns the exit code.

    `step`: the one whose sequences are shown, from 1 on; `sequences`: how many of them, 0: all. `documents`: as many
    are read for the statistics, 0: all; of prepared shards these are known of all. `verify`: compare all files of
    prepared shards with their digests.
    """
    if step < 1 or sequences < 0 or documents < 0:
        raise UserError("--step is at least 1, --sequences and --documents at least 0")
    sources = data_of_sources(config.data).values()
    shards = [each.path for each in sources if each.source == "shards"]
    if verify and not shards:
        kinds = " and ".join(f'data.source = "{each}"' for each in sorted({each.source for each in sources}))
        raise UserError(f"--verify compares prepared shards with their digests, and {kinds}")
    intact = [_is_intact(path) for path in shards if verify]
    if not all(intact):
        return EXIT_BAD_INPUT
    config, opened = open_data(config)
    _print("tokenizer", f"{opened.tokenizer.name}, {opened.tokenizer.vocab_size:,} tokens")
    for label, corpus in labelled(opened):
        _print("data", f"{label}{corpus.data.source} {corpus.data.path}".strip(), corpus.source.description)
        for fault in {str(each) for each in (*corpus.source.unreadable, *corpus.faults)}:
            _print("skipped", fault)
        _print_documents(corpus, documents, Schedule.of(config).longest.training.seq_len)
        _print_held_out(config, corpus)
        _print("streams", described(corpus.segments[0]))
    _print_step(config, opened, step, sequences)
    return EXIT_DONE


def _print(subject: str, *parts: str) -> None:
    print(f"{subject:<11}{one_line('; '.join(parts))}")


# Files


def _is_intact(path: str) -> bool:
    """Compare every file of prepared shards with its digest; prints those that differ."""
    folder = os.path.expanduser(path)
    manifest = read_manifest(folder, "data.path")
    differing = []
    with Progress("verifying", sum(manifest.sizes().values()), "B") as progress:
        for name, digest in manifest.digests().items():
            try:
                found = _digest(Path(folder, name), progress)
            except OSError as error:
                found = error.strerror or str(error)
            if found != digest:
                differing.append(name)
    for name in differing:
        _print("verify", f"{os.path.join(folder, name)} is not as it was prepared")
    if not differing:
        _print("verify", f"all {len(manifest.digests())} files are as they were prepared")
    return not differing


def _digest(path: Path, progress: Progress) -> str:
    digest = new_digest()
    with path.open("rb") as file:
        while content := file.read(_READ):
            digest.update(content)
            progress.advance(len(content))
    return digest.hexdigest()


# Documents


def _print_documents(corpus: Corpus, most: int, seq_len: int) -> None:
    counts, sizes = _lengths(corpus, most)
    total = int(counts.sum())
    every = corpus.source.index is not None or not most or len(counts) < most
    which = "all" if every else "the first, see --documents"
    _print("documents", f"{len(counts):,} ({which}), {total:,} tokens, {total / len(counts):,.0f} a document")
    if sizes:
        _print("text", f"{readable_size(sizes)}, {sizes / max(1, total - len(counts)):.2f} bytes a token")
    quantiles = np.quantile(counts, _QUANTILES, method="inverted_cdf").tolist()
    parts = [f"{share:.0%} {count:,}" for share, count in zip(_QUANTILES, quantiles)]
    _print("lengths", f"{', '.join(parts)}, the longest {int(counts.max()):,} tokens")
    longer = float((counts > seq_len).mean())
    _print("", f"{longer:.1%} are longer than a sequence (training.seq_len = {seq_len:,})")


def _lengths(corpus: Corpus, most: int) -> tuple[np.ndarray, int]:
    """Tokens of each document with its end of text, int64 [n], and bytes of all texts, 0 if these are not known."""
    if corpus.source.index is not None:
        counts = np.concatenate([counts for counts, _ in corpus.source.index.scan()])
        return counts, corpus.source.text_bytes or 0
    found, size = [], 0
    for document in islice(_texts(corpus), most or None):
        found.append(len(tokens_of(document, corpus.tokenizer)))
        size += len(document.text.encode("utf-8", errors="surrogatepass"))
    return np.array(found), size


def _texts(corpus: Corpus) -> Iterator[Document]:
    faults: list[Fault] | None = [] if corpus.skips_files else None
    return (each for each in all_documents(corpus.source, corpus.new_retry(), faults) if not each.is_empty)


def _print_held_out(config: Config, corpus: Corpus) -> None:
    validation = config.validation
    if validation.path:
        _print("held out", f"copies of the texts in validation.path = {validation.path}")
        return
    if not validation.fraction:
        _print("held out", "nothing (validation.fraction = 0)")
        return
    found = f"{validation.fraction:.2%} of the documents, by their text (validation.fraction)"
    if corpus.source.index is not None:
        numbers, tokens = 0, 0
        for counts, hashes in corpus.source.index.scan():
            among = corpus.held_out.among(hashes)
            numbers, tokens = numbers + int(among.sum()), tokens + int(counts[among].sum())
        found += f": {numbers:,} documents, {tokens:,} tokens"
    _print("held out", f"{found}; the first begin")
    faults: list[Fault] | None = [] if corpus.skips_files else None
    for document in islice(held_out_documents(corpus, faults), _SHOWN_HELD_OUT):
        text = document.text[:_SHOWN_CHARS]
        if document.prepared:
            text = corpus.tokenizer.decode(document.prepared.tokens[:_SHOWN_CHARS].tolist())[:_SHOWN_CHARS]
        print(f"{'':<11}{one_line(json.dumps(text, ensure_ascii=False))}")


# Sequences


def _print_step(config: Config, data: TrainingData, step: int, most: int) -> None:
    """Print the sequences of a step of a new run as text, with the borders of documents."""
    schedule = Schedule.of(config)
    size, first = schedule.stage(step).training.global_batch_size, schedule.after(step - 1).sequences
    cursors, begun = None, 0
    if all(corpus.source.index for corpus in data.corpora) and data.data.packing == "concatenate":
        cursors, begun = _cursors(data, schedule, first), step - 1
    begin = schedule.after(begun).sequences
    with (
        BatchLoader(data, shapes_of(schedule), num_workers=0, cursors=cursors, first=begin) as loader,
        Progress("reading up to the step", step - begun, " steps") as progress,
    ):
        for _ in range(step - begun):
            batch = next(loader)
            progress.advance(1)
    count = min(most or size, size)
    _print(
        "step", f"{step}: sequences {first} to {first + size - 1}" + (f"; the first {count}" if count < size else "")
    )
    numbers = batch.sequences[:count].numpy()
    places = zip(data.order.sources(numbers).tolist(), data.order.slots(numbers).tolist())
    for number, (source, slot), row in zip(numbers.tolist(), places, map(batch.text, range(count))):
        ends = row.count(data.tokenizer.eot_id)
        where = f"stream {slot}" + (f" of {data.names[source]}" if data.names[source] else "")
        print(f"\n==== sequence {number}, of {where}, with {ends} ends of documents ====")
        print(several_lines(_text(row, data.tokenizer)))


def _cursors(data: TrainingData, schedule: Schedule, first: int) -> dict[int, Cursor]:
    """The cursors of a new run before sequence `first`; all corpora have an index."""
    order, streams, found = data.order, data.data.streams, {}
    read = np.zeros_like(order.counts_by_stream(0))
    lengths = read.copy()  # of the sequences that each stream has given
    ends = [min(stage.begin.sequences, first) for stage in schedule.stages[1:]] + [first]
    for stage, end in zip(schedule.stages, ends):
        own = order.counts_by_stream(end) - read
        read, lengths = read + own, lengths + own * stage.training.seq_len
    for source, corpus in enumerate(data.corpora):
        assert corpus.source.index is not None
        tokens = training_tokens(corpus.source.index, corpus.held_out)
        for key in range(source * streams, (source + 1) * streams):
            found[key] = indexed_cursor(corpus, key % streams, int(read[key]), int(lengths[key]), tokens)
    return found


def _text(tokens: list[int], tokenizer: Tokenizer) -> str:
    """The text of a sequence; a line of its own is where a document ends."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.eot_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return f"\n{_BORDER}\n".join(tokenizer.decode(part) for part in parts)
