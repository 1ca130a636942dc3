"""Trying again: how often, how long, and from exactly which place."""

import logging
import random
import time
from collections.abc import Callable, Iterator

from swamla_titan.config.rules import RETRY_SECONDS
from swamla_titan.data.document import Document, Position, Source
from swamla_titan.data.faults import Fault, Unreachable
from swamla_titan.errors import RunFailed

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds; each is twice the one before, and some of it by chance
LOOK = 1.0  # seconds between two looks at whether it is over
LATE = 10.0  # seconds; who sleeps for that much longer than LOOK was paused
QUICK_TRIES = 2  # for bytes that make no sense: a second look at them is enough
FILES_IN_A_ROW = 3  # that do not answer and may be given up; where more do not, it is not the files


class Patience:
    """How long one process waits for data that cannot be read just now.

    All waiting for one portion of data (from `begin` to `begin`) is at most `seconds` together, whatever the number of
    files that do not answer: other ranks wait for it, and their watchdogs look at the clock. Chance spreads the tries
    of many processes over time; it decides nothing about the data.
    """

    def __init__(self, seconds: float = RETRY_SECONDS, is_over: Callable[[], bool] | None = None) -> None:
        """`is_over()`: nobody waits for the data any more."""
        self.seconds, self._is_over = seconds, is_over
        self._chance = random.Random()
        self._spent = 0.0  # on outages of this portion that are over
        self._since: float | None = None  # the one that lasts began
        self._tries = 0
        self._last: Fault | None = None
        self._given_up = 0  # files in a row that did not answer
        self._notes: list[str] = []

    def begin(self) -> None:
        """The next portion is read."""
        self._spent, self._since = 0.0, None

    def again(self, fault: Fault) -> bool:
        """Waits; returns whether it is time to try once more, or False at once if there is no sense in it.

        Raises RunFailed, at once, where nobody waits for the data any more.
        """
        self._look_around()
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
            time.sleep(min(delay, LOOK))
            self._since += max(time.monotonic() - began - LATE, 0)  # this process was paused, and no outage lasted
            delay -= LOOK
            self._look_around()
        return True

    def _look_around(self) -> None:
        if self._is_over is not None and self._is_over():
            raise RunFailed("the reader's loader was closed")

    def success(self) -> None:
        """A document was read."""
        self._given_up = 0
        if self._since is not None:
            if self._last is not None:
                self._notes.append(f"{self._last}; read on after {self._words()}")
            self._over()

    def give_up(self, fault: Fault) -> None:
        """This file is left alone: what is known of it is forgotten, and how often it was tried is told in it."""
        if self._tries:
            fault.tried = f"given up after {self._words(timed=isinstance(fault, Unreachable))}"
        self._given_up += isinstance(fault, Unreachable)
        self._over()

    @property
    def is_lost(self) -> bool:
        """Whether so many files in a row did not answer that it cannot be the files' fault."""
        return self._given_up > FILES_IN_A_ROW

    def notes(self) -> list[str]:
        """What was read in the end although it first failed, since the last call; a line each."""
        notes, self._notes = self._notes, []
        return notes

    def _over(self) -> None:
        if self._since is not None:
            self._spent += time.monotonic() - self._since
        self._since, self._tries, self._last = None, 0, None

    def _words(self, timed: bool = True) -> str:
        assert self._since is not None
        tries = "1 more try" if self._tries == 1 else f"{self._tries} more tries"
        return f"{tries} in {time.monotonic() - self._since:.1f} s" if timed else tries


def read_on(
    source: Source, unit: int, position: Position | None, every: int, offset: int, patience: Patience
) -> Iterator[Document]:
    """`source.read(...)`, tried again as long as `patience` lasts, each time from behind the last document it gave.

    So none is lost and none comes twice. Raises the Fault that remains, with how often it was tried.
    """
    while True:
        try:
            for document in source.read(unit, position, every, offset):
                patience.success()
                yield document
                position = document.position
            patience.success()
            return
        except Fault as fault:
            if not fault.place and position is not None:
                fault.place = f"byte {position['byte']}" if "byte" in position else f"document {position['ordinal']}"
            if not patience.again(fault):
                patience.give_up(fault)
                raise
