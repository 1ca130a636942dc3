"""A training job under run_train.sh that is meant to be hurt: its processes can be found by what each is for.

Linux only: the processes are found in /proc, by a variable that all of them inherit.
"""

import contextlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_MARK = "CHAOS_JOB"
_SAVING = ".tmp-step-"  # how the name of a checkpoint begins that is being written
_LOOK = 0.005  # seconds between two looks at a folder


class Failure(Exception):
    """The job did something that it must not do."""


class Process(NamedTuple):
    """`kind`: launcher (the shell script), agent (torchrun), rank, loader, or other (fork servers and the like)."""

    pid: int
    kind: str


@dataclass(frozen=True)
class Progress:
    """What a job's dump folder tells: how often it was started, and how far it has come."""

    starts: int
    lines: int  # of steps in metrics.jsonl
    step: int  # of the last of them
    resumed: int  # the step that the newest start went on from

    @classmethod
    def of(cls, folder: Path) -> "Progress":
        starts, resumed = 0, 0
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / "logs" / "rank-0.log").read_text(errors="replace").splitlines():
                if found := re.search(r": (?:a new run|resumed from .*step-(\d+))$", line):
                    starts, resumed = starts + 1, int(found[1] or 0)
        steps = [each["step"] for each in metrics_lines(folder) if "loss" in each]
        return cls(starts, len(steps), steps[-1] if steps else 0, resumed)


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a line that a kill cut short is left out."""
    objects = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                objects.append(json.loads(line))
    return objects


def steps_of_checkpoints(folder: Path) -> list[int]:
    """The steps of the finished checkpoints of a dump folder, ascending."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names)


class Job:
    """One dump folder and the command that trains into it, started as often as need be.

    A context manager: what still runs at its end is killed.
    """

    def __init__(
        self, config: Path, folder: Path, temporary: Path, processes: int, *overrides: str, **environment: str
    ) -> None:
        """Trains on the CPU with `processes` ranks, or on as many GPUs where `environment` says NGPU.

        `temporary`: a folder with a short name; loaders are reached through sockets in it, whose paths have 107 bytes.
        """
        self.folder, self.processes = folder, processes
        self.output = folder.with_name(f"{folder.name}.out")  # all that the launcher prints, of all starts
        self.asleep = folder.with_name(f"{folder.name}.asleep")  # names the processes that chaos_site puts to sleep
        self._arguments = [str(config), "--job.dump_folder", str(folder), *overrides]
        self._mark = secrets.token_hex(8)
        hidden = ("LOG_RANK", "NNODES", "RDZV_ENDPOINT", "TORCHELASTIC_RESTART_COUNT")
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        settings = {"PYTHON": sys.executable, "NGPU": "0", "MAX_RESTARTS": "1000", "OMP_NUM_THREADS": "1"}
        own = {"TMPDIR": str(temporary), _MARK: self._mark, "CHAOS_ASLEEP": str(self.asleep)}
        self._environment = inherited | settings | own | environment
        self.launcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()

    def start(self) -> None:
        """Run the command; another start of it must have ended."""
        assert self.launcher is None or self.launcher.poll() is not None
        environment = dict(self._environment)
        if environment["NGPU"] == "0":
            environment["NPROC"] = str(self.processes)
        with self.output.open("ab") as file:
            self.launcher = subprocess.Popen(
                [str(ROOT / "run_train.sh"), *self._arguments],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def code(self) -> int | None:
        """The command's exit code; None while it runs."""
        assert self.launcher is not None
        return self.launcher.poll()

    def end(self, seconds: float = 300) -> int:
        """Wait for the command's end; returns its exit code."""
        self.wait(lambda: self.code() is not None, seconds, "the end of the command")
        code = self.code()
        assert code is not None
        return code

    def wait(self, is_there: Callable[[], Any], seconds: float, what: str) -> bool:
        """Wait until `is_there()`; False if the command ended before. Failure if neither happens in time."""
        end = time.monotonic() + seconds
        while not is_there():
            if self.code() is not None:
                return bool(is_there())
            if time.monotonic() > end:
                raise Failure(f"{what} did not come in {seconds:.0f} s; {self.described()}")
            time.sleep(_LOOK)
        return True

    def find(self, kind: str | None = None) -> list[Process]:
        """The job's processes that run, of one kind or of all. Ranks in the order in which they were started."""
        found = [process for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if (process := self._look(pid))]
        return [process for process in sorted(found) if kind in (None, process.kind)]

    def _look(self, pid: int) -> Process | None:
        """The process `pid`, if it is of this job."""
        try:
            place = Path("/proc") / str(pid)
            if f"{_MARK}={self._mark}".encode() not in (place / "environ").read_bytes().split(b"\0"):
                return None
            command = (place / "cmdline").read_bytes().split(b"\0")
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            above = (Path("/proc") / str(parent) / "cmdline").read_bytes()
        except (OSError, ValueError):
            return None  # it has ended, or is somebody else's
        if b"multiprocessing.forkserver" in b" ".join(command):
            # Loaders are forks of a fork server, which is a child of its rank.
            return Process(pid, "loader" if b"multiprocessing.forkserver" in above else "other")
        if b"swamla_titan.launch.agent" in command:  # torchrun
            return Process(pid, "agent")
        if any(word.endswith(b".sh") for word in command):
            is_launcher = self.launcher is not None and pid == self.launcher.pid  # else a subshell
            return Process(pid, "launcher" if is_launcher else "other")
        return Process(pid, "rank" if b"swamla_titan" in command else "other")

    def kill(self, *processes: Process, number: int = signal.SIGKILL) -> None:
        """Send a signal; one that has ended already is no error."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def cut_power(self) -> None:
        """SIGKILL to all processes of the job, and to those that they start meanwhile."""
        while left := self.find():
            self.kill(*left)
            if self.launcher is not None:
                self.launcher.poll()  # else it stays as a zombie
            time.sleep(0.02)
        if self.launcher is not None:
            self.launcher.wait()

    def wait_until_gone(self, seconds: float = 30) -> None:
        """The launcher has ended; its processes must end too, and soon: what they hold is wanted by the next start."""
        end = time.monotonic() + seconds
        while left := [each for each in self.find() if each.kind != "other"]:
            if time.monotonic() > end:
                raise Failure(f"the launcher has ended, and {seconds:.0f} s later there are still {left}")
            time.sleep(0.05)

    def described(self) -> str:
        """Where the job stands, for a message."""
        tail = "\n".join(self.output.read_text(errors="replace").splitlines()[-20:]) if self.output.exists() else ""
        return f"{Progress.of(self.folder)}, exit code {self.code()}, processes {self.find()}; its last words:\n{tail}"


class Moments:
    """Random moments in the life of a job. Each waits for its own, and returns whether the job still runs then."""

    def __init__(self, draw: random.Random, seconds: float = 200.0) -> None:
        """`seconds`: the longest that a start may take until its first step."""
        self._draw, self._seconds = draw, seconds
        self._seen: set[Process] = set()  # ranks that there were at earlier moments

    def starting(self, job: Job) -> bool:
        """Some time in the first seconds of ranks that have just been started: import, loading, loaders, first step."""

        def new() -> set[Process]:
            return set(job.find("rank")) - self._seen

        ready = job.wait(lambda: len(new()) >= job.processes, self._seconds, "a start")
        return ready and self._now(job, self._draw.uniform(0, 3))

    def first_step(self, job: Job) -> bool:
        """About the next step, which is the first of a start if this one has not made any."""
        lines = Progress.of(job.folder).lines
        ready = job.wait(lambda: Progress.of(job.folder).lines > lines, self._seconds, "a step")
        return ready and self._now(job, self._draw.uniform(0, 0.05))

    def stepping(self, job: Job) -> bool:
        """Some steps later."""
        lines = Progress.of(job.folder).lines + self._draw.randint(1, 8)
        ready = job.wait(lambda: Progress.of(job.folder).lines >= lines, self._seconds, "a step")
        return ready and self._now(job, self._draw.uniform(0, 0.2))

    def saving(self, job: Job) -> bool:
        """While a checkpoint is being written: its unfinished folder has been made a moment ago."""
        old = unfinished(job.folder)
        ready = job.wait(lambda: unfinished(job.folder) - old, self._seconds, "a checkpoint")
        return ready and self._now(job, self._draw.choice((0.0, self._draw.uniform(0, 0.05))))

    def _now(self, job: Job, delay: float) -> bool:
        time.sleep(delay)
        self._seen = set(job.find("rank"))
        return job.code() is None


def unfinished(folder: Path) -> set[int]:
    """The inodes of the folders of checkpoints that are not finished."""
    found = set()
    for path in (folder / "checkpoints").glob(f"{_SAVING}*"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found
