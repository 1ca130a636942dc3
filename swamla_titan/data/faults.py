"""Faults of the training data, each with its file and the place in it.

What is at fault decides what follows: a file (DataFault) is skipped with data.on_error = "skip_file", a network, disk
or server (Unreachable) is retried first, and for this machine (of_machine) no file is ever skipped.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swamla_titan.errors import RunFailed, UserError
from swamla_titan.escaping import one_line as escaped
from swamla_titan.system.machine import PERMANENT, REMEDIES, chain, lack

# Answers of an operating system that do not change by asking again: a missing file is reported at once.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class Fault(Exception):
    """`file` cannot be read at `place` ("line 21"; "" where it is the whole file), for `reason`.

    `advice` is a sentence on what to do about it. `may_pass`: a retry may help, as with bytes that a network corrupted;
    False for what is plainly there and wrong.
    """

    has_safe_lines = True
    of_machine = False  # no file is at fault

    def __init__(self, file: str, place: str, reason: str, advice: str = "", may_pass: bool = False) -> None:
        super().__init__(file, place, reason, advice, may_pass)  # with these, pickle makes it again in other processes
        self.file, self.place, self.reason, self.advice = file, place, reason, advice
        self.may_pass = may_pass
        self.tried = ""  # how often and how long, in words

    @property
    def where(self) -> str:
        """File and place."""
        return f"{self.file}, {self.place}" if self.place else self.file

    def __str__(self) -> str:
        tried = f" ({self.tried})" if self.tried else ""
        return escaped(f"{self.where}: {self.reason}{tried}" + (f". {self.advice}" if self.advice else ""))


class DataFault(Fault, UserError):
    """The file is damaged, gone, or not what it should be; waiting does not help."""


class Unreachable(Fault, RunFailed):
    """Network, disk or server do not answer. It may pass, so reading is retried."""

    def __init__(self, file: str, place: str, reason: str, advice: str = "", may_pass: bool = True) -> None:
        super().__init__(file, place, reason, advice, may_pass)


class MachineFault(Unreachable):
    """This machine is out of memory or the like. It may pass."""

    of_machine = True


class SetupFault(Fault, UserError):
    """This machine does not let the process read any more, until somebody raises a limit."""

    of_machine = True


@contextmanager
def readable(path: str, place: str = "") -> Iterator[None]:
    """Turn errors of the operating system while reading `path` into the Fault that they are."""
    try:
        yield
    except OSError as error:
        raise refused(path, place, error) from error


def refused(path: str, place: str, error: OSError) -> Fault:
    """The fault for an error of the operating system with `path`."""
    kind = DataFault if error.errno in _FINAL else Unreachable
    return fault_of_machine(path, place, error) or kind(
        path, place, f"cannot be read: {error.strerror or one_line(error)}"
    )


def fault_of_machine(path: str, place: str, error: BaseException) -> Fault | None:
    """The fault if `error` was raised because this machine lacks something; None: it has another cause."""
    number = lack(error)
    if number is None:
        return None
    kind = SetupFault if number in PERMANENT else MachineFault
    return kind(path, place, f"cannot be read: {os.strerror(number)}", REMEDIES[number], may_pass=True)


def cut_short(file: str, place: str) -> DataFault:
    """The fault of a file that ends before it did when the run began."""
    return DataFault(file, place, f"the file ends here, at {_size(file)} bytes; it was longer when it was opened")


def of_another_size(file: str, size: int) -> DataFault:
    """The fault of a file that has not the `size` which it had when the run began."""
    there = _size(file)
    now = "it is gone" if there < 0 else f"it has {there} bytes"
    return DataFault(file, "", f"{now}; when the run began, it had {size}", "Put the file back as it was")


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        return -1


def one_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, or its name."""
    return next((line[:most] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def with_name(error: BaseException) -> str:
    """An error's name and the first line of its message."""
    name = type(error).__name__
    return f"{name}: {one_line(error)}" if str(error).strip() else name


def network_fault(file: str, place: str, error: Exception) -> Fault:
    """What a library that reads remote files raised, as the kind of Fault that it is."""
    reason = with_name(error)
    if fault := fault_of_machine(file, place, error):
        return fault
    for each in chain(error, contexts=False):
        if _is_final(each):
            return DataFault(file, place, f"cannot be read: {reason}")
        if _is_of_the_network(each):
            return Unreachable(file, place, f"reading stopped: {reason}")
    return DataFault(file, place, f"cannot be read: {reason}", may_pass=True)


def _status(error: BaseException) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def _is_final(error: BaseException) -> bool:
    """Whether a retry cannot help: no such file, no permission, offline by the user's own setting."""
    status = _status(error)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)  # too slow, too early, too often
    if type(error).__name__ == "OfflineModeIsEnabled":
        return True
    return isinstance(error, OSError) and (error.errno in _FINAL or isinstance(error, FileNotFoundError))


def _is_of_the_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # By name: these libraries are imported when they are used, and which of them is, depends on versions.
    rooms = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if rooms & {"aiohttp", "httpcore", "httpx", "requests", "urllib3", "fsspec"}:
        return True
    # pyarrow and gzip use OSError without a number for bytes that make no sense.
    return isinstance(error, OSError) and error.errno is not None
