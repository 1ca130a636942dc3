"""The part of a whole tensor that this rank keeps, computed without communication."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, as a plain tensor that shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert not any(placement.is_partial() for placement in tensor.placements), "a summand that is not yet reduced"
    part = tensor.to_local()
    inner: Tensor = getattr(part, "_tensor", part)  # of a weight that torchao lets FSDP2 gather in float8
    return inner


def plain(tensor: Any) -> Any:
    """A weight without the subclass by which torchao lets FSDP2 gather it in float8; shares its memory."""
    if not isinstance(tensor, DTensor) or not hasattr(tensor.to_local(), "_tensor"):
        return tensor
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(
        local(tensor), tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


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
        axis = _axis_cut_by(parameter.placements[dimension])
        if axis is not None:
            chunks = value.chunk(mesh.size(dimension), axis)
            index = mesh.get_local_rank(dimension)
            value = chunks[index] if index < len(chunks) else value.narrow(axis, 0, 0)
    parameter.to_local().copy_(value)


def shards_of(tensor: Tensor) -> int:
    """In how many different parts the ranks hold a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for dimension, placement in enumerate(tensor.placements):
        if _axis_cut_by(placement) is not None:
            count *= tensor.device_mesh.size(dimension)
    return count


def _axis_cut_by(placement: Placement) -> int | None:
    # Not by is_shard(): FSDP2's placement over what tensor parallelism left of the same axis is a Shard by that in
    # torch 2.11 and none in 2.13.
    return getattr(placement, "dim", None)
