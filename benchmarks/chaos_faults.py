"""What befalls a job in a soak, and what it may answer."""

import contextlib
import random
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_job import Failure, Job, steps_of_checkpoints

STOPPED = 75
KILLED = -signal.SIGKILL
DISK_SECONDS = 2.0  # that a disk is full
PAUSE_SECONDS = 30.0  # that a rank is stopped: longer than the step_timeout of chaos.py, which does not count them


@dataclass(frozen=True)
class Fault:
    """`inject` does it. `codes`: what the command may end with because of it, if it ends.

    `moments`: names of methods of Moments. `shared`: for jobs of several processes. `deadly`: a new start must follow.
    `damages`: the newest checkpoint, so that the start goes on from an older one.
    """

    name: str
    inject: Callable[[Job, random.Random], None]
    codes: frozenset[int] = frozenset()
    moments: tuple[str, ...] = ("first_step", "stepping", "stepping", "saving")
    shared: bool = False
    deadly: bool = True
    damages: bool = False


def _to(kind: str, number: int) -> Callable[[Job, random.Random], None]:
    def send(job: Job, draw: random.Random) -> None:
        victims = job.find(kind)
        if victims:  # else it has just ended
            job.kill(draw.choice(victims), number=number)

    return send


def _to_launcher(number: int) -> Callable[[Job, random.Random], None]:
    def send(job: Job, draw: random.Random) -> None:
        # A command of one process has no launcher beside it.
        job.kill(*(job.find("launcher") or job.find("rank")), number=number)

    return send


def _kill_launcher(job: Job, draw: random.Random) -> None:
    """What it leaves behind must end by itself."""
    _to_launcher(signal.SIGKILL)(job, draw)
    job.end()
    job.wait_until_gone()


def _cut_power(job: Job, draw: random.Random) -> None:
    job.cut_power()


def _fill_disk(job: Job, draw: random.Random) -> None:
    """For a moment the ranks can write nothing, or nothing large: a limit of the kernel's stands in for the disk."""
    size = draw.choice((0, 100_000))
    limited = []
    for process in job.find("rank"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, before[1]))
            limited.append((process.pid, before))

    def make_room() -> None:
        for pid, before in limited:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    _later(DISK_SECONDS, make_room)


def _pause(job: Job, draw: random.Random) -> None:
    """Stops a rank for a while, as a suspended job or a moved machine is; the others wait for it."""
    if victims := job.find("rank"):
        victim = draw.choice(victims)
        job.kill(victim, number=signal.SIGSTOP)
        _later(PAUSE_SECONDS, lambda: job.kill(victim, number=signal.SIGCONT))


def _fall_asleep(job: Job, draw: random.Random) -> None:
    """A rank does not come out of its next step, as in a collective that never ends; the others wait for it."""
    if victims := job.find("rank"):
        job.asleep.mkdir(exist_ok=True)
        (job.asleep / str(draw.choice(victims).pid)).touch()


def _later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()


def _stop_and_damage(damage: Callable[[Path, random.Random], None]) -> Callable[[Job, random.Random], None]:
    """Stops the job and, while it is down, spoils a file of the newest checkpoint."""

    def inject(job: Job, draw: random.Random) -> None:
        _to_launcher(signal.SIGTERM)(job, draw)
        if job.end() != STOPPED:
            return  # it was done already
        steps = steps_of_checkpoints(job.folder)
        if len(steps) < 2:
            return  # the only one: what is left would rightly be refused
        newest = job.folder / "checkpoints" / f"step-{steps[-1]:08d}"
        damage(draw.choice([path for path in sorted(newest.iterdir()) if path.stat().st_size]), draw)

    return inject


def _flip_byte(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


FAULTS = (
    Fault("kill -9 of a rank", _to("rank", signal.SIGKILL), frozenset({KILLED})),
    Fault("kill -9 of a loader", _to("loader", signal.SIGKILL), frozenset({1}), ("stepping",)),
    Fault("kill -9 of torchrun", _to("agent", signal.SIGKILL), frozenset({1}), shared=True),
    Fault("kill -9 of the launcher", _kill_launcher, frozenset({KILLED})),
    Fault("power cut", _cut_power, frozenset({KILLED})),
    Fault("SIGTERM to the launcher", _to_launcher(signal.SIGTERM), frozenset({STOPPED})),
    Fault("SIGUSR1 to the launcher", _to_launcher(signal.SIGUSR1), frozenset({STOPPED})),
    Fault("SIGTERM to a rank", _to("rank", signal.SIGTERM), frozenset({STOPPED})),
    Fault("SIGUSR1 to a rank", _to("rank", signal.SIGUSR1), frozenset({STOPPED})),
    Fault("a rank paused for longer than step_timeout", _pause, moments=("stepping",), deadly=False),
    Fault("a rank asleep in a step", _fall_asleep, frozenset({1}), ("stepping",)),
    Fault("disk full for a moment", _fill_disk, frozenset({1}), deadly=False),
    Fault("byte flipped in the newest checkpoint", _stop_and_damage(_flip_byte), frozenset({STOPPED}), damages=True),
    Fault("file cut in the newest checkpoint", _stop_and_damage(_cut), frozenset({STOPPED}), damages=True),
    Fault("file lost from the newest checkpoint", _stop_and_damage(_remove), frozenset({STOPPED}), damages=True),
)


def faults_for(processes: int) -> list[Fault]:
    """Those that make sense for a job of so many processes."""
    return [fault for fault in FAULTS if processes > 1 or not fault.shared]


def check_code(code: int, fault: Fault) -> None:
    """Failure if the command ended with what it must not end with after this fault; 0: it was done before it struck."""
    if code not in {0} | fault.codes:
        raise Failure(f"after {fault.name} the command ended with {code}, not with {sorted(fault.codes)}")
