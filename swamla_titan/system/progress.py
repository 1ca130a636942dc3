"""The progress of long work with rate and time left: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_INTERVAL = 10.0  # seconds between two lines
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Progress:
    """Work of `total` things, of which `done` were done before; `unit` follows a number, as in "B" and " pieces"."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit, self._before, self._done = what, total, unit, done, done
        self._tokens = 0
        self._began = self._last = time.monotonic()
        self._is_bar = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            desc=what,
            disable=not self._is_bar,
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, count: int, tokens: int = 0) -> None:
        """Report that `count` more are done, with so many tokens."""
        self._done += count
        self._tokens += tokens
        now = time.monotonic()
        if self._tokens:
            self._bar.set_postfix_str(f"{short(self._tokens / max(now - self._began, 1e-3))} tokens/s", refresh=False)
        self._bar.update(count)
        if not self._is_bar and now > self._last + _INTERVAL:
            self._last = now
            print(self._line(now - self._began), flush=True)

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        parts = [
            f"{self._done / max(1, self._total):.0%} of {short(self._total)}{self._unit}",
            f"{short(rate)}{self._unit}/s",
            *([f"{short(self._tokens / seconds)} tokens/s"] if self._tokens else []),
            f"{tqdm.format_interval(left)} left",
        ]
        return f"{self._what}: {', '.join(parts)}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def short(number: float) -> str:
    """A number of three digits: 12.3M."""
    factor, prefix = next(((factor, prefix) for factor, prefix in _PREFIXES if number >= factor), (1.0, ""))
    return f"{number / factor:.3g}{prefix}"
