"""Time in which this process could run. Standard library only."""

import time


class RunningTime:
    """Counts the seconds in which this process ran, as far as it can tell by looking at the clock often.

    What lies between two looks counts for `longest` seconds at most. More than that it was paused: stopped (Ctrl-Z,
    `scontrol suspend`), frozen with its container, or moved with its machine. No clock of the system leaves all of that
    out.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._last = time.monotonic()
        self.seconds = 0.0

    def look(self) -> float:
        """The seconds up to now; called about every `longest` seconds, or more often."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds
