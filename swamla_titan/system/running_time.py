"""Time in which this process was running and not paused. Standard library only."""

import time


class RunningTime:
    """Counts the seconds in which this process ran, from frequent readings of the clock.

    The time between two readings counts for `longest` seconds at most, because in a longer one the process was paused:
    stopped (Ctrl-Z, `scontrol suspend`), frozen with its container, or moved with its machine. No clock of the system
    leaves all of that out.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._last = time.monotonic()
        self.seconds = 0.0

    def update(self) -> float:
        """The seconds up to now; to be called every `longest` seconds, or more often."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds
