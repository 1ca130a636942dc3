"""Stopping on purpose: the first signal asks for a checkpoint and a clean end, the second ends at once."""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from swamla_titan.errors import EXIT_REGROUP, EXIT_STOPPED
from swamla_titan.launch.worker import (
    FOLDER,
    NOTHING_TO_SAVE,
    acknowledge_stop,
    heard_early,
    is_regrouping,
    launched_size,
    machines,
    stop_asked,
    stop_early,
)

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TO_COME = 20.0  # seconds that a rank which was told to stop waits for other machines, to stop together with them
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
        self._since = 0.0
        asked = stop_asked() or heard_early()
        if asked:
            self._remember(asked, None)

    def agreed(self, largest: Callable[[float], float]) -> Stop | None:
        r"""What stops the run, on every rank the same: the signal may have reached one of them only, or some later.

        All ranks come here; `largest` is World.all_reduce_max.
        """
        own = self.received or (_TORCHRUN if self.regroup else _NOBODY)
        number = int(largest(own))
        if number == _NOBODY:
            return None
        if number == _TORCHRUN:
            return Stop("stopped, since the machines of the run change,", "it goes on with them", EXIT_REGROUP)
        return Stop(f"stopped by {signal.Signals(number).name}", "the same command goes on", EXIT_STOPPED)

    def leave_if_others_do_not_come(self) -> None:
        """Called while this rank waits for the others. Raises SystemExit if it was told to stop, and they do not come.

        Under scripts/torchrun.sh the other machines are on their way, as a rule, and would wait for this rank in vain.
        """
        if not self.received and not self.regroup:
            return
        self._since = self._since or time.monotonic()
        if FOLDER not in os.environ or time.monotonic() - self._since > TO_COME:
            raise SystemExit(EXIT_STOPPED if self.received else EXIT_REGROUP)

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
            logger.info("stopped by %s before training began: %s", self.received.name, NOTHING_TO_SAVE)
            raise SystemExit(EXIT_STOPPED)

    def forget(self) -> None:
        """Put the handlers back that were there before; those of the time before training end the process now."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is stop_early else handler)
