"""The store at which the processes of a run meet when they start: rank 0 holds it, and waits for the others to come."""

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from swamla_titan.errors import RankFailed
from swamla_titan.launch.endpoint import is_address, listen
from swamla_titan.launch.worker import MARK, Place
from swamla_titan.system.running_time import RunningTime

logger = logging.getLogger(__name__)

TO_MEET = 300.0  # seconds; torchrun starts the processes of all machines within seconds of each other
PATIENT = 20.0  # seconds before a process says what it waits for
LOOK = 0.05


def meet(here: Place, between_looks: Callable[[], None]) -> dist.Store:
    """The store of all ranks, when all have come. `between_looks` is called all the while, and may raise.

    Raises RankFailed if they do not come. A machine that is lost between torchrun's start and here is not waited for as
    long as the slowest collective may take; and no call waits in C code, where signals are not heard.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"{address}:{port}"
    running = RunningTime(5.0)  # a look takes 2 s where nobody answers

    def wait(what: str, there: Callable[[], bool]) -> None:
        told = False
        while not there():
            between_looks()
            if running.look() > TO_MEET:
                raise RankFailed(f"rank {here.rank} waited {TO_MEET:g} s in vain for {what}")
            if running.seconds > PATIENT and not told:
                told = True
                logger.warning("waiting for %s; if torchrun did not start this process: unset %s", what, MARK)
            time.sleep(LOOK)

    if here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = _hold(address, port)
    else:
        wait(f"rank 0 at {where}", lambda: _answers(address, port))
        try:
            store = dist.TCPStore(address, port, wait_for_workers=False, timeout=timedelta(seconds=TO_MEET))
        except (RuntimeError, ValueError) as error:
            raise RankFailed(f"rank {here.rank} found no store of this run at {where}: {error}") from None
    # torchrun may use one store for all its starts: then this counts too many, and those who miss are waited for later.
    came = f"swamla-titan/came/{os.environ.get(MARK)}/{here.size}"
    store.add(came, 1)
    wait(f"all of {here.size} ranks at {where}", lambda: store.add(came, 0) >= here.size)
    return store


def _hold(address: str, port: int) -> dist.TCPStore:
    """The store in this process. By a number, run_train.sh says at which address of this machine to listen."""
    if not is_address(address):
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TO_MEET))
    listener = listen(address, port)
    if listener is None:
        raise RankFailed(f"another program has taken {address}:{port}, which torchrun found free")
    timeout = timedelta(seconds=TO_MEET)
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True
