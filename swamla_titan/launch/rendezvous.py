"""The stores by which the agents of a run find each other, and then its workers.

torchrun's own store listens at every address of its machine, and every agent unpickles the rendezvous state in it,
which any client can set. Here a store listens at one address, and the state is validated.
"""

import io
import logging
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import Token, create_handler

from swamla_titan.errors import RankFailed
from swamla_titan.launch.endpoint import Endpoint, answers, is_address, listen
from swamla_titan.launch.ranks import RESTART_COUNT, RankInfo
from swamla_titan.system.process import RunningTime

logger = logging.getLogger(__name__)

BACKEND = "swamla-titan"
AGENT_CONNECT_TIMEOUT = timedelta(minutes=1)
# For later answers of the agents' store, which does not answer while its process is paused. The heartbeat of agent.py
# detects a lost machine sooner.
AGENT_STORE_TIMEOUT = timedelta(minutes=30)
WORKER_CONNECT_TIMEOUT = 300.0  # seconds; torchrun starts the workers of all machines within seconds of each other
WARN_AFTER = 20.0  # seconds before a worker reports what it waits for
POLL_INTERVAL = 0.05

_DYNAMIC = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_STATE_CLASSES = {
    *((_DYNAMIC, name) for name in ("_RendezvousState", "_NodeDesc")),
    *(("datetime", name) for name in ("datetime", "timedelta", "timezone")),
}


class _StateUnpickler(pickle.Unpickler):
    """Unpickles the classes that a rendezvous state consists of, and no others."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _STATE_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of one")
        return super().find_class(module, name)


class CheckedBackend(C10dRendezvousBackend):
    """torchrun's backend, which validates a rendezvous state before it passes it on."""

    @property
    def name(self) -> str:
        """The name under which torchrun finds it."""
        return BACKEND

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Token] | None:
        decoded = super()._decode_state(base64_state)
        if decoded is not None:
            validate_state(decoded[0])
        return decoded


def validate_state(state: bytes) -> None:
    """Raise RendezvousStateError if unpickling would create or call anything that is not part of a rendezvous state."""
    try:
        _StateUnpickler(io.BytesIO(state)).load()
    except Exception as error:  # invalid pickles raise any kind
        raise RendezvousStateError(
            f"the rendezvous endpoint has something other than the state of a run: {error}"
        ) from None


def open_store(endpoint: Endpoint) -> TCPStore:
    """The agents' store, hosted by this process if the endpoint is on this machine and nobody listens there yet.

    Raises UserError if this machine may not listen there, RendezvousConnectionError if the store does not answer.
    """
    listener = listen(endpoint.address, endpoint.port) if endpoint.here else None
    host, port = (endpoint.address if endpoint.here else endpoint.host), endpoint.port
    if listener:
        port = listener.getsockname()[1]
    try:
        if listener:  # the store closes it
            listen_fd = listener.detach()
            store = TCPStore(host, port, is_master=True, timeout=AGENT_CONNECT_TIMEOUT, master_listen_fd=listen_fd)
        else:
            store = TCPStore(host, port, timeout=AGENT_CONNECT_TIMEOUT)
        store.set_timeout(AGENT_STORE_TIMEOUT)
        return store
    except (ValueError, RuntimeError, TimeoutError) as error:
        raise RendezvousConnectionError(f"{host}:{port}: {error}") from error


def use_store(store: TCPStore) -> None:
    """Register torchrun's backend `BACKEND` as one on this store."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return create_handler(store, CheckedBackend(store, parameters.run_id), parameters)

    rendezvous_handler_registry.register(BACKEND, create)


def connect_workers(here: RankInfo, while_waiting: Callable[[], None]) -> dist.Store:
    """The workers' store, once all ranks are connected. `while_waiting` is called at each poll, and may raise.

    Rank 0 hosts it, unless torchrun's agent does. Raises RankFailed after a timeout, which is shorter than that of
    collectives, because a machine may be lost between torchrun's start and this call. No call blocks in C code, where
    signals are not handled.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"{address}:{port}"
    running = RunningTime(5.0)  # a poll takes 2 s where nobody answers

    def wait(what: str, is_there: Callable[[], bool]) -> None:
        warned = False
        while not is_there():
            while_waiting()
            if running.update() > WORKER_CONNECT_TIMEOUT:
                raise RankFailed(f"rank {here.rank} waited {WORKER_CONNECT_TIMEOUT:g} s in vain for {what}")
            if running.seconds > WARN_AFTER and not warned:
                warned = True
                logger.warning("waiting for %s; if torchrun did not start this process: unset %s", what, RESTART_COUNT)
            time.sleep(POLL_INTERVAL)

    timeout = timedelta(seconds=WORKER_CONNECT_TIMEOUT)
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if here.rank == 0 and not is_shared:
        store = _host_store(address, port, timeout)
    else:
        wait(f"rank 0 at {where}", lambda: answers(address, port, 2.0))
        try:
            store = TCPStore(address, port, wait_for_workers=False, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise RankFailed(f"rank {here.rank} found no store of this run at {where}: {error}") from None
    # Each agent counts its own restarts, so the count is part of the key only if torchrun shares one store among all
    # its starts (not under run_train.sh). Such a store may count too many, and missing ranks are waited for later.
    start = f"{os.environ.get(RESTART_COUNT)}/" if is_shared else ""
    connected = f"swamla-titan/came/{start}{here.size}"
    store.add(connected, 1)
    wait(f"all of {here.size} ranks at {where}", lambda: store.add(connected, 0) >= here.size)
    return store


def _host_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Host the store in this process. run_train.sh gives the numeric address of this machine to listen at."""
    if not is_address(address):
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout)
    listener = listen(address, port)
    if listener is None:
        raise RankFailed(f"another program has taken {address}:{port}, which torchrun found free")
    listen_fd = listener.detach()
    return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listen_fd)
