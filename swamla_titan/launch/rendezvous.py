"""torchrun's rendezvous as this program has it: the store listens at one address, and what is in it runs no code.

torchrun's own store listens at every address of the machine that holds it, and the state of the rendezvous, which any
client can set, is unpickled by every agent.
"""

import io
import pickle
from datetime import timedelta

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

from swamla_titan.launch.endpoint import Endpoint, listen

BACKEND = "swamla-titan"
TO_MEET = timedelta(minutes=1)
# Of an answer of the store, later. While the process that holds it is paused there is none; a machine that is lost is
# noticed sooner, by the vigil of agent.py.
TO_ANSWER = timedelta(minutes=30)

_DYNAMIC = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_IN_A_STATE = {
    *((_DYNAMIC, name) for name in ("_RendezvousState", "_NodeDesc")),
    *(("datetime", name) for name in ("datetime", "timedelta", "timezone")),
}


class _StateReader(pickle.Unpickler):
    """Reads what a state of the rendezvous consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _IN_A_STATE:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of it")
        return super().find_class(module, name)


class CheckedBackend(C10dRendezvousBackend):
    """torchrun's backend, which hands on only what is a state of the rendezvous."""

    @property
    def name(self) -> str:
        """What torchrun asked for."""
        return BACKEND

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Token] | None:
        decoded = super()._decode_state(base64_state)
        if decoded is not None:
            check_state(decoded[0])
        return decoded


def check_state(state: bytes) -> None:
    """Raises RendezvousStateError if unpickling these bytes would make or call what no rendezvous has."""
    try:
        _StateReader(io.BytesIO(state)).load()
    except Exception as error:  # of bytes that are no pickle it may be any
        raise RendezvousStateError(f"what lies at the meeting point is no state of a run: {error}") from None


def open_store(point: Endpoint) -> TCPStore:
    """The store at the meeting point, held by this process if it is on this machine and nobody holds it yet.

    Raises UserError if this machine may not listen there, RendezvousConnectionError if the store does not answer.
    """
    listener = listen(point.address, point.port) if point.here else None
    host, port = (point.address if point.here else point.host), point.port
    if listener:
        port = listener.getsockname()[1]
    try:
        if listener:  # the store closes it
            store = TCPStore(host, port, is_master=True, timeout=TO_MEET, master_listen_fd=listener.detach())
        else:
            store = TCPStore(host, port, timeout=TO_MEET)
        store.set_timeout(TO_ANSWER)
        return store
    except (ValueError, RuntimeError, TimeoutError) as error:
        raise RendezvousConnectionError(f"{host}:{port}: {error}") from error


def use_store(store: TCPStore) -> None:
    """From here on torchrun's backend `BACKEND` is one on this store."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return create_handler(store, CheckedBackend(store, parameters.run_id), parameters)

    rendezvous_handler_registry.register(BACKEND, create)
