"""Initializes and destroys the process group: the rank that the launcher assigned, its device, its meshes."""

import os
import re
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import World, create_stage_group, meshes
from swamla_titan.errors import UserError
from swamla_titan.launch.rendezvous import connect_workers
from swamla_titan.launch.worker import rank_info

# The watchdog detects hangs, because it distinguishes them from a pause of the machine, and these timeouts do not.
COLLECTIVE_TIMEOUT = timedelta(days=7)


def launched_rank() -> int:
    """This process's rank, before the process group is initialized."""
    return rank_info().rank


def validate_cpu_only(parallel: Parallel) -> None:
    """Raise UserError for settings that need GPUs; called where there are none."""
    if parallel.cpu_offload:
        raise UserError("parallel.cpu_offload = true needs GPUs to offload from; set it to false")
    if parallel.async_tensor:
        raise UserError("parallel.async_tensor = true needs GPUs; set it to false")


def _validate_cpu_is_meant() -> None:
    """Raise UserError if NGPU asks for GPUs; called where there are none. On a CPU the run would take months."""
    asked = os.environ.get("NGPU", "")
    if re.fullmatch(r"[1-9][0-9]*", asked):
        raise UserError(f"NGPU={asked[:20]}: torch sees no GPU here; set NGPU=0 to train on the CPU")


def init_distributed(parallel: Parallel, while_waiting: Callable[[], None] = lambda: None) -> World:
    """Initialize the process group as the rank that the launcher (torchrun's environment variables) assigned.

    `while_waiting` is called repeatedly until all ranks are connected, and may raise. Raises UserError, before any
    device is touched, if the degrees of the configuration do not fit.
    """
    here = rank_info()
    size, rank = here.size, here.rank
    degrees = fit_degrees(parallel, size)
    if torch.cuda.is_available():
        local, needed = here.local_rank, here.local_size
        there = torch.cuda.device_count()
        if needed > there:  # on every process of the machine: one that continued would wait for the others
            raise UserError(
                f"{needed} processes on this machine, but {there} GPUs. Start as many processes as there are GPUs, "
                "NGPU in run_train.sh"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        _validate_cpu_is_meant()
        device = torch.device("cpu")
        validate_cpu_only(parallel)
    if size == 1:
        return World.alone(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = connect_workers(here, while_waiting)
        # The default of all groups, because the meshes' groups take no argument for it.
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{COLLECTIVE_TIMEOUT.total_seconds():.0f}")
        # With a device, NCCL connects at once instead of at the first collective.
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        store.set_timeout(COLLECTIVE_TIMEOUT)
    weights, activations = meshes(degrees, device.type, parallel.data_parallel)
    host_group = dist.new_group(backend="gloo")
    return World(rank, size, device, degrees, weights, activations, host_group, create_stage_group(weights))


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
