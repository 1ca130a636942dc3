"""Processes: their running time, their end, and a backstop that ends one whose Python cannot run.

This file is also the program of the backstop's monitor, which must start in some 20 ms. So it imports the standard
library only, and nothing of this package. Workers begin with it too.
"""

import atexit
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

# At this signal, which nothing else uses, C code dumps all stacks.
STACKS = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
_POLL_INTERVAL = 0.25  # seconds
_LONGEST = 0.5  # seconds that the time between two polls can count for; more was a pause
_GRACE_PERIOD = 5.0  # seconds in which the process may end by itself, with exit code 1, before it is killed


def end_process(code: int) -> NoReturn:
    """Exit as Python does, but without destructors, because threads of libraries may still run.

    Threads of torch's process groups occasionally abort a process at its end ("terminate called without an active
    exception"), which torchrun takes for a crash and restarts.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed or None
            stream.flush()
    os._exit(code)


def wait_for_end(pid: int) -> None:
    """Wait until the process has ended."""
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
            return  # another user's process has the PID now
        time.sleep(1)


class RunningTime:
    """Counts the seconds in which this process ran, by frequent readings of the clock.

    The time between two readings counts for at most `longest` seconds. If it was longer, the process was paused:
    stopped (Ctrl-Z, `scontrol suspend`), frozen with its container, or migrated with its machine. No system clock
    leaves all of that out.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._last = time.monotonic()
        self.seconds = 0.0

    def update(self) -> float:
        """The seconds until now; must be called every `longest` seconds, or more often."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds


class Backstop:
    """Ends this process if it does not call `arm` again in time, also where C code holds the GIL.

    A small process monitors it. faulthandler's timer goes by the clock, and so would end a process that was paused for
    longer than the timeout as soon as it continues. The monitor counts the seconds in which it runs itself, except
    those in which the monitored process is stopped. The main thread must create a Backstop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = signal.signal(STACKS, _end)  # in case the C code returns after all, or lets signals interrupt it
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(STACKS))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin
        self._timeouts = self._process.stdin  # what the monitor reads
        os.set_blocking(self._timeouts.fileno(), False)
        self._path = ""

    def write_to(self, stacks: TextIO, path: Path | None = None) -> None:
        """Set the file for the stacks; if `path` names it, a line before the stacks gives the reason."""
        faulthandler.register(STACKS, file=stacks, all_threads=True, chain=True)
        self._path = str(path.absolute()) if path else ""

    def arm(self, seconds: float) -> None:
        """Set the timeout: seconds of running time from now."""
        line = f"{max(seconds, 0):.3f} {self._path}".encode(errors="surrogateescape").replace(b"\n", b"?") + b"\n"
        with self._lock, suppress(OSError):  # the monitor was killed
            os.write(self._timeouts.fileno(), line)

    def close(self) -> None:
        """End the monitor."""
        with self._lock:
            self._timeouts.close()
        self._process.wait()
        faulthandler.unregister(STACKS)
        signal.signal(STACKS, self._before)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(1)


def stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):  # it has ended, or this is not Linux
        return False


def _monitor(pid: int, stacks: int) -> None:
    """The monitor: reads lines `SECONDS PATH` from standard input, and ends when the process that writes them ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # schedulers and terminals send them to all processes
    running = RunningTime(_LONGEST)
    timeout, end, path, unread = 0.0, float("inf"), "", b""
    while running.seconds < end:
        if select.select([0], [], [], _POLL_INTERVAL)[0]:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, unread = (unread + read).split(b"\n")
            if lines:
                seconds, _, name = lines[-1].partition(b" ")
                timeout, path = float(seconds), name.decode(errors="surrogateescape")
                end = running.update() + timeout
                continue
        before = running.seconds
        ran = running.update() - before
        if stopped(pid):
            end += ran
    if os.getppid() != pid:
        return
    if path:
        with suppress(OSError), open(path, "a") as file:
            file.write(f"Timeout ({timeout:g} s): Python could not run\n")
    os.kill(pid, stacks)
    killed_at = time.monotonic() + _GRACE_PERIOD
    while time.monotonic() < killed_at and os.getppid() == pid:
        time.sleep(0.05)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _monitor(int(sys.argv[1]), int(sys.argv[2]))
