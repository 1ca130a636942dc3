"""Faults: errors in reading the training data, each with its file and the place in it.

The cause decides what follows: a bad file (DataFault) is skipped with data.on_error = "skip_file"; a network, disk or
server that does not answer (Unreachable) is retried first; where this machine is at fault (of_machine), no file is ever
skipped.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swamla_titan.errors import RunFailed, UserError
from swamla_titan.escaping import one_line as escaped
from swamla_titan.system.machine import PERMANENT, REMEDIES, chain, lack

# Errors that a retry does not resolve: a missing file is reported at once.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# The same by name, because these packages are imported only when they are used, and versions differ in which they use.
_FINAL_NAMES = {
    "OfflineModeIsEnabled",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "FileExpired",
}
_OF_THE_NETWORK = {"aiohttp", "botocore", "fsspec", "gcsfs", "httpcore", "httpx", "requests", "urllib3"}


class Fault(Exception):
    """`file` cannot be read at `place` ("line 21"; "" for the file as a whole), for `reason`.

    `advice` is a sentence on what to do about it. `may_pass`: a retry may help, for example if a network corrupted
    bytes; False for a file that is wrong.
    """

    has_safe_lines = True
    of_machine = False  # this machine is at fault, and no file

    def __init__(self, file: str, place: str, reason: str, advice: str = "", may_pass: bool = False) -> None:
        super().__init__(file, place, reason, advice, may_pass)  # pickle rebuilds it of these in other processes
        self.file, self.place, self.reason, self.advice = file, place, reason, advice
        self.may_pass = may_pass
        self.tried = ""  # how often and how long it was retried, in words

    @property
    def where(self) -> str:
        """File and place."""
        return f"{self.file}, {self.place}" if self.place else self.file

    def __str__(self) -> str:
        tried = f" ({self.tried})" if self.tried else ""
        return escaped(f"{self.where}: {self.reason}{tried}" + (f". {self.advice}" if self.advice else ""))


class DataFault(Fault, UserError):
    """The file is damaged, missing, or not what it should be; waiting does not help."""


class Unreachable(Fault, RunFailed):
    """A network, disk or server does not answer; this may pass, so reading is retried."""

    def __init__(self, file: str, place: str, reason: str, advice: str = "", may_pass: bool = True) -> None:
        super().__init__(file, place, reason, advice, may_pass)


class MachineFault(Unreachable):
    """This machine lacks memory or another resource; this may pass."""

    of_machine = True


class SetupFault(Fault, UserError):
    """This machine does not let the process read until the user raises a limit."""

    of_machine = True


@contextmanager
def readable(path: str, place: str = "") -> Iterator[None]:
    """Turn errors of the operating system inside, which reads `path`, into Faults."""
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
    """The fault if `error` was raised because this machine lacks a resource; None: it has another cause."""
    number = lack(error)
    if number is None:
        return None
    kind = SetupFault if number in PERMANENT else MachineFault
    return kind(path, place, f"cannot be read: {os.strerror(number)}", REMEDIES[number], may_pass=True)


def cut_short(file: str, place: str) -> DataFault:
    """The fault of a file that is shorter than when the run began."""
    return DataFault(file, place, f"the file ends here, at {_size(file)} bytes; it was longer when it was opened")


def of_another_size(file: str, size: int, now_has: int | None = None) -> DataFault:
    """The fault of a file whose size is no longer `size`, as when the run began, but `now_has`."""
    there = _size(file) if now_has is None else now_has
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
    """Turn an error of a library that reads remote files into a Fault."""
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
    if type(error).__name__ in _FINAL_NAMES:
        return True
    return isinstance(error, FileNotFoundError | PermissionError) or (
        isinstance(error, OSError) and error.errno in _FINAL
    )


def _is_of_the_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if packages & _OF_THE_NETWORK:
        return True
    # pyarrow and gzip raise OSError without a number for invalid bytes.
    return isinstance(error, OSError) and error.errno is not None
