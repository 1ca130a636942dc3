"""What this machine lacks, as the operating system says it, and what to do about it.

Standard library only, for it explains also why torch cannot be imported.
"""

import errno
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from swamla_titan.errors import UserError

OPEN_FILES = 65536
_OF_A_PROCESS, _OF_A_WORKER = 64, 8  # open files; with too few the server that forks the workers just dies
SHARED_MEMORY = "/dev/shm"
_OF_SHARED_MEMORY = (
    f"{SHARED_MEMORY} is too small, or cannot be written: make it larger (docker run --shm-size=1g, or --ipc=host), "
    "or read the data in the training process itself (data.num_workers = 0)"
)

# No file and no server is at fault where the operating system answers one of these.
WAYS_OUT = {
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

# What does not pass by waiting, nor by starting again: somebody has to change it.
LASTING = {errno.EMFILE, errno.EROFS, errno.EFBIG}

_NO_TEMPORARY_FOLDER = "No usable temporary directory found"


def lack(error: BaseException) -> int | None:
    """The errno (a key of WAYS_OUT) of what this machine lacked where `error` was raised; None: it is about else."""
    for each in chain(error):
        if isinstance(each, MemoryError):
            return errno.ENOMEM
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno in WAYS_OUT:
                return each.errno
        elif isinstance(each, RuntimeError | ImportError | OSError):
            number = _told_in(str(each))
            if number is not None:
                return number
    return None


def explain(error: BaseException) -> str | None:
    """One line: what this machine lacks, where that was noticed, and the way out; None: `error` is about else."""
    if any(_NO_TEMPORARY_FOLDER in str(each) for each in chain(error) if isinstance(each, FileNotFoundError)):
        return "no folder for temporary files can be written. Set TMPDIR to one that can"
    number = lack(error)
    if number is None:
        return None
    names = [str(each.filename) for each in chain(error) if isinstance(each, OSError) and each.filename is not None]
    what = os.strerror(number) + (f": {names[0]}" if names else "")
    way_out = WAYS_OUT[number]
    if number in (errno.ENOSPC, errno.EROFS, errno.ENOMEM) and _is_about_shared_memory(error, names):
        way_out = _OF_SHARED_MEMORY
    return f"{what} ({_place(error)}). {way_out}"


def allow_open_files_to_train(num_workers: int) -> None:
    """`allow_open_files` for a training process that so many processes read the data for."""
    allow_open_files(_OF_A_PROCESS + num_workers * _OF_A_WORKER)


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as it may; OSError if it may not open `count`.

    The usual limit of 1,024 is for programs of another age that cannot handle more; the hard limit is the system's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with suppress(OSError, ValueError):  # macOS has a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), f"ulimit -n is {wanted}, and a run needs {count}")


def limit_of_files() -> str:
    """Words on the largest file that this process may write; none where nobody has set a limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if limit == resource.RLIM_INFINITY else f", in files of at most {limit:,} bytes (ulimit -f)"


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Makes a UserError of what this machine lacks inside: to start the run again would not mend it."""
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
    """An error, what it was raised from (`contexts`: or what was being handled meanwhile), and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = error.__cause__ or getattr(error, "os_error", None)
        error = cause or (error.__context__ if contexts and not error.__suppress_context__ else None)


def _told_in(text: str) -> int | None:
    """For libraries that pass on no number but the operating system's words."""
    if "can't start new thread" in text:
        return errno.EAGAIN
    if "can't allocate memory" in text or "failed to map segment from shared object" in text:
        return errno.ENOMEM
    return next((number for number in WAYS_OUT if os.strerror(number) in text), None)


def _is_about_shared_memory(error: BaseException, names: list[str]) -> bool:
    if any(name.startswith(SHARED_MEMORY) for name in names) or any(SHARED_MEMORY in str(e) for e in chain(error)):
        return True
    # Semaphores live there; the operating system names no file.
    places = (place for each in chain(error) for place in _places(each))
    return any(path.endswith("multiprocessing/synchronize.py") for path, _ in places)


def _place(error: BaseException) -> str:
    places = _places(error)
    ours = [each for each in places if "/swamla_titan/" in each[0]] or places
    return f"noticed at {os.path.basename(ours[-1][0])}:{ours[-1][1]}" if ours else type(error).__name__


def _places(error: BaseException) -> list[tuple[str, int]]:
    """File and line of each call, without reading any file: there may be no memory, or too many files may be open."""
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
