"""DTensors and FSDP2 modules: which shard of a tensor this rank holds, computed without communication."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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
    local(parameter).copy_(value[part_of(parameter)])


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """The part of the whole that this rank holds: a slice of each axis."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    return part_at(tensor, [mesh.get_local_rank(dimension) for dimension in range(mesh.ndim)])


def part_at(tensor: DTensor, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """`part_of`, of the rank at this place of the tensor's mesh."""
    begins, ends = [0] * tensor.ndim, list(tensor.shape)
    # Innermost first: FSDP cuts what tensor parallelism has left on the rank. As torch.chunk cuts.
    for dimension in reversed(range(tensor.device_mesh.ndim)):
        axis = _axis_cut_by(tensor.placements[dimension])
        if axis is not None:
            size = -(-(ends[axis] - begins[axis]) // tensor.device_mesh.size(dimension))
            begins[axis] = min(begins[axis] + coordinate[dimension] * size, ends[axis])
            ends[axis] = min(begins[axis] + size, ends[axis])
    return tuple(map(slice, begins, ends))


def like_part(tensor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros with `columns` in the place of the last axis, cut as `tensor` is, of which each rank makes its own part.

    The tensor's shards along that axis must be of whole columns.
    """
    own = local(tensor).detach()
    assert (own.shape[-1] * columns) % tensor.shape[-1] == 0, f"{columns} columns cannot be cut like {tensor.shape[-1]}"
    shape = (*own.shape[:-1], own.shape[-1] * columns // tensor.shape[-1])
    zeros = torch.zeros(shape, dtype=dtype, device=own.device)
    if not isinstance(tensor, DTensor):
        return zeros
    whole = torch.empty(*tensor.shape[:-1], columns, device="meta")
    distributed = DTensor.from_local(
        zeros, tensor.device_mesh, tensor.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return distributed.to(own.device)  # back to the host, if parameters are offloaded: from_local goes to the mesh


def is_shared(placement: Placement) -> bool:
    """Whether all ranks along a dimension of a mesh hold the same."""
    return _axis_cut_by(placement) is None


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


def free_gathered_weights(model: nn.Module) -> None:
    """Make parameters the sharded ones again, whatever FSDP2's passes have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
