"""The processes that train together: this rank's coordinates among them, its device, its process groups.

And what one rank finds out and all must act on: errors, and results of work that rank 0 alone does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swamla_titan.distributed.degrees import GRADIENT_DIMENSIONS, LOSS_DIMENSIONS, Degrees
from swamla_titan.errors import RunFailed, UserError

Result = TypeVar("Result")
Key = TypeVar("Key")
Value = TypeVar("Value")

ELSEWHERE = torch.device("meta")  # stands for a GPU of another machine, which has float8


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size` processes, which are laid out in the order of the table of dimensions (degrees.py).

    Two meshes over the same ranks, None for a process alone. `weights` [pipeline, replicate, shard, tensor] says which
    rank holds which shard of a parameter; context-parallel ranks hold shards like any other (or copies, with ddp).
    `activations` [pipeline, data, context, tensor] says who computes what: `data` ranks read different sequences.
    """

    rank: int
    size: int
    device: torch.device
    degrees: Degrees
    weights: DeviceMesh | None = None
    activations: DeviceMesh | None = None
    host_group: dist.ProcessGroup | None = None  # all ranks, by gloo: does not wait for devices
    stage_group: dist.ProcessGroup | None = None  # the ranks that work on this one's pipeline stage, see below
    request_group: dist.ProcessGroup | None = None  # the same ranks; does not wait for what goes through the other

    @classmethod
    def alone(cls, device: torch.device | None = None) -> "World":
        """The world of a single process."""
        return cls(rank=0, size=1, device=device or torch.device("cpu"), degrees=Degrees())

    @classmethod
    def planned(cls, degrees: Degrees, device: torch.device) -> "World":
        """Rank 0 of ranks that do not exist, each with such a device: for what needs no communication."""
        return replace(cls.alone(device), degrees=degrees)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the GPUs are not on this machine, so that nothing can be asked of them."""
        return self.device == ELSEWHERE

    def with_new_host_group(self) -> "World":
        """The same world with another host group, for a thread that communicates while others do. Collective."""
        return self if self.size == 1 else replace(self, host_group=dist.new_group(backend="gloo"))

    def with_request_group(self) -> "World":
        """The same world with a request group, unless this process works on its stage alone. Collective."""
        if self.stage_group is None or self.stage_group.size() == 1:
            return self
        assert self.weights is not None
        return replace(self, request_group=_subgroup(_stages(self.weights)))

    @property
    def data_rank(self) -> int:
        """Which of the `degrees.data` shares of a global batch this rank reads."""
        return self.coordinate("data")

    def coordinate(self, dimension: str) -> int:
        """This rank's coordinate along a dimension of the mesh `activations`."""
        return 0 if self.activations is None else self.activations.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along a dimension of `activations` alone."""
        assert self.activations is not None
        return self.activations.get_group(dimension)

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank writes the files that all ranks share."""
        return self.rank == 0

    def all_reduce_loss(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks that computed different tokens, in place."""
        # By the degrees: to slice a mesh takes a tenth of a millisecond, and this is every step.
        sizes = self.degrees.activations_mesh()
        for dimension in LOSS_DIMENSIONS:
            if sizes[dimension] > 1:
                dist.all_reduce(values, group=self.group(dimension))
        return values

    def all_reduce_max(self, value: float) -> float:
        """The maximum over all ranks, on every rank; the hosts wait for each other, their devices do not."""
        if self.host_group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.host_group)
        return shared.item()


def all_ranks_or_raise(world: World, work: Callable[[], Result]) -> Result:
    """`work()` on every rank. If it raises a UserError or RunFailed on one, all ranks raise that error.

    A rank that continued alone would wait for ever in its next collective. `work` itself must not communicate.
    """
    if world.size == 1:
        return work()
    result, error = _attempt(work)
    if world.all_reduce_max(float(error is not None)) == 0:
        return result  # type: ignore[return-value]
    errors: list[UserError | RunFailed | None] = [None] * world.size
    dist.all_gather_object(errors, error, group=world.host_group)
    raise next(each for each in errors if each is not None)


def broadcast_from_rank_0(world: World, work: Callable[[], Result]) -> Result:
    """The result of `work()`, run by rank 0 alone, on every rank; its UserError or RunFailed likewise."""
    if world.size == 1:
        return work()
    outcome = [_attempt(work) if world.is_rank_0 else (None, None)]
    dist.broadcast_object_list(outcome, src=0, group=world.host_group)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def all_gather_dict(world: World, own: dict[Key, Value]) -> dict[Key, Value]:
    """The union of all ranks' dictionaries, on every rank; ranks that have a key in common have it with one value."""
    if world.size == 1:
        return own
    every: list[dict[Key, Value]] = [{}] * world.size
    dist.all_gather_object(every, own, group=world.host_group)
    return {key: value for each in every for key, value in each.items()}


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, UserError | RunFailed | None]:
    try:
        return work(), None
    except (UserError, RunFailed) as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they cannot be pickled
        return None, error


def meshes(degrees: Degrees, device_type: str, data_parallel: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The meshes `weights` and `activations` of a World; the default process group must be initialized."""
    sizes = degrees.weights_mesh(data_parallel), degrees.activations_mesh()
    weights, activations = (
        init_device_mesh(device_type, tuple(each.values()), mesh_dim_names=tuple(each)) for each in sizes
    )
    return weights, activations


def create_stage_group(weights: DeviceMesh) -> dist.ProcessGroup:
    """World.stage_group: the ranks that hold shards or copies of the same layers and sum their gradients.

    They differ from each other along `GRADIENT_DIMENSIONS` alone. Collective; groups that exist are not made again.
    """
    names, summed = weights.mesh_dim_names or (), _summed_axes(weights)
    wide = [names[axis] for axis in summed if weights.size(axis) > 1]
    stages = _stages(weights)
    if len(stages) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return _subgroup(stages) if len(wide) > 1 else weights.get_group(wide[0] if wide else "shard")


def _stages(weights: DeviceMesh) -> list[list[int]]:
    """The ranks of each stage."""
    summed = _summed_axes(weights)
    others = [axis for axis in range(weights.ndim) if axis not in summed]
    size = math.prod(weights.size(axis) for axis in summed)
    stages: list[list[int]] = weights.mesh.permute(*others, *summed).reshape(-1, size).tolist()
    return stages


def _summed_axes(weights: DeviceMesh) -> list[int]:
    names = weights.mesh_dim_names or ()
    return [axis for axis, name in enumerate(names) if name in GRADIENT_DIMENSIONS]


def _subgroup(groups: list[list[int]]) -> dist.ProcessGroup:
    """A new process group of those of `groups` that this rank is one of. Collective over all processes."""
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert group is not None
    return group


@contextmanager
def fake_world(degrees: Degrees, data_parallel: str, rank: int) -> Iterator[World]:
    """The World of `rank` among `degrees.size` processes over a fake process group, on the CPU; destroyed at the end.

    The run's own code then lays out a model for any rank. Collectives return at once and give nothing, so only shapes
    mean something. `data_parallel` as in [parallel]. This process must be in no process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a run needs none

    assert not dist.is_initialized(), "a process has one default group: use a fake one before or after the real one"
    assert 0 <= rank < degrees.size
    device = torch.device("cpu")
    if degrees.size == 1:
        yield World.alone(device)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.size)
    try:
        weights, activations = meshes(degrees, device.type, data_parallel)
        group = create_stage_group(weights)
        yield World(rank, degrees.size, device, degrees, weights, activations, stage_group=group)
    finally:
        dist.destroy_process_group()
