"""Batches for the trainer; the global batches do not depend on the number of ranks and loader processes."""

import atexit
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np
import torch

from swamla_titan.data.background import in_background, is_done
from swamla_titan.data.batches import IGNORED, Shape, StepBatch, document_ids, sequences_per_rank, shape_at
from swamla_titan.data.best_fit import PACKINGS
from swamla_titan.data.corpora import Mixture, TrainingData
from swamla_titan.data.corpus import Corpus, retry_of
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
    """One reader's part of a step; if it could not be read, it has an `error` and no data."""

    sequences: np.ndarray  # [n] int64, global numbers, ascending
    tokens: np.ndarray  # [n, T + 1] int32; IGNORED is padding
    cursors: dict[int, Cursor] = field(default_factory=dict)  # of the streams that were read, after this step
    replaced: int = 0
    excluded: list[Exclusion] = field(default_factory=list)  # found in this step
    notes: list[str] = field(default_factory=list)  # for the log: what was read after retries
    error: Exception | None = None

    @classmethod
    def failed(cls, error: Exception) -> "Part":
        return cls(np.empty(0, np.int64), np.empty((0, 0), np.int32), error=error)


class StepReader(Iterator[Part]):
    """Reads the parts of global batches that come from `slots`, endlessly; the first begins with sequence `first`.

    A slot reads a stream of each source, and of a single source slots are its streams. `iter` opens it in the process
    that reads.
    """

    def __init__(
        self,
        corpus: TrainingData,
        slots: list[int],
        shapes: Sequence[Shape],
        first: int,
        cursors: dict[int, Cursor],
        excluded: Iterable[Exclusion] = (),
    ) -> None:
        self._corpus, self._shapes, self._first = corpus, shapes, first
        self._slots = np.array(slots, dtype=np.int64)
        # Of streams that are not open yet.
        self._cursors = {key: cursors[key] for key in keys_of_slots(corpus, slots)}
        self.excluded = list(excluded)
        self._streams: dict[int, PackedStream] = {}
        self.is_closed = False  # set to stop a reader in a thread of the training process, which cannot be killed

    def __iter__(self) -> "StepReader":
        self._caches = [TokenCache(self._corpus.tokenizer) for _ in self._corpus.corpora]
        self._retry = retry_of(self._corpus.data, lambda: self.is_closed)
        return self

    def __next__(self) -> Part:
        _, size, seq_len = shape_at(self._shapes, self._first)
        try:
            part = self._part(size, seq_len)
        except (UserError, RunFailed) as error:
            # Returned, because the part is sent to another process.
            part = Part.failed(error)
        except MemoryError:
            advice = "lower data.num_workers or data.shuffle_documents"
            part = Part.failed(RunFailed(f"Reading the data ran out of memory: {advice}."))
        self._first += size
        return part

    def _part(self, size: int, seq_len: int) -> Part:
        numbers = np.arange(self._first, self._first + size, dtype=np.int64)
        own = np.isin(self._corpus.order.slots(numbers), self._slots)
        part = Part(numbers[own], np.empty((int(own.sum()), seq_len + 1), dtype=np.int32))
        self._retry.begin_step()
        for row, stream in zip(part.tokens, self._corpus.order.cursor_keys(numbers[own]).tolist()):
            packed = self._open(stream).next(seq_len)
            row[:] = packed.tokens
            part.cursors[stream] = packed.cursor
            part.replaced += packed.replaced
            part.excluded += packed.excluded
        part.notes = self._retry.notes()
        return part

    def _open(self, stream: int) -> PackedStream:
        if stream not in self._streams:
            cursor, source = self._cursors.pop(stream), stream // self._corpus.data.streams
            corpus, cache = self._corpus.corpora[source], self._caches[source]
            packed = PACKINGS[self._corpus.data.packing]
            self._streams[stream] = packed(corpus, stream, cache, cursor, self.excluded, self._retry)
        return self._streams[stream]


class BatchLoader(Iterator[StepBatch]):
    """Endless iterator over one rank's slice of each step's global batch; each batch carries the cursors after it.

    Global sequence g comes from stream g % streams, each global batch takes the next ones, as many and as long as
    `shapes` says of its first, and rank r of R owns the streams s with s % R == r. Of a mixture it comes from the
    source and the slot that its order says, and ranks own slots, which have a stream of each source. To resume, pass
    the cursors of all streams, merged from the batches of all ranks, the exclusions until then, and the number of the
    next sequence.

    Loader processes (worker.py) start with the first batch (or `start`) and live until `close`. If one dies, the next
    batch raises RunFailed.
    """

    def __init__(
        self,
        corpus: TrainingData,
        shapes: Sequence[Shape],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        cursors: dict[int, Cursor] | None = None,
        excluded: Iterable[Exclusion] = (),
        first: int = 0,
    ) -> None:
        """`num_workers` None: data.num_workers. Raises UserError if the cursors do not fit the configuration."""
        streams = corpus.data.streams
        if cursors is None:
            assert first == 0, "a later sequence needs cursors"
            cursors = {stream: initial_cursor() for stream in keys_of_slots(corpus, range(streams))}
        else:
            cursors = {int(stream): cursor for stream, cursor in cursors.items()}  # JSON makes strings of the numbers
            _check_cursors(cursors, corpus, first)
        _ = [each.segments for each in corpus.corpora]  # computed once and not by each worker
        self._corpus, self._shapes = corpus, shapes
        self._workers = corpus.data.num_workers if num_workers is None else num_workers
        self._pin = torch.cuda.is_available()
        # Before the next batch: cursors of this rank's streams, exclusions, and the batch's first sequence.
        self._slots, self._world_size = range(rank, streams, world_size), world_size
        self.cursors = {stream: cursors[stream] for stream in keys_of_slots(corpus, self._slots)}
        self.excluded, self._first = list(excluded), first
        self._before = self.cursors, self._first  # before the last batch that was delivered
        self._readers: list[StepReader] = []
        self._processes: list[LoaderProcess[Part]] = []
        self._coming: Future[tuple[StepBatch, list[str]]] | None = None  # the next batch, if it was requested

    def start(self) -> None:
        """Start the processes, which read ahead while the caller prepares other things; returns when they run.

        Without this call the first batch starts them.
        """
        if self._readers:
            return
        slots, count = list(self._slots), max(1, self._workers)
        shared = (self._shapes, self._first, self.cursors, self.excluded)
        self._readers = [StepReader(self._corpus, slots[worker::count], *shared) for worker in range(count)]
        if not self._workers:
            iter(self._readers[0])
            return
        # At its exit the interpreter waits for processes, which ignore its SIGTERM, so they are killed before that.
        atexit.register(self.close)
        with needed("the processes that read the data cannot be started"):
            for reader in self._readers:
                self._processes.append(LoaderProcess(reader))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the next batch, at most `seconds` (None: any time); returns whether `next` returns at once.

        A thread does the reading, so that signals are handled meanwhile: it may take minutes if a file server does not
        answer.
        """
        self.start()
        if self._coming is None:
            self._ask()
        assert self._coming is not None
        return is_done(self._coming, seconds)

    def _ask(self) -> None:
        device = torch.cuda.current_device() if self._pin else None  # new threads use device 0
        self._coming = in_background(partial(self._make_ready, self._first, self.cursors, device))

    def __next__(self) -> StepBatch:
        self.wait()
        coming, self._coming = self._coming, None
        assert coming is not None
        batch, notes = coming.result()
        for note in notes:
            logger.warning("data: %s", note)
        self._before = self.cursors, self._first
        self.cursors = batch.cursors
        self._first += shape_at(self._shapes, self._first).global_batch_size
        self.excluded += batch.excluded
        if self._workers:
            self._ask()  # prepared while the step trains on this one
        return batch

    def restart(self, excluded: Iterable[Exclusion]) -> None:
        """Go back to before the last batch that was delivered, and add `excluded` to the exclusions.

        Ranks that read the same streams need this if one of them could not read what the others could.
        """
        self.close()
        self.cursors, self._first = self._before
        known = {each.key for each in self.excluded}
        self.excluded += [each for each in excluded if each.key not in known]

    def close(self) -> None:
        """Kill the processes; they hold nothing that is not in the cursors."""
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
        """The batch that begins with sequence `first`, in memory pinned for `device`, and notes for the log.

        `cursors` are those before it. Runs in a thread.
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
        seq_len = rows.shape[1] - 1
        tokens, targets = (torch.empty((len(rows), seq_len), dtype=torch.int64, pin_memory=self._pin) for _ in range(2))
        # By NumPy, because torch would wake all its threads, which takes 10 ms, and the copy takes 0.1 ms.
        tokens.numpy()[:] = rows[:, :-1]
        targets.numpy()[:] = rows[:, 1:]
        eot_id, padding = self._corpus.tokenizer.eot_id, None
        if self._corpus.data.packing != "concatenate":
            padding = rows[:, :-1] == IGNORED
            tokens.numpy()[padding] = 0 if eot_id else 1
        ids = None
        if self._corpus.data.document_mask:
            ids = document_ids(tokens, eot_id)
            if padding is not None:
                ids.numpy()[padding] += 1  # a document of its own
            ids = ids.pin_memory() if self._pin else ids
        replaced = sum(part.replaced for part in parts)
        excluded = [each for part in parts for each in part.excluded]
        numbers = numbers[order]
        size = shape_at(self._shapes, first).global_batch_size
        largest = max(sequences_per_rank(first, size, self._corpus.order, self._world_size))
        sources = None
        if not self._corpus.order.has_one_source:
            sources = torch.from_numpy(self._corpus.order.sources(numbers))
            sources = sources.pin_memory() if self._pin else sources
        batch = StepBatch(
            *(first, torch.from_numpy(numbers), tokens, targets, ids, replaced, cursors, excluded, largest, sources)
        )
        return batch, [note for part in parts for note in part.notes]


def keys_of_slots(corpus: TrainingData, slots: Iterable[int]) -> list[int]:
    """The keys of the cursors of some slots, which have a stream of each source."""
    slots = list(slots)
    return [source * corpus.data.streams + slot for source in range(len(corpus.corpora)) for slot in slots]


def _check_cursors(cursors: dict[int, Cursor], corpus: TrainingData, first: int) -> None:
    """Raise UserError or Damaged unless the cursors are those of the streams of `corpus` before sequence `first`."""
    streams, sources = corpus.data.streams, len(corpus.corpora)
    if cursors.keys() != set(range(streams * sources)):
        raise UserError(
            f"data.streams = {streams}, but the checkpoint holds the places of {len(cursors) // sources} streams. "
            f"Set data.streams = {len(cursors) // sources}, or start a new run."
        )
    for stream, cursor in cursors.items():
        if not is_cursor(cursor):
            raise Damaged(
                f"The checkpoint's place of stream {stream} in the data is none that this program writes. Use another "
                "checkpoint, or start a new run."
            )
    if _sequences_read(cursors, corpus) != _sequences_before(corpus, first):
        total = sum(cursor["sequences"] for cursor in cursors.values())
        raise Damaged(
            f"The checkpoint's record continues with sequence {first} of the data, but its streams stand at {total}: "
            "it was not written by this program. Use another checkpoint, or start a new run."
        )


def _sequences_read(cursors: dict[int, Cursor], corpus: TrainingData) -> list[int]:
    """How many sequences the cursors have behind them, by stream, of a mixture by source."""
    streams = corpus.data.streams
    read = [cursors[stream]["sequences"] for stream in range(len(cursors))]
    if isinstance(corpus, Corpus):
        return read
    return [sum(read[source * streams : (source + 1) * streams]) for source in range(len(corpus.corpora))]


def _sequences_before(corpus: TrainingData, first: int) -> list[int]:
    """How many it must be before sequence `first`: streams of a single source take turns."""
    if isinstance(corpus, Mixture):
        return corpus.counts(first)
    counts: list[int] = corpus.order.counts_by_stream(first).tolist()
    return counts
