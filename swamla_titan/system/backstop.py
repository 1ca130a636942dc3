"""Ends a process whose Python cannot run, because C code holds the GIL: a small process monitors it.

faulthandler's timer would do the same by the clock, and so end a process that was paused for longer than the timeout in
the moment it continues. The monitor here counts the seconds in which it runs itself, and leaves out those in which the
monitored process is stopped.

This file is also the monitor's program, which starts in some 20 ms: standard library only, no import of ours.
"""

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

# At this signal, which nothing else uses, C code dumps all stacks.
STACKS = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
POLL_INTERVAL = 0.25  # seconds
LONGEST = 0.5  # the time between two polls counts for so much at most, the rest was a pause
GRACE_PERIOD = 5.0  # seconds in which the process may end by itself, with exit code 1, before it is killed


class Backstop:
    """Ends this process if it does not call `arm` again in time. To be created by the main thread."""

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
        """Set the file for the stacks; with its path, a line before them gives the reason."""
        faulthandler.register(STACKS, file=stacks, all_threads=True, chain=True)
        self._path = str(path.absolute()) if path else ""

    def arm(self, seconds: float) -> None:
        """Set the timeout: seconds of running time from now."""
        line = f"{max(seconds, 0):.3f} {self._path}".encode(errors="surrogateescape").replace(b"\n", b"?") + b"\n"
        with self._lock, contextlib.suppress(OSError):  # the monitor was killed
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
    except (OSError, IndexError):  # it has ended, or this is no Linux
        return False


def watch(pid: int, stacks: int) -> None:
    """The monitor: reads lines `SECONDS PATH` from standard input, and ends with the process that writes them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # schedulers and terminals send them to all; it ends with the other one
    left, path, unread = float("inf"), "", b""
    limit = left
    last = time.monotonic()
    while left > 0:
        if select.select([0], [], [], POLL_INTERVAL)[0]:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, unread = (unread + read).split(b"\n")
            if lines:
                seconds, _, name = lines[-1].partition(b" ")
                left = limit = float(seconds)
                path = name.decode(errors="surrogateescape")
                last = time.monotonic()
                continue
        now = time.monotonic()
        if not stopped(pid):
            left -= min(now - last, LONGEST)
        last = now
    if os.getppid() != pid:
        return
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(f"Timeout ({limit:g} s): Python could not run\n")
    os.kill(pid, stacks)
    end = time.monotonic() + GRACE_PERIOD
    while time.monotonic() < end and os.getppid() == pid:
        time.sleep(0.05)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]))
