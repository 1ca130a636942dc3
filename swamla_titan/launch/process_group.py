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
from swamla_titan.launch.worker import RankInfo, rank_info

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
    degrees = fit_degrees(parallel, here.size)
    device = _device(parallel, here)
    if here.size == 1:
        return World.alone(device)
    if not dist.is_initialized():
        _init_process_group(device, here, while_waiting)
    weights, activations = meshes(degrees, device.type, parallel.data_parallel)
    host_group = dist.new_group(backend="gloo")
    stage_group = create_stage_group(weights)
    return World(here.rank, here.size, device, degrees, weights, activations, host_group, stage_group)


def _device(parallel: Parallel, here: RankInfo) -> torch.device:
    """This rank's device. Raises UserError where it is a CPU and GPUs are asked for, or GPUs are too few."""
    if not torch.cuda.is_available():
        _validate_cpu_is_meant()
        validate_cpu_only(parallel)
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if here.local_size > available:  # on every process of the machine: one that continued would wait for the others
        raise UserError(
            f"{here.local_size} processes on this machine, but {available} GPUs. Start as many processes as there are "
            "GPUs, NGPU in run_train.sh"
        )
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, here: RankInfo, while_waiting: Callable[[], None]) -> None:
    store = connect_workers(here, while_waiting)
    # The default of all groups, because the meshes' groups take no argument for it.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{COLLECTIVE_TIMEOUT.total_seconds():.0f}")
    # With a device, NCCL connects at once instead of at the first collective.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=here.rank,
        world_size=here.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    store.set_timeout(COLLECTIVE_TIMEOUT)


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
