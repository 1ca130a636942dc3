"""Batches for the trainer: the same global ones however many ranks and loader processes read them."""

import atexit
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np
import torch

from swamla_titan.data.background import in_background, is_done
from swamla_titan.data.batches import StepBatch, document_ids
from swamla_titan.data.corpus import Corpus
from swamla_titan.data.document import Cursor
from swamla_titan.data.exclusions import Exclusion
from swamla_titan.data.streams import PackedStream, TokenCache, initial_cursor, is_cursor
from swamla_titan.data.worker import LoaderProcess
from swamla_titan.errors import Damaged, RunFailed, UserError
from swamla_titan.system.machine import needed

logger = logging.getLogger(__name__)

_LONGEST_CLOSE = 0.5  # seconds


@dataclass
class Part:
    """What one reader read of a step. `error` instead of data where it could not be read."""

    sequences: np.ndarray  # [n] int64, global numbers, ascending
    tokens: np.ndarray  # [n, T + 1] int32
    cursors: dict[int, Cursor] = field(default_factory=dict)  # of the streams that were read, after it
    replaced: int = 0
    excluded: list[Exclusion] = field(default_factory=list)  # found in this step
    notes: list[str] = field(default_factory=list)  # for the log: what could be read in the end
    error: Exception | None = None

    @classmethod
    def failed(cls, error: Exception) -> "Part":
        return cls(np.empty(0, np.int64), np.empty((0, 0), np.int32), error=error)


class StepReader(Iterator[Part]):
    """Endless: item k is the part of the k-th global batch from sequence `first` on that comes from `streams`.

    `iter` opens it in the process that reads.
    """

    def __init__(
        self,
        corpus: Corpus,
        streams: list[int],
        seq_len: int,
        global_batch_size: int,
        first: int,
        cursors: dict[int, Cursor],
        excluded: Iterable[Exclusion] = (),
    ) -> None:
        self._corpus, self._seq_len, self._size, self._first = corpus, seq_len, global_batch_size, first
        self._numbers = np.array(streams, dtype=np.int64)
        self._cursors = {stream: cursors[stream] for stream in streams}  # of those that are not open yet
        self.excluded = list(excluded)
        self._streams: dict[int, PackedStream] = {}
        self.is_closed = False  # set where the reader is a thread of the training process, which cannot be ended

    def __iter__(self) -> "StepReader":
        self._cache = TokenCache(self._corpus.tokenizer)
        self._retry = self._corpus.new_retry(lambda: self.is_closed)
        return self

    def __next__(self) -> Part:
        try:
            part = self._part()
        except (UserError, RunFailed) as error:
            # As a value, because the part is sent to another process.
            part = Part.failed(error)
        except MemoryError:
            advice = "lower data.num_workers or data.shuffle_documents"
            part = Part.failed(RunFailed(f"Reading the data ran out of memory: {advice}."))
        self._first += self._size
        return part

    def _part(self) -> Part:
        numbers = np.arange(self._first, self._first + self._size, dtype=np.int64)
        owners = numbers % self._corpus.data.streams
        own = np.isin(owners, self._numbers)
        part = Part(numbers[own], np.empty((int(own.sum()), self._seq_len + 1), dtype=np.int32))
        self._retry.begin_step()
        for row, stream in zip(part.tokens, owners[own].tolist()):
            packed = next(self._open(stream))
            row[:] = packed.tokens
            part.cursors[stream] = packed.cursor
            part.replaced += packed.replaced
            part.excluded += packed.excluded
        part.notes = self._retry.notes()
        return part

    def _open(self, stream: int) -> PackedStream:
        if stream not in self._streams:
            cursor = self._cursors.pop(stream)
            self._streams[stream] = PackedStream(
                self._corpus, stream, self._seq_len, self._cache, cursor, self.excluded, self._retry
            )
        return self._streams[stream]


class BatchLoader(Iterator[StepBatch]):
    """Endless iterator over one rank's part of each step's global batch; each batch carries the cursors after it.

    Global sequence g comes from stream g % streams, each global batch takes the next G sequences, and rank r of R owns
    the streams s with s % R == r. To resume, give the cursors of all streams, merged from the batches of every rank,
    what was excluded until then, and the number of the sequence to come.

    Loader processes (worker.py) start with the first batch (or `start`) and live until `close`. If one dies, the next
    batch raises RunFailed.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        cursors: dict[int, Cursor] | None = None,
        excluded: Iterable[Exclusion] = (),
        first: int = 0,
    ) -> None:
        """`num_workers` None takes data.num_workers. UserError if the cursors do not fit the configuration."""
        streams = corpus.data.streams
        if cursors is None:
            assert first == 0, "a later sequence needs cursors"
            cursors = {stream: initial_cursor() for stream in range(streams)}
        else:
            cursors = {int(stream): cursor for stream, cursor in cursors.items()}  # JSON makes strings of the numbers
            _check_cursors(cursors, streams, first)
        _ = corpus.segments  # found once and not by each worker
        self._corpus, self._seq_len, self._size = corpus, seq_len, global_batch_size
        self._workers = corpus.data.num_workers if num_workers is None else num_workers
        self._pin = torch.cuda.is_available()
        # Before the batch to come: of the streams that this rank owns; what was excluded; the batch's first sequence.
        self.cursors = {stream: cursors[stream] for stream in range(rank, streams, world_size)}
        self.excluded, self._first = list(excluded), first
        self._before = self.cursors, self._first  # the same before the batch that was delivered last
        self._readers: list[StepReader] = []
        self._processes: list[LoaderProcess[Part]] = []
        self._coming: Future[tuple[StepBatch, list[str]]] | None = None  # the batch to come, if it was asked for

    def start(self) -> None:
        """Start the processes and their reading ahead, so that it runs beside other preparations; else the first batch
        does. Returns when they are up."""
        if self._readers:
            return
        streams, count = list(self.cursors), max(1, self._workers)
        shared = (self._seq_len, self._size, self._first, self.cursors, self.excluded)
        self._readers = [StepReader(self._corpus, streams[worker::count], *shared) for worker in range(count)]
        if not self._workers:
            iter(self._readers[0])
            return
        # The interpreter's own end waits for processes, and they ignore its SIGTERM: they are ended before that.
        atexit.register(self.close)
        with needed("the processes that read the data cannot be started"):
            for reader in self._readers:
                self._processes.append(LoaderProcess(reader))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait so long, None: to the end, for the batch to come; returns whether it can be taken without waiting.

        Signals are handled meanwhile, because a thread waits, as reading may take minutes when a file server does not
        answer.
        """
        self.start()
        if self._coming is None:
            self._ask()
        assert self._coming is not None
        return is_done(self._coming, seconds)

    def _ask(self) -> None:
        device = torch.cuda.current_device() if self._pin else None  # threads begin with the first one
        self._coming = in_background(partial(self._make_ready, self._first, self.cursors, device))

    def __next__(self) -> StepBatch:
        self.wait()
        coming, self._coming = self._coming, None
        assert coming is not None
        batch, notes = coming.result()
        for note in notes:
            logger.warning("data: %s", note)
        self._before = self.cursors, self._first
        self.cursors, self._first = batch.cursors, self._first + self._size
        self.excluded += batch.excluded
        if self._workers:
            self._ask()  # beside the step that trains on this one
        return batch

    def restart(self, excluded: Iterable[Exclusion]) -> None:
        """Go back to before the batch that was delivered last, and exclude `excluded` as well.

        For ranks that read the same streams, when one of them could not read what the others could.
        """
        self.close()
        self.cursors, self._first = self._before
        known = {each.key for each in self.excluded}
        self.excluded += [each for each in excluded if each.key not in known]

    def close(self) -> None:
        """End the processes. They hold nothing that is not in the cursors, so they are not asked but killed."""
        atexit.unregister(self.close)
        for reader in self._readers:
            reader.is_closed = True
        for process in self._processes:
            process.kill()
        if self._coming:
            is_done(
                self._coming, _LONGEST_CLOSE
            )  # of a dead process it fails at once; what a thread reads may take longer
        for process in self._processes:
            process.close()
        self._readers, self._processes, self._coming = [], [], None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_ready(self, first: int, cursors: dict[int, Cursor], device: int | None) -> tuple[StepBatch, list[str]]:
        """The batch from sequence `first` on, in memory that `device` copies from, and notes for the log; in a thread.

        `cursors` are those before it.
        """
        if device is not None:
            torch.cuda.set_device(device)
        parts = [process.receive() for process in self._processes] or [next(reader) for reader in self._readers]
        for part in parts:
            if part.error is not None:
                raise part.error
            cursors = cursors | part.cursors
        numbers = np.concatenate([part.sequences for part in parts])
        order = np.argsort(numbers)
        rows = np.concatenate([part.tokens for part in parts])[order]  # [n, T + 1] int32
        tokens, targets = (
            torch.empty((len(rows), self._seq_len), dtype=torch.int64, pin_memory=self._pin) for _ in range(2)
        )
        # By NumPy, because torch would wake all its threads for this, which takes 10 ms where the copy takes 0.1.
        tokens.numpy()[:] = rows[:, :-1]
        targets.numpy()[:] = rows[:, 1:]
        ids = None
        if self._corpus.data.document_mask:
            ids = document_ids(tokens, self._corpus.tokenizer.eot_id)
            ids = ids.pin_memory() if self._pin else ids
        replaced = sum(part.replaced for part in parts)
        excluded = [each for part in parts for each in part.excluded]
        batch = StepBatch(first, torch.from_numpy(numbers[order]), tokens, targets, ids, replaced, cursors, excluded)
        return batch, [note for part in parts for note in part.notes]


def _check_cursors(cursors: dict[int, Cursor], streams: int, first: int) -> None:
    """Streams take turns: at sequence `first` each has given one for every g < first with g % streams = its number."""
    if cursors.keys() != set(range(streams)):
        raise UserError(
            f"data.streams = {streams}, but the checkpoint holds the places of {len(cursors)} streams. "
            f"Set data.streams = {len(cursors)}, or start a new run."
        )
    for stream, cursor in cursors.items():
        if not is_cursor(cursor):
            raise Damaged(
                f"The checkpoint's place of stream {stream} in the data is none that this program writes. Use another "
                "checkpoint, or start a new run."
            )
    if any(cursor["sequences"] != len(range(stream, first, streams)) for stream, cursor in cursors.items()):
        total = sum(cursor["sequences"] for cursor in cursors.values())
        raise Damaged(
            f"The checkpoint's record continues with sequence {first} of the data, but its streams stand at {total}: "
            "it was not written by this program. Use another checkpoint, or start a new run."
        )
