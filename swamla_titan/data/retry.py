"""Reading with retries: how often, how long, and from which document on."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from swamla_titan.config.rules import RETRY_SECONDS
from swamla_titan.data.document import Document, Position, Source
from swamla_titan.data.faults import DataFault, Fault, Unreachable
from swamla_titan.errors import RunFailed

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds; each is twice the one before, with jitter
POLL = 1.0  # seconds between two checks for whether the reader was closed
LATE = 10.0  # seconds; a process that slept for that much longer than POLL was paused
QUICK_TRIES = 2  # for invalid bytes, which are read again without waiting for long
SILENT_FILES = 3  # consecutive files that may not answer; if more do not, the files are not at fault

Result = TypeVar("Result")


class Retry:
    """Decides when a process tries again to read data, with backoff, and when it stops.

    All waits in one step (from `begin_step` to `begin_step`) take at most `seconds` together, however many files do not
    answer, because other ranks and their watchdogs wait for the step. Random jitter spreads the tries of many processes
    over time; it has no influence on the data.
    """

    def __init__(self, seconds: float = RETRY_SECONDS, is_closed: Callable[[], bool] | None = None) -> None:
        """`is_closed()`: whether the reader was closed, so that retries are pointless."""
        self.seconds, self._is_closed = seconds, is_closed
        self._chance = random.Random()
        self._spent = 0.0  # seconds, on past outages in this step
        self._since: float | None = None  # when the present outage began
        self._tries = 0
        self._last: Fault | None = None
        self._silent_files = 0  # consecutive ones that did not answer
        self._notes: list[str] = []

    def begin_step(self) -> None:
        """Begin to read the data of the next step."""
        self._spent, self._since = 0.0, None

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work()`, with retries; raises its last Fault, which then says how often it was tried."""
        while True:
            try:
                result = work()
            except Fault as fault:
                if not self.wait(fault):
                    self.failed(fault)
                    raise
            else:
                self.success()
                return result

    def wait(self, fault: Fault) -> bool:
        """Wait until it is time to retry; returns False at once if there should be no other try.

        Raises RunFailed at once if the reader was closed.
        """
        self._require_open()
        now = time.monotonic()
        if self._since is None:
            self._since = now
        left = self.seconds - self._spent - (now - self._since)
        quick = self._tries < QUICK_TRIES and self.seconds > 0
        if not fault.may_pass or not (quick or (isinstance(fault, Unreachable) and left > 0)):
            return False
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._tries, 10)) * self._chance.uniform(0.5, 1)
        if left > 0:
            delay = min(delay, left)
        self._tries += 1
        self._last = fault
        logger.warning("%s; trying again in %.1f s", fault, delay)
        while delay > 0:
            began = time.monotonic()
            time.sleep(min(delay, POLL))
            self._since += max(time.monotonic() - began - LATE, 0)  # a pause of this process does not count
            delay -= POLL
            self._require_open()
        return True

    def _require_open(self) -> None:
        if self._is_closed is not None and self._is_closed():
            raise RunFailed("the reader's loader was closed")

    def success(self) -> None:
        """Record that something was read."""
        self._silent_files = 0
        if self._since is not None:
            if self._last is not None:
                self._notes.append(f"{self._last}; read on after {self._words()}")
            self._end_outage()

    def failed(self, fault: Fault) -> None:
        """Record that a file is not tried any more; `fault` then says how often it was."""
        if self._tries:
            fault.tried = f"given up after {self._words(timed=isinstance(fault, Unreachable))}"
        self._silent_files += isinstance(fault, Unreachable)
        self._end_outage()

    @property
    def nothing_answers(self) -> bool:
        """Whether so many consecutive files did not answer that the files cannot be at fault."""
        return self._silent_files > SILENT_FILES

    def notes(self) -> list[str]:
        """A line for each read since the last call that failed first and then succeeded."""
        notes, self._notes = self._notes, []
        return notes

    def _end_outage(self) -> None:
        if self._since is not None:
            self._spent += time.monotonic() - self._since
        self._since, self._tries, self._last = None, 0, None

    def _words(self, timed: bool = True) -> str:
        assert self._since is not None
        tries = "1 more try" if self._tries == 1 else f"{self._tries} more tries"
        return f"{tries} in {time.monotonic() - self._since:.1f} s" if timed else tries


def read_on(
    source: Source, unit: int, position: Position | None, every: int, offset: int, retry: Retry
) -> Iterator[Document]:
    """Call `source.read(...)` with retries, each from behind the last document, so that each is read exactly once.

    Raises the last Fault, which then says how often it was tried.
    """
    while True:
        try:
            # Each attempt begins behind the last document that was yielded, not at the unit's start.
            for document in source.read(unit, position, every, offset):
                retry.success()
                yield document
                position = document.position
            retry.success()
            return
        except Fault as fault:
            if not fault.place and position is not None:
                fault.place = f"byte {position['byte']}" if "byte" in position else f"document {position['ordinal']}"
            if not retry.wait(fault):
                retry.failed(fault)
                raise


def documents_by_unit(
    source: Source, retry: Retry, faults: list[Fault] | None = None
) -> Iterator[tuple[int, Document]]:
    """Every document of a source with the number of its unit, in the source's order.

    With `faults`, a damaged file is skipped from the damage on and its fault is added to the list; without, the fault
    is raised. The fault of a file that does not answer is raised in both cases.
    """
    damaged = ""
    for unit in range(source.num_units):
        if source.unit_files[unit] == damaged:  # training excludes what follows the damage, readable or not
            continue
        try:
            for document in read_on(source, unit, None, 1, 0, retry):
                yield unit, document
        except DataFault as fault:
            if faults is None:
                raise
            faults.append(fault)
            damaged = source.unit_files[unit]


def all_documents(source: Source, retry: Retry | None = None, faults: list[Fault] | None = None) -> Iterator[Document]:
    """Every document of a source, as `documents_by_unit` gives them."""
    for _, document in documents_by_unit(source, retry or Retry(), faults):
        yield document
