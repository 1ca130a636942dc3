"""Explains errors of the operating system: which resource this machine lacks, and a remedy.

Standard library only, because it also explains why torch cannot be imported.
"""

import errno
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from swamla_titan.errors import UserError

OPEN_FILES = 65536
_FILES_OF_A_PROCESS, _FILES_OF_A_WORKER = 64, 8  # open files; with too few the server that forks the workers dies
SHARED_MEMORY = "/dev/shm"
_SHARED_MEMORY_REMEDY = (
    f"{SHARED_MEMORY} is too small, or cannot be written: make it larger (docker run --shm-size=1g, or --ipc=host)"
)

# Errors that are a lack of resources, and not a fault of a file or server.
REMEDIES = {
    errno.EMFILE: "This process may open no more files: raise the limit (ulimit -n 65536), or lower data.num_workers",
    errno.ENFILE: "All programs of this machine together have too many files open: close some, or raise fs.file-max",
    errno.ENOMEM: "This machine, or the limit set for the process (ulimit -v, a container's), has no more memory: "
    "lower data.num_workers or data.shuffle_documents, or end other programs",
    errno.ENOBUFS: "This machine has no more memory for connections: end other programs",
    errno.EAGAIN: "No more processes or threads may be started: raise the limit (ulimit -u, a container's limit of "
    "processes), or lower data.num_workers and OMP_NUM_THREADS",
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there, or have the quota raised",
    errno.EROFS: "Mount it writable, or choose another folder",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f)",
}

# Errors that neither a retry nor a restart resolves.
PERMANENT = {errno.EMFILE, errno.EROFS, errno.EFBIG}

_NO_TEMPORARY_FOLDER = "No usable temporary directory found"


def lack(error: BaseException) -> int | None:
    """The errno (a key of REMEDIES) of the resource that this machine lacked when `error` was raised, or None."""
    for each in chain(error):
        if isinstance(each, MemoryError):
            return errno.ENOMEM
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno in REMEDIES:
                return each.errno
        elif isinstance(each, RuntimeError | ImportError | OSError):
            number = _errno_in_text(str(each))
            if number is not None:
                return number
    return None


def explain(error: BaseException) -> str | None:
    """One line: the resource that this machine lacks, where in the code, and a remedy; None for other errors."""
    if any(_NO_TEMPORARY_FOLDER in str(each) for each in chain(error) if isinstance(each, FileNotFoundError)):
        return "no folder for temporary files can be written. Set TMPDIR to one that can"
    number = lack(error)
    if number is None:
        return None
    names = [str(each.filename) for each in chain(error) if isinstance(each, OSError) and each.filename is not None]
    what = os.strerror(number) + (f": {names[0]}" if names else "")
    remedy = REMEDIES[number]
    if number in (errno.ENOSPC, errno.EROFS, errno.ENOMEM) and _is_about_shared_memory(error, names):
        remedy = _SHARED_MEMORY_REMEDY
    return f"{what} ({_noticed_at(error)}). {remedy}"


def allow_open_files(num_workers: int) -> None:
    """Raise this process's limit of open files as far as allowed.

    Raises OSError if that is too low for a training process with this many data workers. The usual soft limit of 1,024
    is meant for programs that use select(); the hard limit is the system's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with suppress(OSError, ValueError):  # macOS has a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    count = _FILES_OF_A_PROCESS + num_workers * _FILES_OF_A_WORKER
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), f"ulimit -n is {wanted}, and a run needs {count}")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_of_files() -> str:
    """A clause on the largest file that this process may write; empty without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if limit == resource.RLIM_INFINITY else f", in files of at most {limit:,} bytes (ulimit -f)"


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Turns a lack of resources inside into a UserError, because a restart would not resolve it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}") from error


def chain(error: BaseException | None, contexts: bool = True) -> Iterator[BaseException]:
    """An error, its cause (with `contexts` also the error that was being handled), and their causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = error.__cause__ or getattr(error, "os_error", None)
        error = cause or (error.__context__ if contexts and not error.__suppress_context__ else None)


def _errno_in_text(text: str) -> int | None:
    """The errno in the message of a library that passes on only the operating system's text."""
    if "can't start new thread" in text:
        return errno.EAGAIN
    if "can't allocate memory" in text or "failed to map segment from shared object" in text:
        return errno.ENOMEM
    return next((number for number in REMEDIES if os.strerror(number) in text), None)


def _is_about_shared_memory(error: BaseException, names: list[str]) -> bool:
    if any(name.startswith(SHARED_MEMORY) for name in names) or any(SHARED_MEMORY in str(e) for e in chain(error)):
        return True
    # Semaphores are in shared memory too, but the operating system names no file.
    calls = (call for each in chain(error) for call in _calls(each))
    return any(path.endswith("multiprocessing/synchronize.py") for path, _ in calls)


def _noticed_at(error: BaseException) -> str:
    calls = _calls(error)
    ours = [each for each in calls if "/swamla_titan/" in each[0]] or calls
    return f"noticed at {os.path.basename(ours[-1][0])}:{ours[-1][1]}" if ours else type(error).__name__


def _calls(error: BaseException) -> list[tuple[str, int]]:
    """File and line of each call, without opening any file: memory or file descriptors may be exhausted."""
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
