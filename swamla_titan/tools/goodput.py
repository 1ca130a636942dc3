"""Goodput: the share of a run's wall time that went into steps that count, and what took the rest."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from swamla_titan.tools.history import History, Start, integer, number

PURPOSES = {
    "counted": "steps that count",
    "repeated": "steps taken again after a restart",
    "skipped": "steps skipped as bad",
    "rewound": "steps that a rewind discarded",
    "first": "first steps, beyond a usual one (compilation)",
    "starting": "starting: imports, data, model, checkpoint",
    "validation": "validation",
    "checkpoint": "waiting for checkpoints",
    "rewind": "rewinding",
    "down": "between starts",
    "other": "other, and steps that were killed before a log line",
}


@dataclass
class Goodput:
    """Seconds of wall time by purpose (see PURPOSES).

    The time after a start that was stopped on purpose, `stopped`, is no part of them. GPU-hours are those of all ranks,
    between starts too, unless it was stopped on purpose.
    """

    seconds: dict[str, float]
    stopped: float
    waiting_for_data: float  # part of the steps
    gpu_hours: float

    @property
    def total(self) -> float:
        """Wall time without `stopped`."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The share of `total` that went into steps that count."""
        return self.seconds["counted"] / self.total if self.total > 0 else 0.0


def goodput(history: History) -> Goodput | None:
    """Where the time of a run went; None if it recorded no wall time, as older versions did not."""
    starts = [each for each in history.starts if each.begin is not None]
    if not starts:
        return None
    found = Goodput(dict.fromkeys(PURPOSES, 0.0), 0.0, 0.0, 0.0)
    listed = (each.get("steps") for each in history.events if each["event"] == "skipped")
    skipped = sorted({step for steps in listed if isinstance(steps, list) for step in steps if type(step) is int})
    for index, start in enumerate(starts):
        _add(found, start, starts[index + 1 :], skipped)
    return found


def _add(found: Goodput, start: Start, later: Sequence[Start], skipped: Sequence[int]) -> None:
    """Add the time of a start, and that until the next one."""
    begin, last = start.begin, start.last
    assert begin is not None
    whole = max(0.0, (last or begin) - begin)
    spent = dict.fromkeys(PURPOSES, 0.0)
    for each in start.events:
        doing = str(each.get("doing"))
        if each["event"] == "pause" and doing in spent:
            spent[doing] += number(each, "seconds") or 0.0
    _add_steps(spent, start, later, skipped)
    first = next(start.intervals(), None)
    trains_at = (number(first[1], "time") or begin) - first[2] if first else begin + whole
    spent["starting"] = min(whole, max(0.0, trains_at - begin))
    spent["other"] = max(0.0, whole - sum(spent.values()))
    gap = max(0.0, (later[0].begin or 0.0) - (last or begin)) if later else 0.0
    if start.stopped_on_purpose:
        found.stopped += gap
    else:
        spent["down"] = gap
    for purpose, seconds in spent.items():
        found.seconds[purpose] += seconds
    found.waiting_for_data += sum(
        (line["step"] - before) * (number(line, "data_seconds") or 0.0) for before, line, _ in start.intervals()
    )
    if start.device != "CPU":
        found.gpu_hours += (whole + spent["down"]) * start.ranks / 3600


def _add_steps(spent: dict[str, float], start: Start, later: Sequence[Start], skipped: Sequence[int]) -> None:
    """Add the time of a start's steps; `skipped`: those that were bad, in order."""
    resumed = min((each.step for each in later), default=None)
    rewinds = [each for of in (start, *later) for each in of.events if each["event"] == "rewind"]
    discarded = [range(integer(each, "trained") + 1, integer(each, "step") + 1) for each in rewinds]
    usual = median([number(line, "step_seconds") or 0.0 for line in start.lines[1:]] or [float("inf")])
    for index, (before, line, seconds) in enumerate(start.intervals()):
        steps = range(before + 1, line["step"] + 1)
        usually = min(seconds, usual * len(steps)) if index == 0 else seconds
        spent["first"] += seconds - usually
        for purpose, count in _purposes(steps, resumed, skipped, discarded).items():
            spent[purpose] += usually * count / len(steps)


def _purposes(steps: range, resumed: int | None, skipped: Sequence[int], discarded: Sequence[range]) -> dict[str, int]:
    """How many of the steps were spent on what."""
    kept = steps if resumed is None else range(steps.start, min(steps.stop, max(steps.start, resumed + 1)))
    bad, rewound, begin = _count(skipped, kept), 0, kept.start
    for each in sorted(discarded, key=lambda each: each.start):
        part = range(max(each.start, begin), min(each.stop, kept.stop))
        if part:
            rewound += len(part) - _count(skipped, part)
            begin = part.stop
    counted = len(kept) - bad - rewound
    return {"repeated": len(steps) - len(kept), "skipped": bad, "rewound": rewound, "counted": counted}


def _count(numbers: Sequence[int], within: range) -> int:
    """How many of the numbers, which are in order, are within a range."""
    return bisect_left(numbers, within.stop) - bisect_left(numbers, within.start) if within else 0
