"""The folder that a run writes everything to: locked by one run at a time, validated, prepared."""

import errno
import fcntl
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from swamla_titan.errors import RunFailed, UserError
from swamla_titan.system.console import LogFormatter
from swamla_titan.system.events import EVENTS, open_events
from swamla_titan.system.line_file import LineFileHandler

LOCK = ".lock"
LEAVING = 300.0  # seconds; a file server releases the locks of a dead machine after 45 to 120
_ATTEMPTS = 20
_MOST = 1000  # characters that a holder writes about itself
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE}  # the last: a file server's, of a removed file
_RUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it to the same value for all starts and machines of a run

logger = logging.getLogger(__name__)


class FolderLost(RunFailed):
    """The dump folder no longer belongs to this run, which must not write there."""


class Hold:
    """A dump folder that this process holds: it has a lock on the file LOCK in it, as long as the file is open."""

    def __init__(self, folder: Path, lock: TextIO) -> None:
        self._folder, self._lock = folder, lock

    @property
    def is_lost(self) -> bool:
        """Whether the file LOCK is no longer the locked one, because it or the folder was removed or moved.

        Cheap enough for every step that is logged. False if a file server does not answer.
        """
        held = os.fstat(self._lock.fileno())
        try:
            there = os.lstat(self._folder / LOCK)
        except OSError as error:
            return error.errno in _GONE
        return (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino)

    def require(self) -> None:
        """Raise FolderLost if the folder is lost."""
        if self.is_lost:
            raise FolderLost(
                f"job.dump_folder = {self._folder} was removed, moved or taken by another run while this one trained: "
                f"{self._found()}. This run ends, and writes nothing more there. If another run is at work there, "
                "leave it the folder; otherwise put it back and start the same command again, which continues from the "
                "newest checkpoint that is there"
            )

    def _found(self) -> str:
        try:
            with _open_lock(self._folder, create=False) as other:
                return f"its {LOCK} is another one ({_holder(other) or 'of nobody'})"
        except (OSError, ValueError):
            return f"its {LOCK} is gone"


@contextmanager
def exclusive(folder: Path) -> Iterator[Hold]:
    """Lock the folder against other runs, because two runs would remove each other's checkpoints.

    The operating system releases the lock when the process ends, however it ends; a file server releases those of a
    lost machine after a minute or two. So this waits up to `LEAVING` seconds for an earlier process of the same run.

    Raises UserError if another process holds the folder, or if it cannot be made. A folder that it made is removed at
    the end if nothing was written there.
    """
    is_new = not folder.exists()
    hold, lock = _held(folder)
    with lock:
        with suppress(OSError):  # on a full disk the folder is locked all the same, without the holder's name
            lock.truncate(0)
            holder = f"process {os.getpid()} on {platform.node()}" + (f"\n{_run()}" if _run() else "")
            os.pwrite(lock.fileno(), holder.encode(), 0)
        try:
            yield hold
        finally:
            with suppress(OSError):  # the folder may be gone
                if is_new and not hold.is_lost and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def _held(folder: Path) -> tuple[Hold, TextIO]:
    """Lock the folder; also returns the lock's file."""
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _open_lock(folder)
        except OSError as error:
            raise _unusable(folder, error) from None
        hold = Hold(folder, lock)
        try:
            _acquire(lock, folder)
            if not hold.is_lost:
                return hold, lock
            # The holder before has removed it meanwhile, with a folder in which nothing was written.
        except BaseException:
            lock.close()
            raise
        lock.close()
    raise _unusable(folder, OSError(errno.EAGAIN, f"its file {LOCK} is another one each time it is looked at"))


def _open_lock(folder: Path, create: bool = True) -> TextIO:
    """Open the file LOCK; OSError also if it is no regular file, or a link, whose target would be overwritten."""
    path = folder / LOCK
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a symbolic link", str(path))
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is no regular file", str(path))
    return os.fdopen(descriptor, "r+" if create else "r", errors="replace")


def _acquire(lock: TextIO, folder: Path) -> None:
    end = time.monotonic() + LEAVING
    warned = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _unusable(folder, error) from None
            logger.warning(
                "the file system of job.dump_folder = %s has no locks (%s): nothing keeps another run from writing "
                "there at the same time, so see to it that none does",
                folder,
                error.strerror,
            )
            return
        if not _is_of_this_run(lock) or time.monotonic() > end:
            raise _busy(folder, lock)
        if not warned:
            logger.warning("waiting for %s, which an earlier start of this run still holds: %s", folder, _holder(lock))
            warned = True
        time.sleep(0.2)


def _run() -> str:
    # With the rendezvous endpoint, because RDZV_ID has the same default for all runs.
    return " at ".join(filter(None, (os.environ.get(_RUN), os.environ.get("RDZV_ENDPOINT"))))


def _is_of_this_run(lock: TextIO) -> bool:
    lock.seek(0)
    return bool(_run()) and lock.read(_MOST).splitlines()[1:] == [_run()]


def _holder(lock: TextIO) -> str:
    """The line that the process that holds the folder wrote about itself."""
    lock.seek(0)
    return next(iter(lock.read(_MOST).splitlines()), "")


def validate_folder(folder: Path) -> None:
    """Raise UserError for what would make `prepare_folder` fail, as far as that is found without writing."""
    files = ("metrics.jsonl", EVENTS, "config.toml")
    for name, is_folder in {"checkpoints": True, "logs": True, **dict.fromkeys(files, False)}.items():
        path = folder / name
        if path.exists() and path.is_dir() != is_folder:
            kind = FileExistsError if is_folder else IsADirectoryError
            raise _unusable(folder, kind(0, "Is a directory", str(path)))
    try:
        _require_no_pipes(folder)
    except OSError as error:
        raise _unusable(folder, error) from None


def validate_exclusive(folder: Path) -> None:
    """Raise UserError for what would make `exclusive` fail, as far as that is found without writing."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir():
        raise _unusable(folder, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(existing)))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if os.path.lexists(folder / LOCK):
        try:
            lock = _open_lock(folder, create=False)
        except OSError as error:
            raise _unusable(folder, error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(folder, lock) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise _unusable(folder, error) from None


def _require_no_pipes(folder: Path) -> None:
    """Raise OSError if a file of the run is a pipe or a socket, because a write there waits for a reader."""
    for path in (folder / "metrics.jsonl", folder / EVENTS, *(folder / "logs").glob("rank-*.log")):
        if path.is_fifo() or path.is_socket():
            raise OSError(errno.EINVAL, f"{path} is no regular file", str(path))


def _busy(folder: Path, lock: TextIO) -> UserError:
    return UserError(
        f"job.dump_folder = {folder}: another run writes there ({_holder(lock)}); "
        "wait for its end or stop it, or choose another folder"
    )


def _unusable(folder: Path, error: OSError) -> UserError:
    reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
    return UserError(f"job.dump_folder = {folder}: cannot be written ({reason})")


def prepare_folder(folder: Path, config_text: str) -> None:
    """Make the dump folder and write the resolved configuration; raises UserError if that is impossible.

    Tries the other files first, so that a folder in which a run cannot work is left as it is. The configuration
    replaces the one before in a single rename.
    """
    config, new = folder / "config.toml", folder / ".config.toml.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "logs"):
            (folder / name).mkdir(exist_ok=True)
        _require_no_pipes(folder)
        (folder / "metrics.jsonl").open("a").close()
        if config.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(config))
        new.unlink(missing_ok=True)  # of an earlier start; also a link or a pipe, which must not be written to
        with new.open("x", encoding="utf-8") as file:
            file.write(config_text)
        new.replace(config)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise _unusable(folder, error) from None


@contextmanager
def early_records_kept() -> Iterator[None]:
    """Keep the log lines of a start in memory until `log_to_folder` has a file for them; drop them if it never has.

    What a run resumes from, and what differs, is found before anything is written to the dump folder.
    """
    early = MemoryHandler(capacity=0, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    logging.getLogger("swamla_titan").addHandler(early)
    try:
        yield
    finally:
        logging.getLogger("swamla_titan").removeHandler(early)


def log_to_folder(folder: Path, rank: int, events: bool) -> None:
    """Append log lines also to logs/rank-N.log in the dump folder, and with `events` on rank 0 those to events.jsonl.

    Raises UserError if that is impossible.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handler = LineFileHandler(folder / "logs" / f"rank-{rank}.log")
        if events and rank == 0:
            open_events(folder)
    except OSError as error:
        raise _unusable(folder, error) from None
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("swamla_titan")
    for early in [each for each in ours.handlers if isinstance(each, MemoryHandler)]:
        ours.removeHandler(early)
        early.setTarget(handler)
        early.flush()
    ours.addHandler(handler)
