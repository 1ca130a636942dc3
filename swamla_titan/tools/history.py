"""The history of a run, from metrics.jsonl and events.jsonl: its starts, the steps that count, and where the time went.

Both files may be growing. A run may have been killed, resumed several times, on other numbers of ranks, and from older
checkpoints; its files may be of versions that recorded no events, no wall time, and validation in lines of its own.
"""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swamla_titan.checkpoint.dump_folder import LOCK
from swamla_titan.config.toml import read_toml
from swamla_titan.errors import EXIT_DONE, EXIT_STOPPED, UserError
from swamla_titan.system.events import EVENTS

METRICS = "metrics.jsonl"

Line = dict[str, Any]
_MOST_STEPS = 1 << 40  # more is no number of a step


class Tail:
    """Reads the objects that were appended to a file of JSON lines since the last call; it need not exist yet.

    A line that was truncated, or is no object, is left out; one without an end is read once it has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset, self._rest = 0, b""

    def read(self) -> list[Line]:
        """The new objects; of a file that was replaced or cut, all."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file, self._offset, self._rest = (status.st_dev, status.st_ino), 0, b""
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [found for found in map(_object, lines) if found is not None]


def _object(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def number(line: Line, key: str) -> float | None:
    """A number of a line, or None where there is none, or none that a run can have measured."""
    value = line.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 else None


def first_line(value: object) -> str:
    """Of a text, such as an error's."""
    return str(value).partition("\n")[0]


def integer(line: Line, key: str) -> int:
    """A count, such as a step; 0 where there is none."""
    value = line.get(key)
    return value if type(value) is int and 0 <= value <= _MOST_STEPS else 0


@dataclass
class Start:
    """One start of a run, which continued after `step`: what it logged until it ended or was killed.

    `lines`: of its steps, in order, each step once. `event`: None for versions that recorded none.
    """

    step: int
    event: Line | None = None
    lines: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)

    @property
    def end(self) -> Line | None:
        """The event of its end; None while it runs, and if it was killed."""
        return next((each for each in reversed(self.events) if each["event"] == "end"), None)

    @property
    def stopped_on_purpose(self) -> bool:
        """Whether it was done, or stopped by a signal, so that the time until the next start is nobody's loss."""
        return self.end is not None and self.end.get("code") in (EXIT_DONE, EXIT_STOPPED)

    @property
    def begin(self) -> float | None:
        """When its process began; None if that is unknown."""
        if self.event:
            return float(self.event["time"]) - (number(self.event, "setup_seconds") or 0.0)
        _, line, seconds = next(self.intervals(), (0, {}, 0.0))
        time = number(line, "time")
        return None if time is None else time - seconds

    @property
    def last(self) -> float | None:
        """When it was last seen at work."""
        times = (number(each, "time") for each in (self.event or {}, *self.lines[-1:], *self.events))
        return max((each for each in times if each is not None), default=None)

    @property
    def ranks(self) -> int:
        """Its processes, one for each GPU."""
        if self.event:
            return integer(self.event, "ranks") or 1
        line = self.lines[0] if self.lines else {}
        job, gpu = number(line, "tokens_per_second"), number(line, "tokens_per_second_per_gpu")
        return round(job / gpu) if job and gpu else 1

    @property
    def device(self) -> str:
        """The name of its GPUs, or CPU; of versions that recorded no events "GPU"."""
        known = str(self.event.get("device", "")) if self.event else ""
        return known or ("GPU" if any("tflops_per_gpu" in line for line in self.lines[:1]) else "CPU")

    def intervals(self) -> Iterator[tuple[int, Line, float]]:
        """For each line of steps: the step of the line before, the line, and the seconds of the steps between."""
        before = self.step
        for line in self.lines:
            if (seconds := number(line, "step_seconds")) is not None:
                yield before, line, (line["step"] - before) * seconds
                before = line["step"]


class History:
    """A run, as far as its files tell; `update` reads what was added."""

    def __init__(self, folder: Path) -> None:
        """UserError if `folder` is no dump folder of a run."""
        self.folder = folder
        self.starts: list[Start] = []
        self._metrics, self._events = Tail(folder / METRICS), Tail(folder / EVENTS)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder{_runs_beside(folder)}")
        if not (folder / METRICS).exists() and not (folder / LOCK).exists():  # the first thing that a run writes
            raise UserError(f"{folder} is no run: it has no {METRICS}{_runs_beside(folder)}")

    @property
    def steps(self) -> int | None:
        """The steps that the newest start is to reach; None if the configuration cannot be read."""
        training = self.config.get("training")
        return integer(training, "steps") or None if isinstance(training, dict) else None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the newest start, section -> key -> value; empty if it cannot be read."""
        try:
            return read_toml(self.folder / "config.toml")
        except UserError:
            return {}

    def update(self) -> list[Line]:
        """Read what was added since the last call; returns it in order: events, and lines of steps, without `event`."""
        new = [line for line in self._metrics.read() if integer(line, "step")]
        # Read after the lines, so that it has the starts of all of them.
        events = [each for each in self._events.read() if isinstance(each.get("event"), str)]
        events = [each for each in events if number(each, "time") is not None]
        merged: list[Line] = []
        for line in new:
            time = number(line, "time")
            while events and time is not None and events[0]["time"] <= time:
                merged.append(self._add_event(events.pop(0)))
            merged.append(self._add_line(line))
        return merged + [self._add_event(each) for each in events]

    def _add_event(self, event: Line) -> Line:
        if event["event"] == "start":
            self.starts.append(Start(integer(event, "step"), event))
        elif self.starts:
            self.starts[-1].events.append(event)
        return event

    def _add_line(self, line: Line) -> Line:
        start = self.starts[-1] if self.starts else None
        last = start.lines[-1] if start and start.lines else None
        if last and "loss" not in line and line["step"] == last["step"]:
            last.update(line)  # validation, of a version that gave it a line of its own
            return line
        # The first step of each start has a line, also of a start whose event is lost.
        if start is None or (line["step"] <= last["step"] if last else line["step"] != start.step + 1):
            self.starts.append(start := Start(line["step"] - 1))
        start.lines.append(line)
        return line

    @property
    def events(self) -> list[Line]:
        """All events, starts included."""
        return [each for start in self.starts for each in ([start.event] if start.event else []) + start.events]

    def lines(self) -> list[Line]:
        """The lines of the steps that count, in order: those after which a later start continued are left out."""
        kept: list[Line] = []
        for start in self.starts:
            while kept and kept[-1]["step"] > start.step:
                kept.pop()
            kept += start.lines
        return kept

    def elapsed(self) -> list[float]:
        """For each of `lines`, the seconds since the run began, without those in which it was stopped on purpose."""
        base, seconds, before = 0.0, {}, None
        for start in self.starts:
            begin, spent = start.begin, 0.0
            if before is not None and before.last is not None and begin is not None and not before.stopped_on_purpose:
                base += max(0.0, begin - before.last)
            for _, line, interval in start.intervals():
                time = number(line, "time")
                spent = max(spent, time - begin) if time is not None and begin is not None else spent + interval
                seconds[id(line)] = base + spent
            if begin is not None and start.last is not None:
                spent = max(spent, start.last - begin)
            base += spent
            before = start
        return [seconds.get(id(line), base) for line in self.lines()]


def _runs_beside(folder: Path) -> str:
    """A hint at the runs under the folder, or beside it; empty if there are none."""
    for place in (folder, folder.parent):
        found = sorted(path.parent for path in place.glob(f"*/{METRICS}"))[:5]
        if found:
            return f"; there is {', '.join(map(str, found))}"
    return ""


def state(history: History) -> tuple[str, str]:
    """What the run is doing: a word (waiting, running, finished, stopped, failed, killed, silent), and a sentence."""
    if not history.starts:
        return "waiting", "no step was taken yet"
    start, steps = history.starts[-1], history.steps
    step = start.lines[-1]["step"] if start.lines else start.step
    end = start.end
    if end is None and start.event is None:
        done = steps is not None and step >= steps
        return ("finished", f"all {steps} steps were taken") if done else ("silent", f"last seen at step {step}")
    if end is None:
        alive = _holder_is_alive(history.folder)
        where = "starting" if not start.lines else f"at step {step}"
        if alive is False:
            return "killed", f"{where}: its process ended without a word; the same command continues it"
        return "running", where
    if "error" in end:
        return "failed", first_line(end["error"])
    if end.get("code") == EXIT_DONE:
        return "finished", f"all {end.get('step')} steps were taken"
    if end.get("code") == EXIT_STOPPED:
        return "stopped", f"on purpose after step {end.get('step')}; the same command continues it"
    return "stopped", f"after step {end.get('step')}, to continue with other machines"


def holder(folder: Path) -> str:
    """What the process that took the folder last wrote of itself, "process PID on MACHINE"; empty if unknown."""
    try:
        return (folder / LOCK).read_text(errors="replace")[:200].split("\n")[0]
    except OSError:
        return ""


def _holder_is_alive(folder: Path) -> bool | None:
    """Whether that process is there; None if it was on another machine, or is unknown."""
    words = holder(folder).split(" on ")
    try:
        process, machine = int(words[0].removeprefix("process ")), words[1]
    except (ValueError, IndexError):
        return None
    if machine != platform.node():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
