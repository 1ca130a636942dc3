"""Joining and leaving the process group: the rank that the launcher gave this process, its device, its meshes."""

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
from swamla_titan.launch.store import meet
from swamla_titan.launch.worker import place

# Of a collective. The watchdog is what finds hangs: it tells a pause from one, and these clocks do not.
TO_ANSWER = timedelta(days=7)


def launched_rank() -> int:
    """This process's number among them."""
    return place().rank


def refuse_without_gpus(parallel: Parallel) -> None:
    """Raise UserError for what is asked of GPUs where there are none."""
    if parallel.cpu_offload:
        raise UserError("parallel.cpu_offload = true needs GPUs to offload from; set it to false")
    if parallel.async_tensor:
        raise UserError("parallel.async_tensor = true needs GPUs; set it to false")


def _refuse_missing_gpus() -> None:
    """Raise UserError where GPUs are asked for and there are none: on a CPU the run would last for months."""
    asked = os.environ.get("NGPU", "")
    if re.fullmatch(r"[1-9][0-9]*", asked):
        raise UserError(f"NGPU={asked[:20]}: torch sees no GPU here; set NGPU=0 to train on the CPU")


def init_distributed(parallel: Parallel, while_waiting: Callable[[], None] = lambda: None) -> World:
    """Take the place that the launcher (torchrun's environment variables) gave this process, and meet the others.

    `while_waiting` is called again and again until they have come, and may raise. Raises UserError, before any device
    is touched, if the degrees of the configuration do not fit.
    """
    here = place()
    size, rank = here.size, here.rank
    degrees = fit_degrees(parallel, size)
    if torch.cuda.is_available():
        local, needed = here.local_rank, here.local_size
        there = torch.cuda.device_count()
        if needed > there:  # on every process of the machine: one that went on would wait for the others
            raise UserError(
                f"{needed} processes on this machine, but {there} GPUs. Start as many processes as there are GPUs, "
                "NGPU in run_train.sh"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        _refuse_missing_gpus()
        device = torch.device("cpu")
        refuse_without_gpus(parallel)
    if size == 1:
        return World.alone(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = meet(here, while_waiting)
        # Of all groups, those of the meshes too, which can be given no other.
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = TO_ANSWER
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{TO_ANSWER.total_seconds():.0f}")
        # Bound to its device, NCCL connects at once instead of at the first use.
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            timeout=TO_ANSWER,
            device_id=device if device.type == "cuda" else None,
        )
        store.set_timeout(TO_ANSWER)
    weights, activations = meshes(degrees, device.type, parallel.data_parallel)
    host_group = dist.new_group(backend="gloo")
    return World(rank, size, device, degrees, weights, activations, host_group, create_stage_group(weights))


def destroy_distributed() -> None:
    """Say good-bye to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
