"""Stopping on purpose: the first signal asks for a checkpoint and a clean end, the second ends at once."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that SIGTERM (schedulers), SIGUSR1 (SLURM's warning) or SIGINT (Ctrl-C) came."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def forget(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
