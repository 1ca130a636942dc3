"""The end of this process, and waiting for that of one that is not a child. Standard library only: workers begin with
it."""

import atexit
import os
import select
import sys
import time
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process as Python does, but without taking down what libraries left behind.

    Threads of torch's process groups may still run then, and now and then abort a process that is done ("terminate
    called without an active exception"), which torchrun takes for a crash and starts again.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


def wait_for_end(pid: int) -> None:
    """Returns when the process has ended."""
    try:
        if hasattr(os, "pidfd_open"):  # Linux; it cannot be taken in by a new process with the same PID
            poll = select.poll()
            poll.register(os.pidfd_open(pid), select.POLLIN)
            poll.poll()
            return
    except ProcessLookupError:
        return
    except OSError:
        pass  # the kernel, or a container's rules, know no pidfd
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            return  # not ours: another process has the PID now
        time.sleep(1)
