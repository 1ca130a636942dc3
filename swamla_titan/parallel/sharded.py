"""The part of a whole tensor that this rank keeps, computed without communication."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_whole(parameter: Tensor, value: Tensor) -> None:
    """Write into a parameter, sharded or not, its part of the whole `value`, which every rank has."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    assert parameter.shape == value.shape
    # Innermost first: FSDP cuts what tensor parallelism has left on the rank.
    mesh = parameter.device_mesh
    for dimension in reversed(range(mesh.ndim)):
        placement = parameter.placements[dimension]
        if placement.is_shard():
            chunks = value.chunk(mesh.size(dimension), placement.dim)  # type: ignore[attr-defined]
            index = mesh.get_local_rank(dimension)
            value = chunks[index] if index < len(chunks) else value.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    parameter.to_local().copy_(value)


def shards_of(tensor: Tensor) -> int:
    """In how many different parts the ranks hold a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            count *= tensor.device_mesh.size(dimension)
    return count
