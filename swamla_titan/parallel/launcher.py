"""A worker's side of its launcher: who speaks, and what torchrun cannot pass on.

That goes through a folder that scripts/torchrun.sh knows as well.

torchrun starts a group of workers again whenever one of them ends with anything but 0. That is right after a crash and
wrong where the user's input is at fault (2) or the run was stopped on purpose (75): those codes are left in the folder
for run_train.sh to return, and the worker ends with 0. The folder also has each worker's process id, so that signals
reach the workers themselves and not torchrun, which would give them only 30 seconds, and the file `stop` once a signal
came, so that a worker that starts later does not begin.

Without its launcher a worker ends, and ends its torchrun: nothing would hand it signals any more, and whoever gives the
command again wants the GPUs and the dump folder.

In the folder: `launcher` (the script's process id), `stop`, and for each local rank N the files `N.pid`, `N.stopping`
(a signal arrived) and `N.code`.
Standard library only: it runs before torch is imported.
"""

import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from swamla_titan.process_end import wait_for_end

FOLDER = "SWAMLA_TITAN_LAUNCH_FOLDER"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def speaks() -> bool:
    """Whether what this process has to say is for the console: LOG_RANK names it, or no launcher started it.

    LOG_RANK lists processes by their numbers on this machine; default 0. All come to the same errors, so one message is
    enough. run_train.sh shows no other output anyway, but torchrun by itself does. Raises UserError if LOG_RANK
    names no process of this machine.
    """
    if "LOCAL_RANK" not in os.environ:
        return True
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = os.environ.get("LOG_RANK") or "0"
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise UserError(f"LOG_RANK={text}: expected numbers of processes, as in 0,3")
    ranks = [int(number) for number in text.split(",")]
    if max(ranks) >= size:
        raise UserError(f"LOG_RANK={text}: the processes of this machine are 0 to {size - 1}")
    return int(os.environ["LOCAL_RANK"]) in ranks


def exit_through_launcher(main: Callable[[], int]) -> int:
    """Run `main` and return the code to end this process with: its own, unless scripts/torchrun.sh started us.

    Then 2 and 75, returned or raised as SystemExit, become 0 and are left for the launcher. Every worker must come to
    the same code: one that ends so alone leaves the others waiting for it.
    """
    if FOLDER not in os.environ:
        return main()
    # torchrun was started with these ignored, so that only the workers act on them, and we inherited that.
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), name="launcher-watch", daemon=True).start()
    for leftover in ("stopping", "code"):  # of the worker before a restart
        _file(leftover).unlink(missing_ok=True)
    # First the id, then the look for `stop`; the launcher goes the other way round, so one of the two notices.
    _write(_file("pid"), str(os.getpid()))
    if (_file("pid").parent / "stop").exists():
        code: object = EXIT_STOPPED
    else:
        try:
            code = _recorded(main)
        except SystemExit as ended:
            code = EXIT_DONE if ended.code is None else ended.code
            if code not in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED):
                raise
    assert isinstance(code, int)
    _write(_file("code"), str(code))
    return EXIT_DONE if code in (EXIT_BAD_INPUT, EXIT_STOPPED) else code


def acknowledge_stop() -> None:
    """Tell the launcher that a signal arrived here, so that it does not send it again. Without one: nothing.

    Schedulers and terminals send a signal to every process of a job; a worker that has it from there must not take
    what the launcher forwards for the second signal, which ends a run at once.
    """
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


def _file(name: str) -> Path:
    return Path(os.environ[FOLDER]) / f"{os.environ['LOCAL_RANK']}.{name}"


def _write(path: Path, text: str) -> None:
    """Write in one piece: the launcher may be reading."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
