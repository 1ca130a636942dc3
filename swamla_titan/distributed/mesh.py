"""The processes that train together: this one's place among them, its device, and the groups it talks to."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swamla_titan.distributed.degrees import Degrees


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
    def is_rank_0(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    def sum_over_sequences(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks that computed different tokens, in place."""
        # By the degrees: to slice a mesh takes a tenth of a millisecond, and this is every step.
        for dimension, size in (("data", self.degrees.data), ("context", self.degrees.context)):
            if size > 1:
                dist.all_reduce(values, group=self.group(dimension))
        return values

    def all_reduce_max(self, value: float) -> float:
        """The largest value of any rank, on every rank; the hosts wait for each other, their devices do not."""
        if self.host_group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.host_group)
        return shared.item()


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


def stage_group_of(weights: DeviceMesh) -> dist.ProcessGroup:
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
