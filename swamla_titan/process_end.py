"""Waiting for the end of a process that is not a child. Standard library only: launchers' workers begin with it."""

import os
import select
import time


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
