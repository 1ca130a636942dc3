"""The elastic agent of a machine: torchrun, adapted to this program's workers and to machines that join and leave.

usage: python -m swamla_titan.launch.agent TORCHRUN_ARGUMENT ...

What differs from `python -m torch.distributed.run`:
- Machines find each other by their routes and not by their host names, see endpoint.py.
- Its store listens at one address, the loopback address if the run has one machine, see rendezvous.py.
- Settings of torchrun in the environment (PET_...) are ignored, because they belong to another start.
- A machine may start before the one that hosts the rendezvous endpoint.
- When a machine joins, torchrun stops all workers to start them again as one larger group (re-rendezvous). A file in
  the launch folder lets them distinguish this from the user's stop, and they have 10 minutes to save; torchrun would
  give them 30 seconds.
- If the endpoint stops answering without closing its connections, torchrun waits for a quarter of an hour or forever.
  Here a heartbeat ends it after a minute, and run_train.sh ends the workers.
- An error that ends torchrun itself is reported in one message.
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed.launcher.api as launcher_api
import torch.distributed.run as torchrun
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousTimeoutError,
)

from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, UserError
from swamla_titan.launch.endpoint import (
    Endpoint,
    answers,
    is_loopback,
    local_endpoint,
    resolve_endpoint,
    wait_for_endpoint,
)
from swamla_titan.launch.rendezvous import BACKEND, open_store, use_store
from swamla_titan.launch.worker import any_bad_input, re_rendezvous
from swamla_titan.system.console import open_console
from swamla_titan.system.machine import needed
from swamla_titan.system.process import RunningTime

logger = logging.getLogger(__name__)

ENDPOINT_TIMEOUT = timedelta(minutes=10)  # as long as torchrun waits for enough machines
SAVE_TIMEOUT = timedelta(minutes=10)  # then workers are killed, and resume from the last checkpoint
HEARTBEAT_TIMEOUT = 60.0  # seconds that the endpoint may not answer
HEARTBEAT_INTERVAL = 5.0
KEPT = ("PET_RDZV_CONF", "PET_MONITOR_INTERVAL", "PET_NUMA_BINDING")  # run_train.sh has no variable for these


class Agent(LocalElasticAgent):
    """Starts, monitors and stops the workers of this machine."""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # Healthy workers are stopped because machines wait to join, and not because one of them failed.
        if worker_group.state == WorkerState.HEALTHY and self._pcontext is not None:
            with re_rendezvous():
                self._pcontext.close(signal.SIGTERM, timeout=int(SAVE_TIMEOUT.total_seconds()))
        super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and any_bad_input():
            self._remaining_restarts = 0
        return result


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; returns the exit code: 0, 1, or 2 if RDZV_ENDPOINT is at fault."""
    open_console()
    _drop_foreign_settings()
    args = torchrun.parse_args(list(arguments))
    launcher_api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        with needed("torchrun cannot start or watch the processes"):
            return _launch(args, _configure_rendezvous(args))
    except UserError as error:
        _log(str(error))
        return EXIT_BAD_INPUT


def _drop_foreign_settings() -> None:
    """Remove torchrun's settings from the environment, where clusters and earlier starts leave them."""
    for name in list(os.environ):
        if name.startswith("PET_") and name not in KEPT:
            value = os.environ.pop(name)
            _log(f"{name}={value[:100]!a} is left out: run_train.sh has variables of its own, see --help")


def _configure_rendezvous(args: Namespace) -> Endpoint:
    """Wait for the rendezvous endpoint and set torchrun's arguments to it."""
    alone = bool(args.standalone)
    if alone:
        endpoint = local_endpoint()
        args.standalone, args.rdzv_id = False, str(uuid.uuid4())
    else:
        endpoint = resolve_endpoint(args.rdzv_endpoint)
        args.local_addr = args.local_addr or endpoint.address
    _set_interfaces(endpoint, alone)
    if not endpoint.here:
        wait_for_endpoint(endpoint, ENDPOINT_TIMEOUT.total_seconds(), _log)
        threading.Thread(target=_heartbeat, args=(endpoint,), name="heartbeat", daemon=True).start()
    args.rdzv_backend, args.rdzv_endpoint = BACKEND, f"{endpoint.host}:{endpoint.port}"
    return endpoint


def _set_interfaces(endpoint: Endpoint, alone: bool) -> None:
    """Set where gloo and NCCL listen, in the workers. With several machines the user's own setting has precedence."""
    if not endpoint.interface:
        return
    if alone:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = endpoint.interface
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", endpoint.interface)
        if is_loopback(endpoint.address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", endpoint.interface)


def _heartbeat(endpoint: Endpoint) -> None:
    """End this process once the endpoint has not answered for `HEARTBEAT_TIMEOUT`, whatever torchrun waits for."""
    # A connection that nobody accepts takes as long as the interval. The time of pauses of this machine does not count.
    running = RunningTime(2 * HEARTBEAT_INTERVAL)
    answered = 0.0
    while running.update() - answered < HEARTBEAT_TIMEOUT:
        time.sleep(HEARTBEAT_INTERVAL)
        if answers(endpoint.host, endpoint.port):
            answered = running.update()
    _log(_lost(endpoint))
    os._exit(EXIT_FAILED)  # the main thread may be in a call to the endpoint that nothing interrupts


def _launch(args: Namespace, endpoint: Endpoint) -> int:
    try:
        use_store(open_store(endpoint))
        record(torchrun.run)(args)
        return EXIT_DONE
    except ChildFailedError as error:  # its text is torchrun's table of each worker's error
        print(error, file=sys.stderr)
    except RendezvousClosedError:
        _log("the run has ended on the other machines; the same command starts or resumes it")
    except RendezvousTimeoutError:
        _log("too few machines came; start the same command on all of NNODES")
    except RendezvousStateError as error:
        where = f"{endpoint.host}:{endpoint.port}"
        _log(f"{error}. Some other program uses {where}, which none may reach but this run's machines")
    except (RendezvousConnectionError, DistNetworkError, DistStoreError) as error:
        if endpoint.here or answers(endpoint.host, endpoint.port):
            logger.exception("torchrun failed")
            _log(f"the machines lost the connection to each other ({error}); the same command continues the run")
        else:
            _log(_lost(endpoint))
    return EXIT_FAILED


def _lost(endpoint: Endpoint) -> str:
    return (
        f"{endpoint.host}:{endpoint.port}, the rendezvous endpoint, does not answer any more, and no run continues "
        "without it. Start the same command again on all machines, with another RDZV_ENDPOINT if that one is gone for "
        "good: it continues from the newest checkpoint"
    )


def _log(line: str) -> None:
    print(f"run_train.sh: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
