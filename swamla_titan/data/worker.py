"""Loader processes: each reads its part of the steps ahead of the trainer, and ends with it.

A fork server makes them: forking the training process itself would copy its threads' locks and its CUDA state, and
starting each process from nothing would import torch once per process. The server imports once, and because the
processes are no children of the trainer's, one that dies interrupts nothing.

torch's DataLoader and torchdata's are not used, because a stop must end what hangs in a read: they end their workers by
an Event whose lock a worker that was killed may hold, and then hang themselves (a comment in `_shutdown_workers` of
torch/utils/data/dataloader.py says so). Nothing public of theirs goes around that.
"""

import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Generic, TypeVar

from swamla_titan.errors import RunFailed, UserError
from swamla_titan.system.console import LogFormatter, open_console
from swamla_titan.system.machine import needed
from swamla_titan.system.process import wait_for_end

PREFETCH_STEPS = 4  # that a process may be ahead of what was taken from it
_LONGEST_TEMPORARY_FOLDER = 107 - 32  # bytes
_NEXT = b"next"
_LONGEST_END = 5.0  # seconds from the end of a process's output to its own

Part = TypeVar("Part")


class LoaderProcess(Generic[Part]):
    """A process that iterates over `parts`, at most PREFETCH_STEPS ahead of `receive`, until `kill`."""

    def __init__(self, parts: Iterable[Part]) -> None:
        context = _fork_server()
        self._connection, other_end = context.Pipe()
        try:
            with other_end:  # the process has its own copy; while this one is open, the process's end would not be seen
                self.process = context.Process(target=_read_ahead, args=(os.getpid(), parts, other_end), daemon=True)
                self.process.start()
        except BaseException:
            self._connection.close()
            raise

    def receive(self) -> Part:
        """The next part; raises RunFailed if the process is gone, and what the iteration raised."""
        try:
            self._connection.send_bytes(_NEXT)
            part = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_LONGEST_END)
            code = "" if self.process.exitcode is None else f" (exit code {self.process.exitcode})"
            raise RunFailed(
                f"A data loader process ended unexpectedly{code}. Mostly the machine is out of memory: look at the "
                "kernel's log, lower data.num_workers or data.shuffle_documents, and resume from the last checkpoint."
            ) from error
        if isinstance(part, _Broken):
            raise RuntimeError(f"in a data loader process:\n{part.traceback}")
        return part

    def kill(self) -> None:
        """End the process at once; a thread that waits in `receive` is released."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Free what it held, after `kill`."""
        self._connection.close()
        self.process.close()


@dataclass
class _Broken:
    """Sent instead of a part, where a fault of the program ended the iteration."""

    traceback: str


def _read_ahead(trainer: int, parts: Iterable[object], connection: Connection) -> None:
    """What a loader process does; `trainer` is the PID of the training process."""
    _settle(trainer)
    ahead: queue.Queue[object] = queue.Queue(PREFETCH_STEPS - 1)
    threading.Thread(target=_send, args=(ahead, connection), daemon=True, name="sender").start()
    try:
        for part in parts:
            ahead.put(part)  # with one more part at hand, it waits until there is room
    except Exception:
        ahead.put(_Broken(traceback.format_exc()))
    threading.Event().wait()  # until it is killed, because the sender is not done


def _send(ahead: "queue.Queue[object]", connection: Connection) -> None:
    """Send a part for each request; the process ends if nobody can ask any more.

    Without requests, as many parts as fit in the pipe would be read ahead: hundreds of short ones.
    """
    try:
        with suppress(EOFError, OSError):
            while connection.recv_bytes() == _NEXT:
                connection.send(ahead.get())
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def _settle(trainer: int) -> None:
    """Ignore the signals that reach all processes of the job, and end with the training process.

    Ctrl-C and a scheduler's SIGTERM or SIGUSR1 reach all processes; what follows from them is decided in the training
    process, which still needs its batches until the last step is saved. It kills the loader processes itself; where it
    is killed before it can, they end themselves.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open_console()
    if logging.lastResort is not None:  # what is logged here goes to standard error, by no handler of its own
        logging.lastResort.setFormatter(LogFormatter())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process, because their number is the user's to choose
    # The parent is the fork server, which lives as long as its processes do.
    threading.Thread(target=_end_with, args=(trainer,), daemon=True, name="trainer-watch").start()


def _end_with(trainer: int) -> None:
    """End this process as soon as the process `trainer` is gone."""
    wait_for_end(trainer)
    os._exit(1)


def prepare_workers(count: int) -> None:
    """Let the fork server of the loader's `count` processes begin to start, which takes seconds.

    Nothing waits for it; without this call the first loader starts it. Raises UserError as a loader does.
    """
    if count:
        with needed("the processes that read the data cannot be started"):
            _fork_server()
        with suppress(OSError):  # the loader's own start will report it
            multiprocessing.forkserver.ensure_running()


def _fork_server() -> ForkServerContext:
    _make_sockets_where_their_names_fit()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["swamla_titan.data.loader"])
    return context


def _make_sockets_where_their_names_fit() -> None:
    """Let multiprocessing keep its sockets in /tmp where the folder for temporary files has too long a name.

    The name of a socket has 107 bytes at most, of which Python takes 32, and clusters like to name TMPDIR after jobs.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_TEMPORARY_FOLDER:
        return
    kept, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # made once, and remembered
    except OSError as error:
        raise UserError(
            f"the loader's processes talk through sockets, whose names are too long in {usual}, and there can be "
            f"none in /tmp ({error.strerror}). Set TMPDIR to a folder of at most {_LONGEST_TEMPORARY_FOLDER} bytes"
        ) from error
    finally:
        tempfile.tempdir = kept
