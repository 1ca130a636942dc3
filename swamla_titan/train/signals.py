"""Stopping on purpose: the first signal asks for a checkpoint and a clean end, the second ends at once."""

import signal
from types import FrameType

from swamla_titan.errors import EXIT_STOPPED
from swamla_titan.parallel.launcher import acknowledge_stop

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that SIGTERM (schedulers), SIGUSR1 (SLURM's warning) or SIGINT (Ctrl-C) came.

    Until `finish_step_first` is set there is nothing to save yet, and a signal ends the process with SystemExit(75).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.finish_step_first = False
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        acknowledge_stop()  # before the second signal becomes deadly
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.finish_step_first:
            raise SystemExit(EXIT_STOPPED)

    def forget(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
