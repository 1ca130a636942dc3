"""Stopping on purpose: the first signal asks for a checkpoint and a clean end, the second ends at once."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from swamla_titan.errors import EXIT_REGROUP, EXIT_STOPPED
from swamla_titan.parallel.launcher import acknowledge_stop, is_regrouping, launched_size, machines, stop_asked

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOBODY, _TORCHRUN = 0, 1  # beside the numbers of the signals above, which are larger: the user's wish comes first


@dataclass(frozen=True)
class Stop:
    """Why all ranks stop now, what comes then, and the exit code."""

    reason: str
    outlook: str
    code: int


class StopRequest:
    """Remembers that SIGTERM (schedulers), SIGUSR1 (SLURM's warning) or SIGINT (Ctrl-C) came.

    Until `finish_step_first` is set there is nothing to save yet. A signal that every rank has then ends the process
    with SystemExit(75); one that others may not have is remembered, because they would wait for this rank.

    SIGTERM from torchrun, which starts the workers again when machines join, is remembered too, but changes nothing
    about the signals of the user: the next is still the first.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.regroup = False
        self.finish_step_first = False
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        asked = stop_asked()
        if asked:
            self._remember(asked, None)

    def agreed(self, largest: Callable[[float], float]) -> Stop | None:
        """What stops the run, on every rank the same: the signal may have reached one of them only, or some later.

        All ranks come here; `largest` is World.largest.
        """
        own = self.received or (_TORCHRUN if self.regroup else _NOBODY)
        number = int(largest(own))
        if number == _NOBODY:
            return None
        if number == _TORCHRUN:
            return Stop("stopped, since the machines of the run change,", "it goes on with them", EXIT_REGROUP)
        return Stop(f"stopped by {signal.Signals(number).name}", "the same command goes on", EXIT_STOPPED)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        asked = stop_asked()
        if number == signal.SIGTERM and is_regrouping() and not asked:
            self.regroup = True
            if not self.finish_step_first and machines() == 1:
                raise SystemExit(EXIT_REGROUP)
            return
        self.received = asked or signal.Signals(number)
        acknowledge_stop()  # before the second signal becomes deadly
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.finish_step_first and (launched_size() == 1 or (asked and machines() == 1)):
            raise SystemExit(EXIT_STOPPED)

    def forget(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
