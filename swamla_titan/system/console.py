"""What a terminal or a log is sent: streams that are always there, and text that cannot drive a terminal.

Names of files, values of a configuration, texts of libraries may hold anything: line breaks, the escape sequences of
terminals, characters that the stream's encoding lacks. Standard library only: every process begins with it.
"""

import io
import logging
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

# Control characters, separators of lines, what turns the direction of writing, and bytes of names that are no text.
_OF_DIRECTION = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_OF_DIRECTION, *range(0xD800, 0xE000))
_ONE_LINE = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}
_SEVERAL_LINES = {code: text for code, text in _ONE_LINE.items() if chr(code) not in "\n\t"}


def one_line(text: object) -> str:
    """`text` with every control character escaped, line breaks included; any stream of UTF-8 takes it."""
    return str(text).translate(_ONE_LINE)


def several_lines(text: object) -> str:
    """`text` with every control character escaped but line breaks and tabulators."""
    return str(text).translate(_SEVERAL_LINES)


class Lines(str):
    """Text of several lines on purpose: as an argument of a log line it keeps its line breaks."""


class LogFormatter(logging.Formatter):
    """Formats a record with all that was put into its message escaped: a line of the log stays one line.

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
    """The descriptor of standard output or error. What it does not take is dropped, and nothing is raised.

    A full disk behind it, a reader that has gone, a terminal that hung up are no reason to end a run; `lost` is the
    first error, for commands whose whole purpose is what they print.
    """

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`, waiting where somebody made the descriptor non-blocking, or drop the rest."""
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
    """Make the three standard streams of this process such that nothing printed ends it. Call it first of all.

    A descriptor that is closed is opened on /dev/null, or the next file that is opened would get its number, and what
    is printed would land there. Characters that the encoding lacks are escaped. Streams that something else, a test
    perhaps, has put in place are left alone.
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
    """Flush standard output; the error that it met with, if something printed there was dropped."""
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
    if stream is None:  # it was closed when Python began, and what has its number now may be anybody's file
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


_replaced: list[Any] = []  # kept, for who holds on to the descriptors' own objects
