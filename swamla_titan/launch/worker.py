"""A worker's side of the launcher: its exit code, and signals before torch is imported.

launch/__init__.py draws a worker's states and lists the files of the launch folder. In addition:

- Exit codes 2 and 75 are written to the folder and become 0, because torchrun would start the workers again.
- The folder has each worker's process id, so that signals go to the workers and not to torchrun, which would give them
  only 30 seconds.
- During a re-rendezvous torchrun stops healthy workers with SIGTERM, which is not the user's stop and must not end the
  run: EXIT_RE_RENDEZVOUS is never written for run_train.sh. The agents of the other machines begin theirs within a
  second, so workers that other ranks notified wait for their own agent to stop them: if they ended first, it would look
  like a crash.
- A worker whose launcher has ended kills its torchrun and ends, because nothing would forward signals to it any more,
  and whoever gives the command again needs the GPUs and the dump folder.

Standard library only: it runs before torch is imported.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RE_RENDEZVOUS, EXIT_STOPPED
from swamla_titan.launch.ranks import FOLDER, TAKE_AWAY, rank_info
from swamla_titan.system.process import wait_for_end

RE_RENDEZVOUS = "re-rendezvous"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NOTHING_TO_SAVE = "there is nothing to save; the same command starts it"
AGENT_STOP_TIMEOUT = 30.0  # seconds; the agents of all machines check every second whether one waits to join

_ended_for_bad_input = False  # see report_bad_input
_early_signal: signal.Signals | None = None


def exit_through_launcher(main: Callable[[], int]) -> int:
    """Run `main` and return the code to exit with: its own, unless scripts/torchrun.sh started this process.

    Then 2 and 75, returned or raised as SystemExit, become 0 and are written to the launch folder. All workers must end
    with the same code: if one ended so alone, the others would wait for it.
    """
    if FOLDER not in os.environ:
        return main()
    if not _folder().is_dir() or not re.fullmatch(r"[0-9]{1,7}", os.environ.get("LOCAL_RANK", "")):
        folder = os.environ[FOLDER][:200]
        print(
            f"error: {FOLDER}={folder!a} is not the folder of a run_train.sh that started this. {TAKE_AWAY}",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    # torchrun ignores the signals, so that only the workers act on them, and workers inherit that.
    install_early_handlers(trains=True)
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), name="launcher-watch", daemon=True).start()
    for leftover in ("stopping", "code"):  # of the worker before a restart
        _file(leftover).unlink(missing_ok=True)
    # Write the id first, then read `stop`. The launcher does it in the opposite order, so one of the two notices.
    _write(_file("pid"), str(os.getpid()))
    if _early_signal:
        acknowledge_stop()
    if stop_requested() and rank_info().machines == 1:
        code: object = EXIT_STOPPED
    else:
        try:
            code = _recorded(main)
        except SystemExit as ended:
            code = EXIT_DONE if ended.code is None else ended.code
            if code not in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_RE_RENDEZVOUS):
                raise
    assert isinstance(code, int)
    if _ended_for_bad_input:
        return EXIT_FAILED
    if code == EXIT_RE_RENDEZVOUS:
        if not in_re_rendezvous():
            time.sleep(AGENT_STOP_TIMEOUT)  # until the agent's SIGTERM, which nothing handles any more
        return code
    _write(_file("code"), str(code))
    return EXIT_DONE if code in (EXIT_BAD_INPUT, EXIT_STOPPED) else code


def report_bad_input() -> None:
    """Report to the launcher that this worker alone ends with 2, for a fault of its machine that no restart fixes.

    The other ranks do not know of it, so the worker must end as if it had crashed, so that torchrun ends them. Does
    nothing without a launcher.
    """
    global _ended_for_bad_input
    if FOLDER in os.environ:
        _ended_for_bad_input = True
        with suppress(OSError):
            _write(_file("code"), str(EXIT_BAD_INPUT))


def any_bad_input() -> bool:
    """For the agent: whether a worker of this machine has ended with 2, so that a restart would not help."""
    if FOLDER not in os.environ:
        return False
    codes = [path.read_text() for path in _folder().glob("*.code")]
    return str(EXIT_BAD_INPUT) in codes


def install_early_handlers(trains: bool) -> None:
    """Handle signals during the seconds of imports, so that none is lost and none ends in a traceback.

    A process that trains exits with 75, or remembers the signal if other processes would wait for it; launch/signals.py
    replaces these handlers. Ctrl-C ends other commands at once, without Python's KeyboardInterrupt.
    """
    if trains:
        for number in FORWARDED:
            signal.signal(number, early_handler)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # run_train.sh has blocked them


def early_signal() -> signal.Signals | None:
    """The signal that arrived before launch/signals.py had its handlers."""
    return _early_signal


def early_handler(number: int, frame: FrameType | None) -> None:
    """The handler of signals before launch/signals.py has its own."""
    global _early_signal
    if FOLDER not in os.environ or not _folder().is_dir():
        with suppress(OSError, ValueError, AttributeError):  # stderr is closed
            sys.stderr.write(f"stopped by {signal.Signals(number).name} before training began: {NOTHING_TO_SAVE}\n")
            sys.stderr.flush()
        os._exit(EXIT_STOPPED)  # an exception may end in one of the callbacks of an import, and be lost
    requested = stop_requested()
    _early_signal = requested or signal.Signals(number)
    acknowledge_stop()
    for each in FORWARDED:
        signal.signal(each, signal.SIG_DFL)
    if requested and rank_info().machines == 1:
        _write(_file("code"), str(EXIT_STOPPED))
        os._exit(EXIT_DONE)


def local_worker_pids() -> list[int]:
    """The process ids of the other workers of this machine; empty without scripts/torchrun.sh."""
    found = []
    if FOLDER in os.environ:
        for path in _folder().glob("*.pid"):
            with suppress(OSError, ValueError):
                found.append(int(path.read_text()))
    return [pid for pid in found if pid != os.getpid()]


def stop_requested() -> signal.Signals | None:
    """The signal by which the user stops the run through the launcher of this machine, or None."""
    if FOLDER not in os.environ or not (_folder() / "stop").exists():
        return None
    return signal.Signals["SIG" + ((_folder() / "stop").read_text().strip() or "TERM")]  # empty: being written


def in_re_rendezvous() -> bool:
    """Whether the agent of this machine is stopping the workers to start them again as another group."""
    return FOLDER in os.environ and (_folder() / RE_RENDEZVOUS).exists()


@contextmanager
def re_rendezvous() -> Iterator[None]:
    """For the agent: marks that it is stopping healthy workers. Does nothing without a launcher."""
    if FOLDER not in os.environ:
        yield
        return
    (_folder() / RE_RENDEZVOUS).touch()
    try:
        yield
    finally:
        (_folder() / RE_RENDEZVOUS).unlink(missing_ok=True)


def acknowledge_stop() -> None:
    """Report to the launcher that a signal arrived here, so that it does not forward it. Does nothing without one.

    Schedulers and terminals send a signal to every process of a job; a worker that got it must not mistake the
    forwarded one for the second signal, which ends a run at once.
    """
    with suppress(OSError):  # on a full disk the run must still save
        if FOLDER in os.environ and _file("pid").exists():
            _write(_file("stopping"), "")


def _end_with_launcher(torchrun: int) -> None:
    """Wait for the end of the launcher, which ends before its workers only if it is killed; kill torchrun and exit.

    `torchrun` is the process id of the parent. It is killed first, because it would start the workers again; if it is
    gone already, another process may have its id.
    """
    try:
        launcher = int((Path(os.environ[FOLDER]) / "launcher").read_text())
    except (OSError, ValueError):
        return  # the folder is being removed: the launcher is ending, and ends the rest
    wait_for_end(launcher)
    if os.getppid() == torchrun:
        with suppress(ProcessLookupError):
            os.kill(torchrun, signal.SIGKILL)
    os._exit(EXIT_FAILED)


def _recorded(main: Callable[[], int]) -> int:
    """`main()`; if it raises, torchrun prints its traceback as the root cause of the group's failure."""
    from torch.distributed.elastic.multiprocessing.errors import record  # late: torch takes seconds to import

    code = record(main)()
    return EXIT_DONE if code is None else code  # `record` makes None of SystemExit(0)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _file(name: str) -> Path:
    return _folder() / f"{os.environ['LOCAL_RANK']}.{name}"


def _write(path: Path, text: str) -> None:
    """Write atomically, because the launcher may be reading."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
