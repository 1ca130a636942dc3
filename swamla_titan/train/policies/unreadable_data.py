"""The next step's batch: all ranks wait for it, fail, and skip unreadable parts of the data together.

The policy counts and lists the skipped files, or rests of files, and counts bytes that were replaced.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from swamla_titan.checkpoint.records import TrainState
from swamla_titan.data import BatchLoader, Exclusion, StepBatch, TrainingData, labelled
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.launch.signals import Stop, StopRequest
from swamla_titan.system.events import record_event
from swamla_titan.train.policy import Policy

logger = logging.getLogger(__name__)

NAME = "skipped_files.json"
POLL_SECONDS = 1.0  # between two checks for a signal, while a rank waits for its data

_READY, _EXCLUDED, _WAITING, _FAILED = range(4)  # states of a rank; the maximum over all ranks decides


class UnreadableData(Policy):
    """Counts and logs the data that the run could not read; holds the job's list of exclusions, on every rank.

    Rank 0 writes `folder`/skipped_files.json: a list of objects `file`, `stream`, `step` (None: before this start),
    `place`, `reason`; a file that streams share has an object for each stream that reached the damage, and a file of a
    mixture begins with the name of its source. A resumed run reads the list from its checkpoint and does not need this
    file.
    """

    def __init__(self, folder: Path, corpus: TrainingData, start: TrainState, writes: Callable[[], bool]) -> None:
        """Begin with the exclusions of `start`, and the files that `corpus` could not open.

        `writes()`: whether this rank logs and writes.
        """
        self._replaced_before, self._replaced = start.replaced_bytes, 0  # of all ranks; by this one since this start
        self._path, self._writes = folder / NAME, writes
        self._files: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        self._streams, self._labels = corpus.data.streams, [label for label, _ in labelled(corpus)]
        for label, each in labelled(corpus):
            for fault in each.source.unreadable:
                self._note(None, None, label + fault.file, fault.place, fault.reason)
            opened = {fault.file for fault in each.source.unreadable}
            for fault in each.faults:
                if writes() and fault.file not in opened:
                    logger.warning("data: %s%s; held-out text is taken from the rest", label, fault)
        self._excluded = list(start.excluded)
        for exclusion in self._excluded:
            self._note_exclusion(None, exclusion)
        if self._entries:
            self._write()

    def metrics(self) -> dict[str, float | int]:
        """The number of files of which a part is skipped, if there are any."""
        return {"skipped_files": len(self._files)} if self._files else {}

    def state(self, world: World) -> dict[str, Any]:
        """The fields of a TrainState: exclusions, and `replaced_bytes` of all ranks since the run began. Collective."""
        replaced = self._replaced_before + sum(all_gather_dict(world, {world.data_rank: self._replaced}).values())
        return {"replaced_bytes": replaced, "excluded": list(self._excluded)}

    def take_batch(self, step: int, batch: StepBatch) -> None:
        """Count invalid UTF-8 byte sequences, which this rank read as U+FFFD; warn of the first."""
        if batch.replaced and not self._replaced_before + self._replaced:
            logger.warning("the data holds bytes that are not UTF-8; they are read as U+FFFD and counted")
        self._replaced += batch.replaced

    def exclude(self, step: int, found: Iterable[Exclusion]) -> None:
        """Add what ranks found unreadable in the batch of `step` (from 1); several ranks may have found the same."""
        new = sorted({each.key: each for each in found}.values(), key=lambda each: each.key)
        self._excluded += new
        record_event("skipped_files", step=step, files=sorted({self._file(each) for each in new}))
        for each in new:
            self._note_exclusion(step, each)
        self._write()

    def _file(self, exclusion: Exclusion) -> str:
        return self._labels[exclusion.stream // self._streams] + exclusion.file

    def _note_exclusion(self, step: int | None, exclusion: Exclusion) -> None:
        self._note(step, exclusion.stream, self._file(exclusion), exclusion.place, exclusion.reason)

    def _note(self, step: int | None, stream: int | None, file: str, place: str, reason: str) -> None:
        self._entries.append({"file": file, "stream": stream, "step": step, "place": place, "reason": reason})
        if self._writes() and file not in self._files:
            where = f"{file}, {place}" if place else file
            logger.warning("data: %s: %s; the rest of the file is skipped in this run", where, reason)
        self._files.add(file)

    def _write(self) -> None:
        if not self._writes():
            return
        try:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            logger.warning("%s could not be written (%s); the checkpoints hold the same", self._path, error.strerror)


def next_batch(
    world: World, loader: BatchLoader, step: int, stop: StopRequest, unreadable: UnreadableData
) -> StepBatch | Stop:
    """This rank's slice of the batch of `step` (from 1); all ranks call this.

    Returns a Stop, on every rank, if a rank still waits for its data and any rank got a signal. If one rank cannot read
    its data, all raise its UserError or RunFailed. Ranks that read the same streams must exclude the same: if only some
    of them found data unreadable, the others go back to before the step and exclude these data too. Adds the exclusions
    to `unreadable`.
    """
    batch: StepBatch | None = None
    error: UserError | RunFailed | None = None
    found: list[Exclusion] = []  # in this step, by this rank or by others that read the same streams
    while True:
        if batch is None and error is None:
            try:
                batch = next(loader) if loader.wait(POLL_SECONDS) else None
            except (UserError, RunFailed) as raised:
                error = raised
            else:
                found += batch.excluded if batch else []
        state = _FAILED if error else _WAITING if batch is None else _EXCLUDED if found else _READY
        worst = world.all_reduce_max(state)
        if worst == _READY:
            assert batch is not None
            return batch
        if worst == _WAITING:
            if asked := stop.agreed(world.all_reduce_max):
                return asked
        elif worst == _FAILED:
            all_ranks_or_raise(world, partial(_raise, error))
        else:
            every = all_gather_dict(world, {world.rank: (world.data_rank, found)})
            missing = _missing(found, [theirs for data_rank, theirs in every.values() if data_rank == world.data_rank])
            if missing:
                found += missing
                loader.restart(found)
                batch = None
            if not world.all_reduce_max(bool(missing)):
                assert batch is not None
                unreadable.exclude(step, [each for _, theirs in every.values() for each in theirs])
                return batch


def _missing(own: list[Exclusion], of_all: list[list[Exclusion]]) -> list[Exclusion]:
    """The exclusions of other ranks that this one does not have, each once."""
    known = {each.key for each in own}
    rest = {each.key: each for theirs in of_all for each in theirs if each.key not in known}
    return [rest[key] for key in sorted(rest)]


def _raise(error: UserError | RunFailed | None) -> None:
    if error is not None:
        raise error
