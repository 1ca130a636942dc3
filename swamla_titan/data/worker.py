"""What a loader process does: advance its streams, and hand over its part of each step with their cursors."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from swamla_titan.data.corpus import Corpus
from swamla_titan.data.packing import PackedStream, TokenCache
from swamla_titan.data.skips import Skip
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.system.console import LogFormatter, open_console
from swamla_titan.system.process_end import wait_for_end

CURSORS = "stream_cursors"  # key of the cursors in the loader's state


@dataclass
class Portion:
    """A worker's part of one step. `error` instead of data where it could not be read."""

    sequences: np.ndarray  # [n] int64, global numbers, ascending
    tokens: np.ndarray  # [n, T + 1] int32
    replaced: int
    skips: list[Skip] = field(default_factory=list)  # found in this step
    notes: list[str] = field(default_factory=list)  # for the log: what could be read in the end
    error: UserError | RunFailed | None = None


def _failed(error: UserError | RunFailed) -> Portion:
    return Portion(np.empty(0, np.int64), np.empty((0, 0), np.int32), 0, error=error)


def settle_worker(trainer: int, worker: int) -> None:
    """Runs first in every loader process; `trainer` is the PID of the training process.

    Ctrl-C and a scheduler's SIGTERM or SIGUSR1 reach all processes of the job; what follows from them is decided in
    the training process, which still needs its batches until the last step is saved. It ends the workers itself; where
    it is killed before it can, they end themselves.
    """
    open_console()
    if logging.lastResort is not None:  # what a worker logs goes to standard error, by no handler of its own
        logging.lastResort.setFormatter(LogFormatter())
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: their number is the user's to choose
    # torch's own watchdog looks at the parent, and that is the fork server, which lives as long as its workers do.
    threading.Thread(target=_end_with, args=(trainer,), daemon=True, name="trainer-watch").start()


def _end_with(trainer: int) -> None:
    """Ends this process as soon as the process `trainer` is gone."""
    wait_for_end(trainer)
    os._exit(1)


class StepDataset(IterableDataset[Portion]):
    """Endless: item k of a worker is its part of the k-th global batch from sequence `first` on.

    It reads the streams numbered `streams`.
    """

    def __init__(
        self,
        corpus: Corpus,
        streams: list[int],
        seq_len: int,
        global_batch_size: int,
        first: int,
        cursors: dict[int, dict[str, Any]],
    ) -> None:
        self.corpus = corpus
        self.streams = streams
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.first = first
        self.is_closed = False  # set where the reader is a thread of this process, which cannot be ended
        self.cursors = cursors

    def __iter__(self) -> "StepIterator":
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return StepIterator(self, self.streams[worker::workers])


class StepIterator(Iterator[Portion]):
    """The iterator of one worker; its state is what StatefulDataLoader sends along with every item."""

    def __init__(self, dataset: StepDataset, streams: list[int]) -> None:
        self._dataset = dataset
        self._first = dataset.first
        self._numbers = np.array(streams, dtype=np.int64)
        self._streams: dict[int, PackedStream] = {}  # opened when first needed
        self._cache = TokenCache(dataset.corpus.tokenizer)
        self._patience = dataset.corpus.new_patience(lambda: dataset.is_closed)
        # As text: they are copied and compared at every step, and only those that moved are written anew.
        self._cursors = {str(stream): json.dumps(dataset.cursors[stream]) for stream in streams}

    def __next__(self) -> Portion:
        try:
            portion = self._portion()
        except (UserError, RunFailed) as error:
            # As a value: raised here it would reach the user wrapped in the worker's traceback.
            portion = _failed(error)
        except MemoryError:
            portion = _failed(
                RunFailed("Reading the data ran out of memory: lower data.num_workers or data.shuffle_documents.")
            )
        self._first += self._dataset.global_batch_size
        return portion

    def state_dict(self) -> dict[str, Any]:
        return {CURSORS: dict(self._cursors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # StatefulDataLoader asks both methods of a stateful iterator, but a resumed loader is built anew from the
        # cursors of all streams: only so can it have another number of ranks and workers.
        raise NotImplementedError("a loader is resumed by BatchLoader(cursors=...)")

    def _portion(self) -> Portion:
        numbers = np.arange(self._first, self._first + self._dataset.global_batch_size, dtype=np.int64)
        owners = numbers % self._dataset.corpus.data.streams
        mine = np.isin(owners, self._numbers)
        rows = np.empty((int(mine.sum()), self._dataset.seq_len + 1), dtype=np.int32)
        replaced = 0
        skips: list[Skip] = []
        self._patience.begin()
        for row, owner in zip(rows, owners[mine].tolist()):
            stream = self._stream(owner)
            before = stream.replaced
            row[:] = stream.next_sequence()
            replaced += stream.replaced - before
            skips += stream.new_skips()
        for owner in set(owners[mine].tolist()):
            self._cursors[str(owner)] = json.dumps(self._streams[owner].cursor())
        return Portion(numbers[mine], rows, replaced, skips, self._patience.notes())

    def _stream(self, number: int) -> PackedStream:
        if number not in self._streams:
            dataset = self._dataset
            self._streams[number] = PackedStream(
                dataset.corpus, number, dataset.seq_len, self._cache, dataset.cursors[number], self._patience
            )
        return self._streams[number]


Result = TypeVar("Result")


class Background(Generic[Result]):
    """Does `work` in a thread of its own, from now on; whoever wants the result can wait for it a little at a time.

    The thread ends with its work, and does not keep the process alive.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(work,), daemon=True, name="data").start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits so long, None: to the end; returns whether the work is done."""
        return self._done.wait(seconds)

    def result(self) -> Result:
        """What the work gave, once it is done, or raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error
        self._done.set()
