"""A worker's side of its launcher: who speaks, and what torchrun cannot pass on.

That goes through a folder that scripts/torchrun.sh and launch/agent.py know as well.

torchrun starts a group of workers again whenever one of them ends with anything but 0. That is right after a crash and
wrong where the user's input is at fault (2) or the run was stopped on purpose (75): those codes are left in the folder
for run_train.sh to return, and the worker ends with 0. The folder also has each worker's process id, so that signals
reach the workers themselves and not torchrun, which would give them only 30 seconds, and the file `stop` once a signal
came, so that a worker that starts later does not begin.

Where machines come and go, torchrun stops healthy workers with SIGTERM to start them again as another group. That is no
wish to stop, and must not end the run: while it lasts there is the file `regroup`, and a worker ends with EXIT_REGROUP,
which is never left for run_train.sh. The agents of the other machines come to the same a second later, so workers that
know it from the others alone wait to be stopped by their own: if they ended first, it would look like a crash.

Without its launcher a worker ends, and ends its torchrun: nothing would hand it signals any more, and whoever gives the
command again wants the GPUs and the dump folder.

Other launchers, and shells in which one ran, leave variables of the same names: WORLD_SIZE, RANK, LOCAL_RANK. Only
torchrun's count, which come with its count of restarts; `place` is the one function that reads them.

In the folder: `launcher` (the script's process id), `stop` (the signal's name), `regroup`, and for each local rank N
the files `N.pid`, `N.stopping` (a signal of the user arrived) and `N.code`. Standard library only: it runs before torch
is imported.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_REGROUP, EXIT_STOPPED, UserError
from swamla_titan.system.console import one_line
from swamla_titan.system.process_end import wait_for_end

FOLDER = "SWAMLA_TITAN_LAUNCH_FOLDER"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_is_refused = False  # see refused_alone
NOTHING_TO_SAVE = "there is nothing to save; the same command starts it"
AGENT_COMES = 30.0  # seconds; the agents of all machines look every second whether one waits to join


MARK = "TORCHELASTIC_RESTART_COUNT"  # torchrun gives it to all its workers, and no other launcher does
# What torchrun tells a worker about its place, and where the first one waits for the others.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")

_TAKE_AWAY = (
    "Start with ./run_train.sh; if this shell has variables of an earlier run, take them away with: "
    f"unset {' '.join((MARK, *NUMBERS, *MEETING, FOLDER))}"
)


@dataclass(frozen=True)
class Place:
    """Which of the processes that torchrun started this one is, in all and on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machines: int = 1


def place() -> Place:
    """This process's place among those that torchrun started; that of a process alone where it was not torchrun.

    Raises UserError if torchrun's variables are not all there, or make no sense.
    """
    if MARK not in os.environ:
        return Place()
    wrong = [name for name in NUMBERS if not re.fullmatch(r"[0-9]{1,7}", os.environ.get(name, ""))]
    if wrong:
        raise _wrong_place(f"{wrong[0]} is {_shown(wrong[0])}")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in NUMBERS)
    if not (rank < size and local_rank < local_size <= size):
        raise _wrong_place(", ".join(f"{name}={os.environ[name]}" for name in NUMBERS) + " fit no process")
    if size > 1:
        missing = [name for name in MEETING if not os.environ.get(name)]
        if missing or not re.fullmatch(r"[0-9]{1,5}", os.environ["MASTER_PORT"]):
            name = (missing or ["MASTER_PORT"])[0]
            raise _wrong_place(f"{name} is {_shown(name)}")
    groups = os.environ.get("GROUP_WORLD_SIZE", "1")
    return Place(rank, size, local_rank, local_size, int(groups) if re.fullmatch(r"[0-9]{1,7}", groups) else 1)


def foreign_variables() -> list[str]:
    """What of the environment says that this is one process of several, though torchrun did not start it."""
    if MARK in os.environ:
        return []
    return [f"{name}={os.environ[name][:40]!a}" for name in NUMBERS if os.environ.get(name, "") not in ("", "0", "1")]


def _shown(name: str) -> str:
    return f"{os.environ[name][:40]!a}" if name in os.environ else "not set"


def _wrong_place(reason: str) -> UserError:
    return UserError(f"{MARK} is set, as torchrun does for the processes it starts, but {reason}. {_TAKE_AWAY}")


def _without_its_launcher() -> str:
    return f"{FOLDER}={os.environ[FOLDER][:200]!a} is not the folder of a run_train.sh that started this. {_TAKE_AWAY}"


def speaks() -> bool:
    """Whether what this process has to say is for the console: LOG_RANK names it, or no launcher started it.

    LOG_RANK lists processes by their numbers on this machine; default 0. All come to the same errors, so one message is
    enough. run_train.sh shows no other output anyway, but torchrun by itself does. Raises UserError if LOG_RANK
    names no process of this machine.
    """
    if MARK not in os.environ:
        return True
    here = place()
    text = os.environ.get("LOG_RANK") or "0"
    if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", text):
        raise UserError(f"LOG_RANK={one_line(text[:100])}: expected numbers of processes, as in 0,3")
    ranks = [int(number) for number in text.split(",")]
    if max(ranks) >= here.local_size:
        raise UserError(f"LOG_RANK={text[:100]}: the processes of this machine are 0 to {here.local_size - 1}")
    return here.local_rank in ranks


def exit_through_launcher(main: Callable[[], int]) -> int:
    """Run `main` and return the code to end this process with: its own, unless scripts/torchrun.sh started us.

    Then 2 and 75, returned or raised as SystemExit, become 0 and are left for the launcher. Every worker must come to
    the same code: one that ends so alone leaves the others waiting for it.
    """
    if FOLDER not in os.environ:
        return main()
    if not _folder().is_dir() or not re.fullmatch(r"[0-9]{1,7}", os.environ.get("LOCAL_RANK", "")):
        print(f"error: {_without_its_launcher()}", file=sys.stderr)
        return EXIT_BAD_INPUT
    # torchrun was started with these ignored, so that only the workers act on them, and we inherited that.
    listen_to_signals(trains=True)
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), name="launcher-watch", daemon=True).start()
    for leftover in ("stopping", "code"):  # of the worker before a restart
        _file(leftover).unlink(missing_ok=True)
    # First the id, then the look for `stop`; the launcher goes the other way round, so one of the two notices.
    _write(_file("pid"), str(os.getpid()))
    if _heard:
        acknowledge_stop()
    if stop_asked() and machines() == 1:
        code: object = EXIT_STOPPED
    else:
        try:
            code = _recorded(main)
        except SystemExit as ended:
            code = EXIT_DONE if ended.code is None else ended.code
            if code not in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_REGROUP):
                raise
    assert isinstance(code, int)
    if _is_refused:
        return EXIT_FAILED
    if code == EXIT_REGROUP:
        if not is_regrouping():
            time.sleep(AGENT_COMES)  # until its SIGTERM, which nothing handles any more
        return code
    _write(_file("code"), str(code))
    return EXIT_DONE if code in (EXIT_BAD_INPUT, EXIT_STOPPED) else code


def refused_alone() -> None:
    """Tell the launcher that this worker ends for a fault of its machine which no restart mends. Without one: nothing.

    The others do not know of it, so the worker itself has to end as after a crash, for torchrun to end them.
    """
    global _is_refused
    if FOLDER in os.environ:
        _is_refused = True
        with suppress(OSError):
            _write(_file("code"), str(EXIT_BAD_INPUT))


def any_refused() -> bool:
    """For torchrun: whether a worker of this machine has ended with 2, so that it is in vain to start them again."""
    if FOLDER not in os.environ:
        return False
    codes = [path.read_text() for path in _folder().glob("*.code")]
    return str(EXIT_BAD_INPUT) in codes


_heard: signal.Signals | None = None


def listen_to_signals(trains: bool) -> None:
    """From here on no signal is lost, and none gives a traceback, though modules are imported for seconds.

    A process that trains ends with 75, or remembers the signal where others would wait for it; launch/signals.py takes
    over from here. Of other commands Ctrl-C is the end at once, as if they were no Python.
    """
    if trains:
        for number in FORWARDED:
            signal.signal(number, stop_early)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # run_train.sh keeps them back up to here


def heard_early() -> signal.Signals | None:
    """The signal that came before there was a train.signals.StopRequest."""
    return _heard


def stop_early(number: int, frame: FrameType | None) -> None:
    """The handler of signals before there is a train.signals.StopRequest."""
    global _heard
    if FOLDER not in os.environ or not _folder().is_dir():
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it
            sys.stderr.write(f"stopped by {signal.Signals(number).name} before training began: {NOTHING_TO_SAVE}\n")
            sys.stderr.flush()
        os._exit(EXIT_STOPPED)  # an exception may end in one of the callbacks of an import, and be lost
    asked = stop_asked()
    _heard = asked or signal.Signals(number)
    acknowledge_stop()
    for each in FORWARDED:
        signal.signal(each, signal.SIG_DFL)
    if asked and machines() == 1:
        _write(_file("code"), str(EXIT_STOPPED))
        os._exit(EXIT_DONE)


def launched_size() -> int:
    """How many processes the launcher started, on all machines; 1 without one."""
    return place().size


def machines() -> int:
    """On how many machines they run; 1 without a launcher."""
    return place().machines


def workers_of_this_machine() -> list[int]:
    """The process ids of the other workers here, as far as scripts/torchrun.sh started them."""
    found = []
    if FOLDER in os.environ:
        for path in _folder().glob("*.pid"):
            with suppress(OSError, ValueError):
                found.append(int(path.read_text()))
    return [pid for pid in found if pid != os.getpid()]


def stop_asked() -> signal.Signals | None:
    """The signal with which the user stops the run through the launcher of this machine; None without one."""
    if FOLDER not in os.environ or not (_folder() / "stop").exists():
        return None
    return signal.Signals["SIG" + ((_folder() / "stop").read_text().strip() or "TERM")]  # empty: being written


def is_regrouping() -> bool:
    """Whether torchrun, on this machine, is stopping the workers to start them again as another group."""
    return FOLDER in os.environ and (_folder() / "regroup").exists()


@contextmanager
def regrouping() -> Iterator[None]:
    """For torchrun: encloses the stopping of healthy workers. Without a launcher: nothing."""
    if FOLDER not in os.environ:
        yield
        return
    (_folder() / "regroup").touch()
    try:
        yield
    finally:
        (_folder() / "regroup").unlink(missing_ok=True)


def acknowledge_stop() -> None:
    """Tell the launcher that a signal arrived here, so that it does not send it again. Without one: nothing.

    Schedulers and terminals send a signal to every process of a job; a worker that has it from there must not take
    what the launcher forwards for the second signal, which ends a run at once.
    """
    with suppress(OSError):  # a full disk is no reason not to save
        if FOLDER in os.environ and _file("pid").exists():
            _write(_file("stopping"), "")


def _end_with_launcher(torchrun: int) -> None:
    """Waits for the launcher's end, which comes before this process's only if it is killed; then ends all it started.

    `torchrun` is the process id of this one's parent. It comes first, for it would start the workers again; if it is
    gone, its number may be another process's.
    """
    try:
        launcher = int((Path(os.environ[FOLDER]) / "launcher").read_text())
    except (OSError, ValueError):
        return  # the folder is being removed: the launcher ends, and sees to the rest
    wait_for_end(launcher)
    if os.getppid() == torchrun:
        with suppress(ProcessLookupError):
            os.kill(torchrun, signal.SIGKILL)
    os._exit(EXIT_FAILED)


def _recorded(main: Callable[[], int]) -> int:
    """`main()`; its traceback, if it raises, is what torchrun prints as the first cause of the group's end."""
    from torch.distributed.elastic.multiprocessing.errors import record  # torch takes seconds, `stop` none

    code = record(main)()
    return EXIT_DONE if code is None else code  # `record` makes None of SystemExit(0)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _file(name: str) -> Path:
    return _folder() / f"{os.environ['LOCAL_RANK']}.{name}"


def _write(path: Path, text: str) -> None:
    """Write in one piece: the launcher may be reading."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
