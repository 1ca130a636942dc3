"""Events of a run, such as starts, checkpoints and rewinds: an object each in events.jsonl of its dump folder.

docs/metrics.md lists them. They are log records of a logger of their own, so any part of the program records them, in
any thread, and they are dropped where no file is open: on all ranks but rank 0, and outside of runs.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swamla_titan.system.line_file import LineFileHandler

EVENTS = "events.jsonl"

_logger = logging.getLogger("swamla_titan.events")
_logger.setLevel(logging.INFO)
_logger.propagate = False


def record_event(name: str, **values: Any) -> None:
    """Append an event; `values` are of JSON types."""
    _logger.info("%s", json.dumps({"time": now(), "event": name} | values))


@contextmanager
def timed_event(name: str, **values: Any) -> Iterator[None]:
    """Record an event with the `seconds` that this encloses, unless it raises."""
    start = time.perf_counter()
    yield
    record_event(name, **values, seconds=round(time.perf_counter() - start, 3))


def now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def open_events(folder: Path) -> None:
    """Append the events from here on to the file in `folder`; raises OSError if it cannot be opened."""
    close_events()
    handler = LineFileHandler(folder / EVENTS)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)


def close_events() -> None:
    """Drop the events from here on."""
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
        handler.close()


def seconds_since_start() -> float | None:
    """The age of this process, which includes its imports; None where the system does not give it."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, after a name that may have spaces
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return round(age, 3) if age >= 0 else None
