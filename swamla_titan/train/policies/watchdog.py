"""The watchdog ends a process that makes no progress, after it wrote all stacks, so that its launcher restarts it.

Two timers watch the main thread. A Python thread checks once a second; it can write files, ask the other ranks and
write to the log. It cannot run while C code holds the GIL. For that case there is a `Backstop` (system/process.py): a
little later than the thread would have, it has C code write all stacks and ends the process.

A suspended process does not hang. So limits count the time in which this process ran, without the time in which it, or
another process of the run on this machine, was suspended (Ctrl-Z and `fg`, `scontrol suspend`, a virtual machine that
is migrated). A process on another machine that does not answer counts as lost.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from swamla_titan.config.schedule import TrainingStage
from swamla_titan.config.sections import FaultTolerance
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import EXIT_FAILED
from swamla_titan.launch.worker import local_worker_pids
from swamla_titan.system.console import Lines
from swamla_titan.system.events import record_event
from swamla_titan.system.process import Backstop, RunningTime, stopped
from swamla_titan.train.policy import Policy, StepOutcome

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[2]

# Seconds. When a rank ends, the launcher ends the others, so each waits until all have written their stacks.
BACKSTOP = 10.0  # after the limit, the backstop ends a process whose Python cannot run
OTHERS = 15.0  # limit of the wait for the other ranks
ANSWER = 5.0  # limit of the wait for their store
REPORT = 30.0  # limit of the report, which the backstop enforces
POLL = 1.0  # between two checks of the main thread, and of whether another rank hangs

_HANG, _PLACE = "hang", "place/"  # keys in the ranks' store
_Places = dict[int, tuple[int, str]]  # by rank: the step that it took last, and where in the code it is


@dataclass(frozen=True)
class _Progress:
    """The main thread's present work, since when, and its time limit."""

    step: int  # the last one taken
    doing: str
    limit: float  # seconds
    since: float  # of the monotonic clock

    @property
    def deadline(self) -> float:
        return self.since + self.limit


class Watchdog(Policy):
    """Ends this process, with exit code 1, if its trainer makes no progress for too long.

    Two calls of `after_step` may be `step_timeout` seconds apart; the start, the first step and each `pause` may last
    `first_step_timeout`. A GPU computes behind its host, which waits for it when it logs, or when some 1000 kernels are
    queued, so a step that hangs on the GPU is noticed a few steps later. It watches from its creation, before there is
    a trainer, to `stop`, after the trainer has closed its policies.

    The rank that hangs notifies the others, and every rank writes the stacks of all threads to
    traces/hang-step-N-rank-R.txt, NCCL's flight recorder to traces/hang-step-N-nccl-rank-R, with the N of the rank that
    noticed first, and a log line that says where the ranks are. Before `begin` no file is created. A process whose
    Python cannot run leaves its stacks in traces/hang-rank-R.txt, which is created empty at `begin` and removed at the
    end. If its C code blocks signals, such a process is killed (137).
    """

    def __init__(self, config: FaultTolerance, traces: Path, world: World) -> None:
        """Start watching, with the limit of a start; with `step_timeout` 0 the watchdog never does anything."""
        self._config, self._traces, self._world = config, traces, world
        self._now = _Progress(0, "starting", config.first_step_timeout, time.monotonic())
        self._arming = threading.Lock()
        self._armed = float("inf")  # when the backstop ends this process, by the clock of `_Progress.since`
        self._backstop: Backstop | None = None
        self._file: TextIO | None = None
        self._closed = threading.Event()
        self._other_hangs = threading.Event()
        self._thread: threading.Thread | None = None
        if not config.step_timeout:
            return
        # A separate connection, because a waiting call blocks the process group's.
        self._store: dist.Store | None = None
        if world.size > 1:
            self._store = dist.PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=5))
            threading.Thread(target=self._listen, name="watchdog-listener", daemon=True).start()
        try:
            self._backstop = Backstop()
            if sys.__stderr__:
                self._backstop.write_to(sys.__stderr__)  # until there is a file
        except OSError as error:
            logger.warning("no second watchdog, for hangs in which Python cannot run: %s", error)
        self._arm(self._now.limit + BACKSTOP)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """Expect the first step; files may be written from here on."""
        if self._thread:
            with suppress(OSError):  # standard error remains; others report what is wrong with the folder
                self._traces.mkdir(parents=True, exist_ok=True)
                self._file = self._backstop_path.open("a")  # it may hold stacks of an earlier start
                if self._backstop:
                    self._backstop.write_to(self._file, self._backstop_path)
        self._expect(_Progress(step, "first step", self._config.first_step_timeout, time.monotonic()))

    def begin_stage(self, stage: TrainingStage) -> None:
        """Expect the first step of a stage, which compiles as the first step of all does."""
        limit = self._config.first_step_timeout
        self._expect(_Progress(stage.begin.step, "first step of a stage", limit, time.monotonic()))

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        """Expect the next step."""
        self._expect(_Progress(step, "step", self._config.step_timeout, time.monotonic()))

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Limit what this encloses like the first step; then the limit before it begins again."""
        before = self._now
        self._expect(_Progress(before.step, doing, self._config.first_step_timeout, time.monotonic()))
        try:
            yield
        finally:
            self._expect(_Progress(before.step, before.doing, before.limit, time.monotonic()))

    def stop(self) -> None:
        """Stop watching; does not return if the watchdog reports a hang, because the process ends."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        if self._backstop:
            self._backstop.close()
        if self._file:
            self._remove_if_empty()
            self._file.close()
        self._thread = None

    @property
    def _backstop_path(self) -> Path:
        return self._traces / f"hang-rank-{self._world.rank}.txt"

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            there = self._backstop_path.stat()
            # It removes its own file alone, because the folder may belong to another run by now.
            if self._file and there.st_size == 0 and os.path.samestat(there, os.fstat(self._file.fileno())):
                self._backstop_path.unlink()
                self._traces.rmdir()  # unless there is something in it

    def _expect(self, progress: _Progress) -> None:
        """Record what the main thread does next; arms the backstop only if it would act too late otherwise."""
        self._now = progress
        if self._thread and progress.deadline + BACKSTOP < self._armed:
            self._arm(progress.limit + BACKSTOP)

    def _watch(self) -> None:
        poll = min(POLL, self._config.step_timeout / 4)
        before, running = time.monotonic(), RunningTime(poll)
        last: _Progress | None = None
        paused = 0.0  # seconds since `last` that do not count
        reported: set[int] = set()
        while True:
            began, ran = before, running.seconds
            ran = running.update() - ran
            before = time.monotonic()
            now = self._now
            if now is not last:
                last, paused = now, 0.0
            # Time before the last progress does not count towards this limit.
            waited = before - max(began, now.since)
            paused += waited - (0.0 if self._some_are_stopped(reported) else min(waited, ran))
            left = now.deadline + paused - before
            if abs(before + left + BACKSTOP - self._armed) > poll / 2:
                self._arm(max(left, 0) + BACKSTOP)
            if left < 0:
                self._end(now, f"no progress for {now.limit:g} s ({now.doing}) after step {now.step}")
            elif self._other_hangs.is_set():
                self._end(now, f"another rank makes no progress; this one ({now.doing}) is after step {now.step}")
            if self._closed.wait(poll):
                return

    def _some_are_stopped(self, reported: set[int]) -> bool:
        """Whether a process of this run on this machine is suspended; logs each of them once."""
        found = {pid for pid in local_worker_pids() if stopped(pid)}
        for pid in sorted(found - reported):
            logger.warning("process %d of this run is stopped, and waited for (kill -CONT %d continues it)", pid, pid)
        reported.clear()
        reported.update(found)
        return bool(found)

    def _arm(self, seconds: float) -> None:
        """Set the backstop to end the process in `seconds`, and not earlier."""
        with self._arming:  # so that the older of two deadlines is not set last
            self._armed = time.monotonic() + seconds
            if self._backstop:
                self._backstop.arm(seconds)

    def _listen(self) -> None:
        """Poll the ranks' store, which does not answer while the process that hosts it is suspended."""
        while not self._closed.wait(POLL):
            if self._another_stopped():
                self._other_hangs.set()
                return

    def _another_stopped(self) -> bool:
        if self._store is None:
            return False
        try:
            return self._store.check([_HANG])
        except RuntimeError:  # its host is gone, and the launcher will soon end this process
            self._store = None
            return False

    def _end(self, now: _Progress, headline: str) -> None:
        """Write the report and end the process. If writing hangs too, the backstop ends it."""
        self._arm(REPORT)
        try:
            rank = self._world.rank
            place = place_of_main_thread()
            hang = f"hang-step-{self._agree_on_step(now.step)}"  # first: the disk may be what hangs
            path = self._traces / f"{hang}-rank-{rank}.txt"
            written = write_stacks(path, f"rank {rank}: {headline}")
            if self._world.device.type == "cuda" and self._world.size > 1:
                write_nccl_trace(self._traces / f"{hang}-nccl-rank-{rank}")
            self._publish(f"{_PLACE}{rank}", f"{now.step} {place}")  # last, because it means that this rank has written
            places = self._ask_all({rank: (now.step, place)})
            logger.error(
                "%s; this process ends, to be started again from the newest checkpoint. If it was only slow, raise "
                "fault_tolerance.%s. Stacks: %s. Where the ranks are:\n%s",
                headline,
                "step_timeout" if now.doing == "step" else "first_step_timeout",
                path if written else "on standard error",
                Lines(where_all_are(places, self._world.size)),
            )
            record_event("hang", step=now.step, doing=now.doing)
            self._remove_if_empty()
        finally:
            # sys.exit would end this thread alone, and nothing can end the main thread.
            os._exit(EXIT_FAILED)

    def _agree_on_step(self, step: int) -> int:
        """Notify the other ranks of the hang; returns the step of the rank that noticed first.

        All ranks name their files by it, because their own steps may differ, and NCCL's tools find the files of one
        hang by their common prefix.
        """
        agreed = [step]

        def ask(store: dist.Store) -> None:
            with suppress(RuntimeError):
                agreed[0] = int(store.compare_set(_HANG, "", str(step)))
                answered.set()

        answered = threading.Event()
        if self._store is not None:
            threading.Thread(target=ask, args=(self._store,), daemon=True).start()
            if not answered.wait(ANSWER):
                self._store = None
        return agreed[0]

    def _publish(self, key: str, value: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, value)
            except RuntimeError:
                self._store = None

    def _ask_all(self, answers: _Places) -> _Places:
        """Add the other ranks' last step and place in the code to `answers`, as far as they arrive in time."""
        end = time.monotonic() + OTHERS
        while self._store is not None and len(answers) < self._world.size and time.monotonic() < end:
            try:
                for rank in set(range(self._world.size)) - answers.keys():
                    if self._store.check([f"{_PLACE}{rank}"]):
                        step, _, place = self._store.get(f"{_PLACE}{rank}").decode().partition(" ")
                        answers[rank] = int(step), place
            except RuntimeError:
                break
            time.sleep(0.05)
        return answers


def write_stacks(path: Path, headline: str) -> bool:
    """Write the Python stacks of all threads to `path`, below a headline; to standard error if that is impossible.

    Returns whether the file was written. No source file is read, because it may be on the disk that hangs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{headline}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return True
    except OSError as error:
        print(f"{path} could not be written ({error.strerror}); {headline}", file=sys.__stderr__, flush=True)
        if sys.__stderr__:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        return False


def write_nccl_trace(path: Path) -> bool:
    """Write NCCL's last collectives, of which TORCH_FR_BUFFER_SIZE are remembered (torch's default: 2000), to `path`.

    Returns whether there was something to write. `path` should end in the rank, because fr_trace of
    torch.distributed.flight_recorder reads the files of all ranks by their common prefix, and reports which rank missed
    which collective.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None) if dist.is_available() else None
    if dump is None:  # torch without NCCL
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the stacks of the calls: to resolve them torch may wait for Python's lock, which a hang may hold.
        path.write_bytes(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))
    except (OSError, RuntimeError) as error:
        logger.warning("no flight recorder of NCCL: %s", error)
        return False
    return True


def place_of_main_thread() -> str:
    """Where the main thread is: its innermost function, and the innermost function of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "ending"
    innermost, ours = frame, frame
    while ours.f_back is not None and PACKAGE not in Path(ours.f_code.co_filename).parents:
        ours = ours.f_back
    found = PACKAGE in Path(ours.f_code.co_filename).parents
    return _words(innermost) + (f", called by {_words(ours)}" if found and ours is not innermost else "")


def _words(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def where_all_are(places: _Places, size: int) -> str:
    """A line for each place in the code, with the ranks that are there; those with the fewest steps come first.

    A rank that is not in `places` did not answer. Ranks that wait for each other took the same number of steps; the one
    that is elsewhere delays the others.
    """
    together: dict[tuple[int, str], list[int]] = {}
    for rank in sorted(places):
        together.setdefault(places[rank], []).append(rank)
    most = max((step for step, _ in places.values()), default=0)
    lines = []
    for (step, place), ranks in sorted(together.items(), key=lambda item: (item[0][0], len(item[1]))):
        lines.append(f"{_ranks(ranks)} after step {step}{' (behind)' if step < most else ''}: {place}")
    if silent := sorted(set(range(size)) - places.keys()):
        lines.append(f"{_ranks(silent)}: no answer; stopped, cut off, or in code that does not let Python run")
    return "\n".join(f"  {line}" for line in lines)


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(end) for end in run) for run in runs)
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"
