"""Ends this process, and waits for the end of one that is not a child. Standard library only: workers begin with it."""

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
