"""Initializes and destroys the process group of the ranks that the launcher assigned, with devices and meshes."""

import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import World, create_stage_group, meshes
from swamla_titan.errors import UserError
from swamla_titan.launch.ranks import RankInfo, rank_info
from swamla_titan.launch.rendezvous import connect_workers

# The watchdog detects hangs, because it distinguishes them from a pause of the machine, and these timeouts do not.
COLLECTIVE_TIMEOUT = timedelta(days=7)


def validate_launch(
    parallel: Parallel, sizes: Sequence[int], local_size: int, gpus: int | None = None, asked: int | None = None
) -> None:
    """Raise UserError if [parallel] fits no number of processes in `sizes`, or this machine cannot run it.

    `local_size` processes run here, on `gpus` GPUs (None: those that torch sees), and the user `asked` for this many
    GPUs (None: the variable NGPU).
    """
    _validate_sizes(parallel, sizes)
    gpus = _gpus_here() if gpus is None else gpus
    asked = _gpus_asked_for() if asked is None else asked
    if asked > gpus and (gpus == 0 or asked == local_size):  # on a CPU that nobody asked for a run would take months
        if local_size == 1:
            raise UserError(f"NGPU={asked}: torch sees no GPU here; set NGPU=0 to train on the CPU")
        fewer = f"set NGPU={gpus}, or " if gpus else "set "
        raise UserError(f"NGPU={asked}: torch sees {gpus} here; {fewer}NGPU=0 and NPROC for the CPU")
    if gpus == 0:
        _validate_cpu_only(parallel)
    elif local_size > gpus:  # on every process of the machine: one that continued would wait for the others
        raise UserError(
            f"{local_size} processes on this machine, but {gpus} GPUs. Start as many processes as there are GPUs, NGPU "
            "in run_train.sh"
        )


def _validate_sizes(parallel: Parallel, sizes: Sequence[int]) -> None:
    """Raise UserError if none fits; an elastic run may have several numbers of processes."""
    errors = []
    for size in sizes:
        try:
            fit_degrees(parallel, size)
        except UserError as error:
            errors.append(error)
    if len(errors) == len(sizes):
        raise errors[-1]


def _validate_cpu_only(parallel: Parallel) -> None:
    if parallel.cpu_offload:
        raise UserError("parallel.cpu_offload = true needs GPUs to offload from; set it to false")
    if parallel.async_tensor:
        raise UserError("parallel.async_tensor = true needs GPUs; set it to false")


def _gpus_here() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus_asked_for() -> int:
    text = os.environ.get("NGPU", "")
    return int(text[:20]) if re.fullmatch(r"[1-9][0-9]*", text) else 0


def device_here(local_rank: int = 0) -> torch.device:
    """The device of the process with this local rank: its GPU, or the CPU where torch sees no GPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def init_distributed(parallel: Parallel, while_waiting: Callable[[], None] = lambda: None) -> World:
    """Initialize the process group as the rank that the launcher (torchrun's environment variables) assigned.

    `while_waiting` is called repeatedly until all ranks are connected, and may raise. Raises UserError, before any
    device is touched, if the degrees of the configuration do not fit.
    """
    here = rank_info()
    validate_launch(parallel, [here.size], here.local_size)
    degrees, device = fit_degrees(parallel, here.size), device_here(here.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if here.size == 1:
        return World.alone(device)
    if not dist.is_initialized():
        _init_process_group(device, here, while_waiting)
    weights, activations = meshes(degrees, device.type, parallel.data_parallel)
    host_group = dist.new_group(backend="gloo")
    stage_group = create_stage_group(weights)
    return World(here.rank, here.size, device, degrees, weights, activations, host_group, stage_group)


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
