"""Loader processes: each reads its part of the steps ahead of the trainer, and ends when the trainer ends.

A fork server starts them, because a fork of the training process would copy its threads' locks and its CUDA state, and
a spawned process would import torch each time. The server imports once, and because the processes are not children of
the trainer, one that dies interrupts nothing.

The DataLoaders of torch and torchdata are not used, because a stop must end a process that hangs in a read. They end
their workers by an Event whose lock a killed worker may hold, and then hang themselves (see the comment in
`_shutdown_workers` of torch/utils/data/dataloader.py), and have no public way around that.
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

PREFETCH_STEPS = 4  # that a process may read ahead
_LONGEST_TEMPORARY_FOLDER = 107 - 32  # bytes
_NEXT = b"next"
_LONGEST_END = 5.0  # seconds from the end of a process's output to its own

Part = TypeVar("Part")


class LoaderProcess(Generic[Part]):
    """A process that iterates over `parts`, at most PREFETCH_STEPS ahead of `receive`, until `kill`."""

    def __init__(self, parts: Iterable[Part]) -> None:
        context = fork_server()
        self._connection, other_end = context.Pipe()
        try:
            with other_end:  # the process has its own copy; while this one is open, its end would not be noticed
                self.process = context.Process(target=_read_ahead, args=(os.getpid(), parts, other_end), daemon=True)
                self.process.start()
        except BaseException:
            self._connection.close()
            raise

    def receive(self) -> Part:
        """The next part; raises RunFailed if the process has ended, RuntimeError with what the iteration raised."""
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
        """Kill the process; a thread that waits in `receive` is released."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Free its resources, after `kill`."""
        self._connection.close()
        self.process.close()


@dataclass
class _Broken:
    """Sent instead of a part if a bug ended the iteration."""

    traceback: str


def _read_ahead(trainer: int, parts: Iterable[object], connection: Connection) -> None:
    """The main function of a loader process; `trainer` is the PID of the training process."""
    settle(trainer)
    ahead: queue.Queue[object] = queue.Queue(PREFETCH_STEPS - 1)
    threading.Thread(target=_send, args=(ahead, connection), daemon=True, name="sender").start()
    try:
        for part in parts:
            ahead.put(part)  # waits, with one more part in hand, until there is room
    except Exception:
        ahead.put(_Broken(traceback.format_exc()))
    threading.Event().wait()  # until it is killed, because the sender still sends


def _send(ahead: "queue.Queue[object]", connection: Connection) -> None:
    """Send a part for each request; end the process when the other end of the connection is closed.

    Without requests it would read ahead as many parts as fit in the pipe: hundreds of short ones.
    """
    try:
        with suppress(EOFError, OSError):
            while connection.recv_bytes() == _NEXT:
                connection.send(ahead.get())
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def settle(trainer: int) -> None:
    """Ignore the signals that reach all processes of the job, and end with the training process.

    Ctrl-C and a scheduler's SIGTERM or SIGUSR1 reach all processes. The training process decides what follows, and
    needs batches until the last step is saved. It kills the loader processes itself; if it is killed before it can,
    they end themselves.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open_console()
    if logging.lastResort is not None:  # what is logged here goes to standard error, by no handler of its own
        logging.lastResort.setFormatter(LogFormatter())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; data.num_workers sets the number
    # The parent is the fork server, which lives as long as its processes do.
    threading.Thread(target=_end_with, args=(trainer,), daemon=True, name="trainer-watch").start()


def _end_with(trainer: int) -> None:
    """End this process as soon as the process `trainer` is gone."""
    wait_for_end(trainer)
    os._exit(1)


def prepare_workers(count: int) -> None:
    """Start the fork server for `count` loader processes without waiting for it, because its start takes seconds.

    Without this call the first loader starts it. Raises UserError as a loader does.
    """
    if count:
        with needed("the processes that read the data cannot be started"):
            fork_server()
        with suppress(OSError):  # the loader's own start will report it
            multiprocessing.forkserver.ensure_running()


def fork_server() -> ForkServerContext:
    _make_sockets_where_their_names_fit()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["swamla_titan.data.loader"])
    return context


def _make_sockets_where_their_names_fit() -> None:
    """Make multiprocessing keep its sockets in /tmp if the name of the temporary folder is too long.

    The name of a socket has at most 107 bytes, of which Python needs 32, and clusters often name TMPDIR after jobs.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_TEMPORARY_FOLDER:
        return
    kept, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # created once and cached
    except OSError as error:
        raise UserError(
            f"the loader's processes talk through sockets, whose names are too long in {usual}, and there can be "
            f"none in /tmp ({error.strerror}). Set TMPDIR to a folder of at most {_LONGEST_TEMPORARY_FOLDER} bytes"
        ) from error
    finally:
        tempfile.tempdir = kept
