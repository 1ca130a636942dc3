"""The folder that receives everything a run writes."""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from swamla_titan.errors import UserError
from swamla_titan.train.line_file import LineFileHandler

LOCK = ".lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs, which would commit and delete each other's checkpoints.

    The operating system lets go when the process ends, however it ends. Raises UserError if another process holds it,
    or if the folder cannot be made. A folder made here in which nothing was written is removed again.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise _unusable(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder, lock) from None
        with suppress(OSError):  # on a full disk it is held all the same, without a name in it
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # whatever has become of the folder meanwhile
                if is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def refuse_folder(folder: Path) -> None:
    """Raise UserError where `exclusive` or `prepare_folder` would, as far as that can be seen without writing."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir():
        raise _unusable(folder, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(existing)))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    for name, is_folder in {"checkpoints": True, "logs": True, "metrics.jsonl": False, "config.toml": False}.items():
        path = folder / name
        if path.exists() and path.is_dir() != is_folder:
            kind = FileExistsError if is_folder else IsADirectoryError
            raise _unusable(folder, kind(0, "Is a directory", str(path)))
    if (folder / LOCK).exists():
        with (folder / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(folder, lock) from None


def _busy(folder: Path, lock: TextIO) -> UserError:
    lock.seek(0)
    return UserError(
        f"job.dump_folder = {folder}: another run writes there ({lock.read().strip()}); "
        "wait for its end or stop it, or choose another folder"
    )


def _unusable(folder: Path, error: OSError) -> UserError:
    reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
    return UserError(f"job.dump_folder = {folder}: cannot be written ({reason})")


def prepare_folder(folder: Path, config_text: str) -> None:
    """Make the dump folder and write the resolved configuration; raises UserError where that is impossible.

    What else will be written there is tried first, so that a folder in which a run cannot work is left as it is; and
    the configuration takes the place of the one before only when it is whole.
    """
    config, new = folder / "config.toml", folder / ".config.toml.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "logs"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "metrics.jsonl").open("a").close()
        if config.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(config))
        new.write_text(config_text)
        new.replace(config)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise _unusable(folder, error) from None


def log_to_folder(folder: Path, rank: int) -> None:
    """Also append log lines to logs/rank-N.log under the dump folder; raises UserError where that is impossible."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handler = LineFileHandler(folder / "logs" / f"rank-{rank}.log")
    except OSError as error:
        raise _unusable(folder, error) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("swamla_titan").addHandler(handler)
