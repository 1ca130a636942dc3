"""Batches for the trainer: the same global ones however many ranks and loader workers make them."""

import atexit
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from swamla_titan.data.batches import StepBatch
from swamla_titan.data.corpus import Corpus
from swamla_titan.data.packing import document_ids, initial_cursor, is_cursor
from swamla_titan.data.skips import Skip, skips_of, with_skips
from swamla_titan.data.worker import CURSORS, Background, Portion, StepDataset, settle_worker
from swamla_titan.errors import Damaged, RunFailed, UserError
from swamla_titan.system.machine import needed

logger = logging.getLogger(__name__)

PREFETCH_STEPS = 4  # that a worker may be ahead of the trainer
_LONGEST_TEMPORARY_FOLDER = 107 - 32  # bytes
_PATIENCE_AT_CLOSE = 0.5  # seconds


class _Step(NamedTuple):
    """A step's batch as a thread made it ready; `state` is the loader's after it, `notes` are for the log."""

    batch: StepBatch
    notes: list[str]
    state: dict[str, Any]


class BatchLoader(Iterator[StepBatch]):
    """Endless iterator over one rank's part of each step's global batch.

    Global sequence g comes from stream g % streams, each global batch takes the next G sequences, and rank r of R owns
    the streams s with s % R == r. To resume, give the cursors of all streams, merged from what `state_dict` gave on
    every rank, and the number of the sequence to come.

    Worker processes start with the first batch (or `start`) and live until `close`. They are made by a fork server:
    forking the training process itself would copy its threads' locks and its CUDA state, and starting each worker
    from nothing would import torch once per worker. The server imports once, and being no child of the trainer's, a
    worker that dies interrupts nothing: the next batch raises RunFailed.
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
        cursors: dict[int, dict[str, Any]] | None = None,
        first: int = 0,
    ) -> None:
        """`num_workers` None takes data.num_workers. UserError if the cursors do not fit the configuration."""
        streams = corpus.data.streams
        workers = corpus.data.num_workers if num_workers is None else num_workers
        if cursors is None:
            assert first == 0, "a later sequence needs cursors"
            cursors = {stream: initial_cursor() for stream in range(streams)}
        else:
            cursors = {int(stream): cursor for stream, cursor in cursors.items()}  # JSON makes strings of the numbers
            _check_cursors(cursors, streams, first)
        _ = corpus.segments  # found once and not by each worker
        own = list(range(rank, streams, world_size))
        self._corpus, self._workers = corpus, workers
        self._cursors = {stream: cursors[stream] for stream in own}  # as given; later ones come from the loader
        self._eot_id = corpus.tokenizer.eot_id
        self._document_mask = corpus.data.document_mask
        self._first = first  # of the batch to come
        self._size = global_batch_size
        self._seq_len = seq_len
        self._pin = torch.cuda.is_available()
        self._begin()

    def _begin(self) -> None:
        """Prepares to read from sequence `_first` on, at `_cursors`."""
        workers = self._workers
        dataset = self._dataset = StepDataset(
            self._corpus, list(self._cursors), self._seq_len, self._size, self._first, self._cursors
        )
        # A generator of its own: the loader draws seeds from it, and must not advance the trainer's random state.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata's own affair
            self._loader = StatefulDataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                collate_fn=_unchanged,
                worker_init_fn=partial(settle_worker, os.getpid()),
                multiprocessing_context=_fork_server() if workers else None,
                prefetch_factor=PREFETCH_STEPS if workers else None,
                generator=torch.Generator(),
            )
        self._items: Iterator[Portion] | None = None
        self._coming: Background[_Step] | None = None  # the step to come, if it was asked for
        # The loader's, after the step that was delivered last, and before it.
        self._state: dict[str, Any] | None = None
        self._state_before: dict[str, Any] | None = None

    def start(self) -> None:
        """Starts the workers and their reading ahead, so that it runs beside other preparations; else the first batch
        does. Returns when they are up."""
        if self._items is None:
            # The interpreter's own end waits for workers, and they ignore its SIGTERM: they are ended before that.
            atexit.register(self.close)
            with needed("the processes that read the data cannot be started"):
                self._items = self._guarded(lambda: _started(self._loader))

    def wait(self, seconds: float | None = None) -> bool:
        """Waits so long, None: to the end, for the step to come; returns whether it can be taken without waiting.

        Signals are heard meanwhile: the waiting is done by a thread, as reading may take minutes when a file server
        does not answer.
        """
        self.start()
        if self._coming is None:
            self._ask()
        assert self._coming is not None
        return self._coming.wait(seconds)

    def _ask(self) -> None:
        device = torch.cuda.current_device() if self._pin else None  # threads begin with the first one
        self._coming = Background(partial(self._make_ready, self._items, self._first, device))

    def __next__(self) -> StepBatch:
        self.wait()
        coming, self._coming = self._coming, None
        assert coming is not None
        step = coming.result()
        for note in step.notes:
            logger.warning("data: %s", note)
        self._first += self._size
        self._state_before, self._state = self._state, step.state
        if self._workers:
            self._ask()  # beside the step that trains on this one
        return step.batch

    def state_dict(self, first: int | None = None) -> dict[int, dict[str, Any]]:
        """{stream: cursor} of the streams this rank owns, as they stand before the batch from sequence `first` is read.

        That is the batch to come, or the one delivered last, where it was of no use because another rank could not read
        its part of it. None: the batch to come.
        """
        assert first in (None, self._first, self._first - self._size), "other places are not remembered"
        return self._cursors_of(self._state_before if first == self._first - self._size else self._state)

    def place(self) -> Callable[[], dict[int, dict[str, Any]]]:
        """Gives later what `state_dict()` would give now, and costs nothing until then."""
        return partial(self._cursors_of, self._state)

    def _cursors_of(self, state: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
        if state is None:
            return dict(self._cursors)
        cursors = {int(stream): json.loads(text) for stream, text in _find_cursors(state)}
        assert cursors.keys() == self._cursors.keys(), "each stream has one owner"
        return cursors

    def restart(self, first: int, skips: Iterable[Skip]) -> None:
        """Goes back to before the batch from sequence `first` (as for `state_dict`), and passes over `skips` as well.

        For ranks that read the same streams, when one of them could not read what the others could.
        """
        cursors = self.state_dict(first)
        self.close()
        for stream in {skip.stream for skip in skips} & cursors.keys():
            known = skips_of(stream, cursors[stream])
            new = [skip for skip in skips if skip.stream == stream and skip.key not in {each.key for each in known}]
            cursors[stream] = with_skips(cursors[stream], known + new)
        self._cursors, self._first = cursors, first
        self._begin()

    def close(self) -> None:
        """Ends the workers. They hold nothing that is not in the cursors, so they are not asked but ended."""
        atexit.unregister(self.close)
        items, self._items = self._items, None
        coming, self._coming = self._coming, None
        self._dataset.is_closed = True
        if coming is not None:
            # Mostly it is there; a thread that waits for workers which are gone looks for them seconds later only.
            coming.wait(_PATIENCE_AT_CLOSE)
        if hasattr(items, "_workers"):
            _end_workers(items)
        self._loader._iterator = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_ready(self, items: Any, first: int, device: int | None) -> _Step:
        """The batch from sequence `first` on, in memory that `device` copies from; in a thread."""
        if device is not None:
            torch.cuda.set_device(device)
        portions = self._portions(items)
        notes = [note for portion in portions for note in portion.notes]
        # Taken at whole steps: where one worker's part cannot be read, others' cursors are already past theirs.
        return _Step(self._merge(portions, first), notes, items.state_dict())

    def _portions(self, items: Any) -> list[Portion]:
        """The parts of the step to come, of all workers; without workers the one reader is in this process."""
        portions: list[Portion] = []
        for _ in range(max(1, self._workers)):
            portion = self._guarded(lambda: next(items))
            if portion.error is not None:
                raise portion.error
            portions.append(portion)
        return portions

    def _merge(self, portions: list[Portion], first: int) -> StepBatch:
        numbers = np.concatenate([portion.sequences for portion in portions])
        order = np.argsort(numbers)
        rows = np.concatenate([portion.tokens for portion in portions])[order]  # [n, T + 1] int32
        size = (len(rows), self._seq_len)
        tokens = torch.empty(size, dtype=torch.int64, pin_memory=self._pin)
        targets = torch.empty(size, dtype=torch.int64, pin_memory=self._pin)
        # By NumPy: torch would wake all its threads for this, which takes 10 ms where the copy takes 0.1.
        tokens.numpy()[:] = rows[:, :-1]
        targets.numpy()[:] = rows[:, 1:]
        ids = None
        if self._document_mask:
            ids = document_ids(tokens, self._eot_id)
            ids = ids.pin_memory() if self._pin else ids
        replaced = sum(portion.replaced for portion in portions)
        skips = tuple(skip for portion in portions for skip in portion.skips)
        return StepBatch(first, torch.from_numpy(numbers[order]), tokens, targets, ids, replaced, skips)

    def _guarded(self, work: Any) -> Any:
        try:
            return work()
        except (RuntimeError, ValueError, EOFError, ConnectionError) as error:
            # What torch raises, as no class of its own, when a worker is gone.
            gone = [worker.exitcode for worker in getattr(self._items, "_workers", []) if not worker.is_alive()]
            message = str(error)
            known = isinstance(error, EOFError | ConnectionError)  # it, or the server that forks them
            if not known and not gone and "exited unexpectedly" not in message and "worker has failed" not in message:
                raise
            code = f" (exit code {gone[0]})" if gone else ""
            raise RunFailed(
                f"A data loader process ended unexpectedly{code}. Mostly the machine is out of memory: look at the "
                "kernel's log, lower data.num_workers or data.shuffle_documents, and resume from the last checkpoint."
            ) from error


def _started(loader: StatefulDataLoader[Portion]) -> Iterator[Portion]:
    """`iter(loader)`, or its error, with no worker left that was up by then: this process's end would wait for it."""
    before = multiprocessing.active_children()
    try:
        return iter(loader)
    except BaseException as error:
        for worker in set(multiprocessing.active_children()).difference(before):
            worker.kill()
            worker.join()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half_made: Any = frame.f_locals.get("self")
            if type(half_made).__name__ == "_StatefulMultiProcessingDataLoaderIter":
                half_made._shutdown = True  # or its garbage collection ends with a traceback of its own
        raise


def _end_workers(items: Any) -> None:
    """Kills the processes of torch's iterator `items` and frees what it holds.

    Not by its own `_shutdown_workers`: that takes a lock which workers take as well, and a worker that was killed
    while it had it, by us or by the kernel for want of memory, never gives it back.
    """
    items._shutdown = True  # nor at its garbage collection
    for worker in items._workers:
        worker.kill()
    for worker in items._workers:
        worker.join()
    for queue in (*items._index_queues, items._worker_result_queue):
        queue.cancel_join_thread()
        queue.close()
    if items._worker_pids_set:
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(items))
        items._worker_pids_set = False


def _unchanged(item: Portion) -> Portion:
    # torch's default would move arrays into shared memory, of which containers often have little.
    return item


def prepare_workers(count: int) -> None:
    """Let the server that the loader's `count` processes are forked from begin to start, which takes seconds.

    Nothing waits for it; without this call the first loader starts it. Raises UserError as a loader does.
    """
    if count:
        with needed("the processes that read the data cannot be started"):
            _fork_server()
        with suppress(OSError):  # the loader's own start will tell
            multiprocessing.forkserver.ensure_running()


def _fork_server() -> multiprocessing.context.BaseContext:
    _make_sockets_where_their_names_fit()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _make_sockets_where_their_names_fit() -> None:
    """Let multiprocessing keep its sockets in /tmp where the folder for temporary files has too long a name.

    The name of a socket has 107 bytes at most, of which Python takes 32, and clusters like to name TMPDIR after jobs.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_TEMPORARY_FOLDER:
        return
    kept, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # made once, and remembered
    except OSError as error:
        raise UserError(
            f"the loader's processes talk through sockets, whose names are too long in {usual}, and there can be "
            f"none in /tmp ({error.strerror}). Set TMPDIR to a folder of at most {_LONGEST_TEMPORARY_FOLDER} bytes"
        ) from error
    finally:
        tempfile.tempdir = kept


def _find_cursors(state: Any) -> Iterator[tuple[str, str]]:
    """The streams' cursors, wherever in its state the loader keeps what its workers sent."""
    if isinstance(state, dict):
        for name, value in state.items():
            if name == CURSORS:
                yield from value.items()
            else:
                yield from _find_cursors(value)


def _check_cursors(cursors: dict[int, dict[str, Any]], streams: int, first: int) -> None:
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
            f"The checkpoint's record goes on with sequence {first} of the data, but its streams stand at {total}: "
            "it was not written by this program. Use another checkpoint, or start a new run."
        )
