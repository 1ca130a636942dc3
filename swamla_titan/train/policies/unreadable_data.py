"""Data that a run cannot read: files, or the rest of files, that it skips, and bytes that it replaces."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swamla_titan.checkpoint.records import TrainState
from swamla_titan.data import Corpus, Exclusion
from swamla_titan.distributed.mesh import World, all_gather_dict
from swamla_titan.train.policy import Policy

logger = logging.getLogger(__name__)

NAME = "skipped_files.json"


class UnreadableData(Policy):
    """Counts and logs what the run could not read since it began; has the job's list of exclusions, on every rank.

    Rank 0 writes `folder`/skipped_files.json: a list of objects `file`, `stream`, `step` (None: before this start),
    `place`, `reason`; a file that streams share has an object for each stream that reached it. A resumed run reads the
    list from its checkpoint, so the file may be lost, or not writable.
    """

    def __init__(self, folder: Path, corpus: Corpus, start: TrainState, writes: Callable[[], bool]) -> None:
        """Take what was skipped from `start`; `corpus` knows the files that could not be opened.

        `writes()`: whether this rank logs and writes.
        """
        self._replaced_before, self._replaced = start.replaced_bytes, 0  # of all ranks; by this one since this start
        self._path, self._writes = folder / NAME, writes
        self._files: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        for fault in corpus.source.unreadable:
            self._note(None, None, fault.file, fault.place, fault.reason)
        opened = {fault.file for fault in corpus.source.unreadable}
        for fault in corpus.faults:
            if writes() and fault.file not in opened:
                logger.warning("data: %s; held-out text is taken from the rest", fault)
        self._excluded = list(start.excluded)
        for each in self._excluded:
            self._note(None, each.stream, each.file, each.place, each.reason)
        if self._entries:
            self._write()

    def metrics(self) -> dict[str, float | int]:
        """The number of files of which something is skipped, if there are any."""
        return {"skipped_files": len(self._files)} if self._files else {}

    def state(self, world: World) -> dict[str, Any]:
        """What a TrainState has of it; `replaced_bytes` of all ranks since the run began. Collective."""
        replaced = self._replaced_before + sum(all_gather_dict(world, {world.data_rank: self._replaced}).values())
        return {"replaced_bytes": replaced, "excluded": list(self._excluded)}

    def add_replaced(self, count: int) -> None:
        """Count stretches of bytes that this rank has read as U+FFFD in a batch; warn of the first."""
        if count and not self._replaced_before + self._replaced:
            logger.warning("the data holds bytes that are not UTF-8; they are read as U+FFFD and counted")
        self._replaced += count

    def exclude(self, step: int, found: Iterable[Exclusion]) -> None:
        """Add what was found unreadable for the batch of `step` (from 1); ranks may have found the same."""
        new = sorted({each.key: each for each in found}.values(), key=lambda each: each.key)
        self._excluded += new
        for each in new:
            self._note(step, each.stream, each.file, each.place, each.reason)
        self._write()

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
