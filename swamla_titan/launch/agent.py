"""torchrun for this program's workers, and for machines that come and go.

usage: python -m swamla_titan.launch.agent TORCHRUN_ARGUMENT ...

What differs from `python -m torch.distributed.run`:
- Machines find each other by their routes and not by their host names, see endpoint.py.
- What listens does so at one address, the loopback one if the run has one machine, see rendezvous.py.
- Settings of torchrun that stand in the environment (PET_...) are those of another start, and left out.
- A machine may start before the one that holds the meeting point does.
- When a machine joins, torchrun stops all workers to start them again as one larger group. They are told that it is
  this and not the user's stop, see worker.py, and have time to save: torchrun gives 30 seconds.
- If the meeting point falls silent, without a closed connection to tell, torchrun waits for a quarter of an hour or for
  ever. Here it ends after a minute, and run_train.sh ends the workers.
- What ends torchrun itself is said in one message.
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
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
from swamla_titan.launch.worker import any_refused, regrouping
from swamla_titan.system.console import open_console
from swamla_titan.system.machine import needed
from swamla_titan.system.running_time import RunningTime

logger = logging.getLogger(__name__)

TO_MEET = timedelta(minutes=10)  # as torchrun waits for enough machines once it is there
TO_SAVE = timedelta(minutes=10)  # what takes longer is lost back to the last checkpoint; workers that hang wait as long
SILENCE = 60.0  # seconds that the meeting point may not answer
LOOK = 5.0  # seconds between two looks at it
KEPT = ("PET_RDZV_CONF", "PET_MONITOR_INTERVAL", "PET_NUMA_BINDING")  # no variable of run_train.sh's says the same


class Agent(LocalElasticAgent):
    """Starts, watches and stops the workers of this machine."""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # They are healthy: it is not that one of them failed, but that machines wait to join.
        if worker_group.state == WorkerState.HEALTHY and self._pcontext is not None:
            with regrouping():
                self._pcontext.close(signal.SIGTERM, timeout=int(TO_SAVE.total_seconds()))
        super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and any_refused():
            self._remaining_restarts = 0
        return result


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; returns the exit code: 0, 1, or 2 if RDZV_ENDPOINT is at fault."""
    open_console()
    _leave_out_foreign_settings()
    args = torchrun.parse_args(list(arguments))
    launcher_api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        with needed("torchrun cannot start or watch the processes"):
            return _launch(args, _meet(args))
    except UserError as error:
        _say(str(error))
        return EXIT_BAD_INPUT


def _leave_out_foreign_settings() -> None:
    """Clusters and earlier starts leave torchrun's settings in the environment, where run_train.sh has its own."""
    for name in list(os.environ):
        if name.startswith("PET_") and name not in KEPT:
            _say(
                f"{name}={os.environ.pop(name)[:100]!a} is left out: run_train.sh has variables of its own, see --help"
            )


def _meet(args: object) -> Endpoint:
    """Wait for the meeting point and write into torchrun's arguments how machines find each other."""
    alone = bool(args.standalone)  # type: ignore[attr-defined]
    if alone:
        point = local_endpoint()
        args.standalone, args.rdzv_id = False, str(uuid.uuid4())  # type: ignore[attr-defined]
    else:
        point = resolve_endpoint(args.rdzv_endpoint)  # type: ignore[attr-defined]
        args.local_addr = args.local_addr or point.address  # type: ignore[attr-defined]
    _set_interfaces(point, alone)
    if not point.here:
        wait_for_endpoint(point, TO_MEET.total_seconds(), _say)
        threading.Thread(target=_end_in_silence, args=(point,), name="vigil", daemon=True).start()
    args.rdzv_backend, args.rdzv_endpoint = BACKEND, f"{point.host}:{point.port}"  # type: ignore[attr-defined]
    return point


def _set_interfaces(point: Endpoint, alone: bool) -> None:
    """Where gloo and NCCL listen, in the workers. What the user has set stays, where there are other machines."""
    if not point.interface:
        return
    if alone:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = point.interface
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", point.interface)
        if is_loopback(point.address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", point.interface)


def _end_in_silence(point: Endpoint) -> None:
    """End this process once the meeting point has not answered for `SILENCE` seconds, whatever torchrun waits for."""
    running = RunningTime(
        2 * LOOK
    )  # a look takes as long where nothing answers; what this machine was paused is no silence
    heard = 0.0
    while running.look() - heard < SILENCE:
        time.sleep(LOOK)
        if answers(point):
            heard = running.look()
    _say(_lost(point))
    os._exit(EXIT_FAILED)  # the main thread may be in a call to the meeting point that nothing interrupts


def _launch(args: object, point: Endpoint) -> int:
    try:
        use_store(open_store(point))
        record(torchrun.run)(args)
        return EXIT_DONE
    except ChildFailedError as error:  # its text is the table of what each worker died of
        print(error, file=sys.stderr)
    except RendezvousClosedError:
        _say("the run has ended on the other machines; the same command starts or resumes it")
    except RendezvousTimeoutError:
        _say("too few machines came; start the same command on all of NNODES")
    except RendezvousStateError as error:
        _say(
            f"{error}. Some other program uses {point.host}:{point.port}, which none may reach but this run's machines"
        )
    except (RendezvousConnectionError, DistNetworkError, DistStoreError) as error:
        if point.here or answers(point):
            logger.exception("torchrun failed")
            _say(f"the machines lost touch with each other ({error}); the same command goes on")
        else:
            _say(_lost(point))
    return EXIT_FAILED


def _lost(point: Endpoint) -> str:
    return (
        f"{point.host}:{point.port}, where the machines meet, does not answer any more, and no run goes on without it. "
        "Start the same command again on all machines, with another RDZV_ENDPOINT if that one is gone for good: it "
        "goes on from the newest checkpoint"
    )


def _say(line: str) -> None:
    print(f"run_train.sh: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
