"""The processes that train together: this one's place among them, its device, and the groups it talks to."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swamla_titan.config.sections import Parallel
from swamla_titan.errors import UserError
from swamla_titan.parallel.degrees import Degrees, fit_degrees
from swamla_titan.parallel.launcher import place
from swamla_titan.parallel.peers import meet

# Of a collective. The watchdog is what finds hangs: it tells a pause from one, and these clocks do not.
TO_ANSWER = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, laid out [pipeline, replicate, shard, context, tensor].

    Two meshes over the same ranks, None for a process alone. `weights` [pipeline, replicate, shard, tensor] says who
    holds which part of a parameter; the ranks that share a sequence hold shards of it like any other (or copies, with
    ddp). `activations` [pipeline, data, context, tensor] says who computes what: `data` ranks read different sequences.
    """

    rank: int
    size: int
    device: torch.device
    degrees: Degrees
    weights: DeviceMesh | None = None
    activations: DeviceMesh | None = None
    host_group: dist.ProcessGroup | None = None  # all ranks, over the hosts: does not wait for devices
    stage_group: dist.ProcessGroup | None = None  # the ranks at this one's place of the pipeline, itself included

    @classmethod
    def alone(cls, device: torch.device | None = None) -> "World":
        """The world of a process without others."""
        return cls(rank=0, size=1, device=device or torch.device("cpu"), degrees=Degrees())

    def with_group_of_its_own(self) -> "World":
        """The same place, with another group over the hosts, for a thread that talks while others do. All call it."""
        return self if self.size == 1 else replace(self, host_group=dist.new_group(backend="gloo"))

    @property
    def data_rank(self) -> int:
        """Which of the `degrees.data` parts of a global batch this rank reads."""
        return self.coordinate("data")

    def coordinate(self, dimension: str) -> int:
        """This rank's place along a dimension of the mesh `activations`."""
        return 0 if self.activations is None else self.activations.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along a dimension of `activations` alone."""
        assert self.activations is not None
        return self.activations.get_group(dimension)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    def sum_over_sequences(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks that computed different tokens, in place."""
        # By the degrees: to slice a mesh takes a tenth of a millisecond, and this is every step.
        for dimension, size in (("data", self.degrees.data), ("context", self.degrees.context)):
            if size > 1:
                dist.all_reduce(values, group=self.group(dimension))
        return values

    def largest(self, value: float) -> float:
        """The largest value of any rank, on every rank; the hosts wait for each other, their devices do not."""
        if self.host_group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.host_group)
        return shared.item()


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


def join_world(parallel: Parallel, while_waiting: Callable[[], None] = lambda: None) -> World:
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
    return World(rank, size, device, degrees, weights, activations, host_group, _stage_group(weights))


def meshes(degrees: Degrees, device_type: str, data_parallel: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The meshes `weights` and `activations` of a World; the process group must be there."""
    pipeline, data, context, tensor = degrees.pipeline, degrees.data, degrees.context, degrees.tensor
    if data_parallel == "ddp":
        replicate, shard = data * context, 1
    else:
        replicate, shard = degrees.replicate, degrees.shard * context
    names = ("pipeline", "replicate", "shard", "tensor")
    weights = init_device_mesh(device_type, (pipeline, replicate, shard, tensor), mesh_dim_names=names)
    names = ("pipeline", "data", "context", "tensor")
    activations = init_device_mesh(device_type, (pipeline, data, context, tensor), mesh_dim_names=names)
    return weights, activations


def _stage_group(weights: DeviceMesh) -> dist.ProcessGroup:
    """This rank's World.stage_group; all processes must come here. One that exists is not made again."""
    shared = [name for name in ("replicate", "shard", "tensor") if weights[name].size() > 1]
    if weights["pipeline"].size() == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if len(shared) <= 1:
        return weights.get_group(shared[0] if shared else "shard")
    group, _ = dist.new_subgroups_by_enumeration(weights.mesh.flatten(1).tolist())
    assert group is not None
    return group


def leave_world() -> None:
    """Say good-bye to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
