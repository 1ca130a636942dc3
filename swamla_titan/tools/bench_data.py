"""`data bench`: how fast this machine reads the data of a configuration."""

import time
from collections.abc import Sequence
from functools import partial

from swamla_titan.config import Config
from swamla_titan.config.schedule import Schedule
from swamla_titan.data import BatchLoader, Corpus, TrainingData, labelled, shapes_of
from swamla_titan.data.faults import Fault
from swamla_titan.data.retry import all_documents
from swamla_titan.data.sources.local import readable_size
from swamla_titan.data.tokenizer import tokens_of
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line
from swamla_titan.system.machine import allow_open_files, cores, needed
from swamla_titan.system.progress import short
from swamla_titan.train.setup import open_data

_WARM_UP = 1.0  # seconds in which loader processes fill what they may read ahead


def bench(config: Config, seconds: float, workers: Sequence[int]) -> None:
    """Print the rates of source, tokenizer and loader, each measured for some `seconds`.

    `workers`: numbers of loader processes to try; none: 0, 1, 2, 4, ... up to the cores. UserError for data that cannot
    be read.
    """
    if seconds <= 0 or any(number < 0 for number in workers):
        raise UserError("--seconds is more than 0, and each of --workers 0 or more")
    began = time.perf_counter()
    config, data = open_data(config)
    _ = [corpus.segments for corpus in data.corpora]  # the division among the streams, which may read much
    found = "; ".join(f"{label}{corpus.source.description}" for label, corpus in labelled(data))
    _print("open", f"{time.perf_counter() - began:.2f} s; {found}")
    for label, corpus in labelled(data):
        _bench_documents(label, corpus, seconds)
    most = cores()
    for number in workers or [0, *(1 << power for power in range(most.bit_length()))]:
        _bench_loader(config, data, seconds, number)


def _print(subject: str, text: str) -> None:
    print(f"{subject:<11}{one_line(text)}", flush=True)


def _bench_documents(label: str, corpus: Corpus, seconds: float) -> None:
    """Read documents one after the other, then tokenize those that were read, in one thread."""
    faults: list[Fault] | None = [] if corpus.skips_files else None
    count = size = tokens = 0
    spent = [0.0, 0.0]  # seconds of reading and of tokenizing
    end, before = time.perf_counter() + 2 * seconds, time.perf_counter()
    for document in all_documents(corpus.source, corpus.new_retry(), faults):
        read = time.perf_counter()
        tokens += len(tokens_of(document, corpus.tokenizer))
        done = time.perf_counter()
        spent = [spent[0] + read - before, spent[1] + done - read]
        count, size, before = count + 1, size + document.size, done
        if done > end:
            break
    size_read = f"{readable_size(int(size / spent[0]))}/s of text, {short(count / spent[0])} documents/s"
    _print("read", f"{label}{size_read}, {short(tokens / spent[0])} tokens/s in one thread")
    if corpus.source.index is None:
        rate = f"{readable_size(int(size / spent[1]))}/s of text, {short(tokens / spent[1])} tokens/s"
        _print("tokenize", f"{label}{rate} in one thread")


def _bench_loader(config: Config, data: TrainingData, seconds: float, workers: int) -> None:
    """Read batches as one rank does, which holds all streams."""
    open_loader = partial(BatchLoader, data, shapes_of(Schedule.of(config)), num_workers=workers)
    with needed("the loader cannot be started"):
        allow_open_files(workers)
    with open_loader() as loader:
        next(loader)  # processes have started
        warm = time.perf_counter() + _WARM_UP
        while (began := time.perf_counter()) < warm:
            next(loader)
        tokens, steps, now = 0, 0, began
        while now < began + seconds:
            tokens += next(loader).tokens.numel()
            now = time.perf_counter()
            steps += 1
        cursors, first = loader.cursors, next(loader).first
    rate = tokens / (now - began)
    began = time.perf_counter()
    with open_loader(cursors=cursors, first=first) as loader:
        next(loader)
        resumed = time.perf_counter() - began
    which = f"{workers} process{'' if workers == 1 else 'es'}" if workers else "in the training process"
    _print("loader", f"{short(rate)} tokens/s {which}; the first batch after a resume takes {resumed:.2f} s")
