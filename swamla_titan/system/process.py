"""This process, how long it ran and how it ends, and the end of another one.

Standard library only: workers begin with it.
"""

import atexit
import os
import select
import sys
import time
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Exit as Python does, but without destroying what libraries have left running.

    Threads of torch's process groups may still run then, and occasionally abort a process that is done ("terminate
    called without an active exception"), which torchrun takes for a crash and restarts.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or there was none
            stream.flush()
    os._exit(code)


def wait_for_end(pid: int) -> None:
    """Returns when the process has ended."""
    try:
        if hasattr(os, "pidfd_open"):  # Linux; a new process with the same PID cannot be mistaken for it
            poll = select.poll()
            poll.register(os.pidfd_open(pid), select.POLLIN)
            poll.poll()
            return
    except ProcessLookupError:
        return
    except OSError:
        pass  # the kernel, or a container's seccomp rules, lack pidfd
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            return  # not ours: another process has the PID now
        time.sleep(1)


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
