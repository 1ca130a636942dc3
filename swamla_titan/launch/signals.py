"""Stopping on purpose: the first signal requests a checkpoint and a clean exit, the second ends the process at once."""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from swamla_titan.errors import EXIT_RE_RENDEZVOUS, EXIT_STOPPED
from swamla_titan.launch.ranks import FOLDER, rank_info
from swamla_titan.launch.worker import (
    NOTHING_TO_SAVE,
    acknowledge_stop,
    early_handler,
    early_signal,
    in_re_rendezvous,
    stop_requested,
)

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PEERS_TIMEOUT = 20.0  # seconds that a rank with a stop request waits for other machines, to stop together with them
_NO_STOP, _RE_RENDEZVOUS = 0, 1  # less than the numbers of the signals above: the user's stop has precedence


@dataclass(frozen=True)
class Stop:
    """Why all ranks stop now, what happens next, and the exit code."""

    reason: str
    outlook: str
    code: int


class StopRequest:
    """Remembers that SIGTERM (schedulers), SIGUSR1 (SLURM's warning) or SIGINT (Ctrl-C) arrived.

    Until `finish_step_first` is set there is nothing to save. A signal that all ranks get then ends the process with
    SystemExit(75); one that other ranks may not get is remembered, because they would wait for this rank.

    The agent's SIGTERM for a re-rendezvous is remembered too, but does not count as the user's first signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.re_rendezvous = False
        self.finish_step_first = False
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        self._since = 0.0
        requested = stop_requested() or early_signal()
        if requested:
            self._remember(requested, None)

    def agreed(self, all_reduce_max: Callable[[float], float]) -> Stop | None:
        """What stops the run, the same on every rank, although a signal may have reached only some of them.

        Collective; `all_reduce_max` is World's.
        """
        own = self.received or (_RE_RENDEZVOUS if self.re_rendezvous else _NO_STOP)
        number = int(all_reduce_max(own))
        if number == _NO_STOP:
            return None
        if number == _RE_RENDEZVOUS:
            return Stop("stopped, since the machines of the run change,", "it continues with them", EXIT_RE_RENDEZVOUS)
        return Stop(f"stopped by {signal.Signals(number).name}", "the same command continues it", EXIT_STOPPED)

    def exit_without_peers(self) -> None:
        """Raise SystemExit if this rank has a stop request and the ranks that it waits for do not connect in time.

        Under scripts/torchrun.sh the other machines usually connect soon, and would wait for this rank forever, so it
        waits for `PEERS_TIMEOUT`.
        """
        if not self.received and not self.re_rendezvous:
            return
        self._since = self._since or time.monotonic()
        if FOLDER not in os.environ or time.monotonic() - self._since > PEERS_TIMEOUT:
            raise SystemExit(EXIT_STOPPED if self.received else EXIT_RE_RENDEZVOUS)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        requested = stop_requested()
        if number == signal.SIGTERM and in_re_rendezvous() and not requested:
            self.re_rendezvous = True
            if not self.finish_step_first and rank_info().machines == 1:
                raise SystemExit(EXIT_RE_RENDEZVOUS)
            return
        self.received = requested or signal.Signals(number)
        acknowledge_stop()  # before the second signal becomes deadly
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.finish_step_first and (rank_info().size == 1 or (requested and rank_info().machines == 1)):
            logger.info("stopped by %s before training began: %s", self.received.name, NOTHING_TO_SAVE)
            raise SystemExit(EXIT_STOPPED)

    def forget(self) -> None:
        """Restore the former handlers; early ones are replaced by the default, which ends the process."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is early_handler else handler)
