"""Waiting for what must come. Nothing here is a measure of speed: only a hang comes to the deadline."""

import time
from collections.abc import Callable

# Seconds. Far beyond what a machine under heavy load needs: what takes longer than this does not end by itself.
HANG = 600.0


def wait_until(holds: Callable[[], object], why: Callable[[], object] = lambda: "", pause: float = 0.01) -> None:
    """Look again and again until `holds()`; `why()` is what a failure shows, or raises an error of its own before."""
    end = time.monotonic() + HANG
    while not holds():
        assert time.monotonic() < end, why()
        time.sleep(pause)
