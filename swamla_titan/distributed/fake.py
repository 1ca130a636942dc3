"""A World of any size in one process: the run's own code lays out a model for any rank, and nothing is communicated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import World, meshes


@contextmanager
def fake_world(degrees: Degrees, data_parallel: str, rank: int) -> Iterator[World]:
    """The place of `rank` among `degrees.size` processes that are not there, on the CPU; gone at the end.

    Collectives return at once and give nothing, so only shapes mean something. `data_parallel` as in [parallel]. This
    process must be in no process group.
    """
    assert not dist.is_initialized(), "a process has one default group: pretend before or after the real one"
    assert 0 <= rank < degrees.size
    device = torch.device("cpu")
    if degrees.size == 1:
        yield World.alone(device)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.size)
    try:
        weights, activations = meshes(degrees, device.type, data_parallel)
        yield World(rank, degrees.size, device, degrees, weights, activations)
    finally:
        dist.destroy_process_group()
