"""Whether steps wait for their data, and what helps here: a line in the log, not one for every step."""

import os
from dataclasses import dataclass

from swamla_titan.config.sections import Data

SHARE = 0.05  # of the steps' time; less is not worth a warning
LEAST_STEPS = 10  # that a share is taken over
WORSE = 1.5  # times the share warned of before: warned of again
LONG = 2000  # steps after which it is, too


@dataclass(frozen=True)
class Interval:
    """Steps between two lines of the log: how long they took, and how much of it their device had nothing to do because
    their data were not there. Without what else happened between them, as validation and checkpoints."""

    steps: int
    seconds: float
    waited: float


class DataWait:
    """Watches the intervals, and has a warning where their steps wait for data."""

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._begun = False
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0  # since the last verdict
        self._warned_of = 0.0  # the share
        self._since = 0  # steps since that warning

    def warning(self, interval: Interval) -> str | None:
        """What to log after an interval, if there is news. The first one is left out: readers start up in it."""
        if not self._begun:
            self._begun = True
            return None
        self._steps += interval.steps
        self._seconds += interval.seconds
        self._waited += interval.waited
        if self._steps < LEAST_STEPS or self._seconds <= 0:
            return None
        share = self._waited / self._seconds
        self._since += self._steps
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        is_news = not self._warned_of or share > WORSE * self._warned_of or self._since >= LONG
        if share <= SHARE or not is_news:
            return None
        self._warned_of, self._since = share, 0
        return f"steps wait for data {share:.0%} of their time. {self._advice}"


def cores_per_rank() -> int:
    """Cores of this machine that each rank on it can count on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def what_helps(data: Data, units: int, streams: int, cores: int) -> str:
    """Advice for a rank that owns `streams` of the data's streams and can count on `cores` cores."""
    workers, most = data.num_workers, min(streams, cores)
    if workers == 0:
        first = "With data.num_workers = 0 data are read between the steps: set it to 1 or more, to read beside them"
    elif workers < most:
        which = f"there are {cores} cores per rank" if cores <= streams else f"a rank owns {streams} streams"
        first = f"Raise data.num_workers from {workers}, up to {most}: {which}"
    elif workers >= streams:
        first = f"Each stream of a rank has a loader process already: in a new run, raise data.streams ({data.streams})"
    else:
        first = (
            f"{workers} loader processes share {cores} cores per rank: give the job more cores, or fewer ranks a node"
        )
    further = []
    if units < data.streams:
        further.append(
            f"the data lie in {units} units, which {data.streams} streams share: split them into more files, parquet "
            "into smaller row groups"
        )
    if data.source == "huggingface" and not os.path.isdir(os.path.expanduser(data.path)):
        further.append("a copy on a local disk needs no network")
    elif data.source != "builtin":
        further.append("if the cores are idle meanwhile, the storage is slow: copy the data to a local disk")
    return ". ".join(part[0].upper() + part[1:] for part in (first, *further))
