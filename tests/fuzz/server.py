"""A process that has imported everything, and forks a child for each command of `swamla-titan` it is asked to run.

`python -m tests.fuzz.server` reads one request a line from standard input and answers with one line, both JSON.
Importing torch takes seconds and forking milliseconds, so a fuzz test tries hundreds of inputs where it would try five.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

_DEAF_TO_SIGTERM = 2.0  # seconds between the two signals for a child that is over its limit


def main() -> None:
    """Serve until standard input ends."""
    import torch.distributed.checkpoint  # noqa: F401

    import swamla_titan.tools.check
    import swamla_titan.tools.generate
    import swamla_titan.tools.plan_report
    import swamla_titan.train  # noqa: F401

    gc.collect()
    gc.freeze()  # or the garbage collector of each child copies every page
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(request)
        print(json.dumps(_wait(pid, request["seconds"])), flush=True)


def _child(request: dict[str, Any]) -> None:
    """Become the command; never returns."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        out, err = (os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err"))
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # look at TMPDIR again
        _limit(request)
        from swamla_titan.cli import main as command

        try:
            ended: Any = command(request["arguments"])
        except SystemExit as error:
            ended = error.code
        code = 0 if ended is None else ended if isinstance(ended, int) else 1
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _limit(request: dict[str, Any]) -> None:
    """Bounds that the command meets as MemoryError, ENOSPC's cousin EFBIG, and a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, most in (
        (resource.RLIMIT_AS, mapped + request["memory"]),
        (resource.RLIMIT_FSIZE, request["file_size"]),
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _wait(pid: int, seconds: float) -> dict[str, Any]:
    """The child's end, brought about if it takes too long; and that of what it started."""
    start, late, status = time.monotonic(), False, None
    while status is None:
        ended, raw = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() - start > seconds + (_DEAF_TO_SIGTERM if late else 0):
            os.killpg(pid, signal.SIGKILL if late else signal.SIGTERM)
            late = True
        else:
            time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return {"status": status, "late": late, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    main()
