"""The files, or rests of files, that a run passes over: counted, told once each, and written down."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swamla_titan.data import Corpus, Skip, skips_of

logger = logging.getLogger(__name__)

NAME = "skipped_files.json"


class SkippedFiles:
    """All that is passed over since the run began, on every rank the same.

    The first rank writes `folder`/skipped_files.json: a list of objects `file`, `stream`, `step` (None: before this
    start), `place`, `reason`; a file that streams share is there once for each that came upon it. The cursors in the
    checkpoints say the same, and it is by them that a resumed run goes; so the file may be lost, or not writable.
    """

    def __init__(
        self, folder: Path, corpus: Corpus, cursors: dict[int, dict[str, Any]], writes: Callable[[], bool]
    ) -> None:
        """`cursors` of all streams, from the checkpoint; files that could not be opened are told of by `corpus`.

        `writes()`: whether this rank is to report and to write.
        """
        self._path, self._writes = folder / NAME, writes
        self._files: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        for fault in corpus.source.passed_over:
            self._note(None, None, fault.file, fault.place, fault.reason)
        opened = {fault.file for fault in corpus.source.passed_over}
        for fault in corpus.faults:
            if writes() and fault.file not in opened:
                logger.warning("data: %s; held-out text is taken from the rest", fault)
        for stream, cursor in sorted(cursors.items()):
            for skip in skips_of(stream, cursor):
                self._note(None, skip.stream, skip.file, skip.place, skip.reason)
        if self._entries:
            self._write()

    @property
    def count(self) -> int:
        """Files of which something is passed over."""
        return len(self._files)

    def add(self, step: int, skips: Iterable[Skip]) -> None:
        """What was found unreadable in the batch of step `step` (from 1); ranks may bring the same ones."""
        for skip in sorted({skip.key: skip for skip in skips}.values(), key=lambda skip: skip.key):
            self._note(step, skip.stream, skip.file, skip.place, skip.reason)
        self._write()

    def _note(self, step: int | None, stream: int | None, file: str, place: str, reason: str) -> None:
        self._entries.append({"file": file, "stream": stream, "step": step, "place": place, "reason": reason})
        if self._writes() and file not in self._files:
            where = f"{file}, {place}" if place else file
            logger.warning("data: %s: %s; the rest of the file is passed over in this run", where, reason)
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
