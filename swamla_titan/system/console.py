"""Standard streams that never raise, and log records of one line.

Standard library only, because every process begins with it.
"""

import io
import logging
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from swamla_titan.escaping import one_line, several_lines


class Lines(str):
    """Text of several lines, which keeps its line breaks as an argument of a log message."""


class LogFormatter(logging.Formatter):
    """Formats a record with its arguments escaped, so that a log line stays one line.

    Line breaks of the message's own template, of `Lines` and of tracebacks are kept.
    """

    def format(self, record: logging.LogRecord) -> str:
        safe = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            safe.args = tuple(map(_safe_argument, record.args))
        if not record.args:
            safe.msg = _safe_argument(record.msg)
        return several_lines(super().format(safe))


def _safe_argument(value: Any) -> Any:
    if isinstance(value, int | float | Lines) or getattr(value, "has_safe_lines", False):
        return value
    text = str(value)
    return value if text.isprintable() else one_line(text)


class Stream(io.FileIO):
    """The file descriptor of standard output or error; drops what cannot be written, and raises nothing.

    A full disk, a closed pipe or a terminal that hung up must not end a run. `lost` is the first error, for commands
    whose purpose is their output.
    """

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`, waiting if the descriptor is non-blocking, or drop the rest."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                self.lost = self.lost or error
                return size
            if written is None:
                select.select([], [self], [], 1.0)
            else:
                rest = rest[written:]
        return size


def open_console() -> None:
    """Replace the three standard streams so that printing cannot end this process; call this first.

    A closed descriptor is opened on /dev/null, because otherwise the next file that is opened would get its number, and
    all output. Characters that the encoding lacks are escaped. Streams that something else has replaced, such as a
    test, are left alone.
    """
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    if sys.__stdin__ is None:
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(os.devnull)))  # type: ignore[misc]
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        current = getattr(sys, f"__{name}__")
        if not isinstance(_raw(current), Stream):
            ours = _replacement(current, descriptor)
            if getattr(sys, name) is current:
                setattr(sys, name, ours)
            setattr(sys, f"__{name}__", ours)


def lost_output() -> OSError | None:
    """Flush standard output; returns the error because of which output was dropped, if any."""
    try:
        sys.stdout.flush()
    except OSError as error:  # not a stream of `open_console`
        return error
    raw = _raw(sys.stdout)
    return raw.lost if isinstance(raw, Stream) else None


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
        return
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)  # for the processes that this one starts


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _replacement(stream: Any, descriptor: int) -> TextIO:
    if stream is None:  # it was closed when Python started, and its number may be that of any file now
        return io.TextIOWrapper(io.BufferedWriter(Stream(os.devnull, "w")), "utf-8", "backslashreplace")
    with suppress(OSError, ValueError):
        stream.flush()
    raw = Stream(descriptor, "w", closefd=False)
    _replaced.append(stream)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


_replaced: list[Any] = []  # kept alive for code that holds references to them
