"""DTensors and FSDP2 modules: which shard of a tensor this rank holds, computed without communication."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this rank holds, as a plain tensor that shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert not any(placement.is_partial() for placement in tensor.placements), "a summand that is not yet reduced"
    shard = tensor.to_local()
    inner: Tensor = getattr(shard, "_tensor", shard)  # of a weight that torchao lets FSDP2 gather in float8
    return inner


def plain(tensor: Any) -> Any:
    """A weight without the subclass by which torchao lets FSDP2 gather it in float8; shares its memory."""
    if not isinstance(tensor, DTensor) or not hasattr(tensor.to_local(), "_tensor"):
        return tensor
    return with_shard(local(tensor), tensor.device_mesh, tensor.placements, tensor)


def with_shard(shard: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], full: Tensor) -> DTensor:
    """The tensor with shape and strides of `full` of which this rank holds `shard`; without communication."""
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


@torch.no_grad()
def copy_from_full(parameter: Tensor, full: Tensor) -> None:
    """Copy into a parameter, sharded or not, its shard of the full tensor, which every rank has."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    assert parameter.shape == full.shape
    local(parameter).copy_(full[local_slices(parameter)])


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the full tensor this rank's shard lies: a slice of each axis."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    return slices_at(tensor, [mesh.get_local_rank(dimension) for dimension in range(mesh.ndim)])


def slices_at(tensor: DTensor, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """`local_slices` of the rank with this coordinate on the tensor's mesh."""
    begins, ends = [0] * tensor.ndim, list(tensor.shape)
    # Innermost first, because FSDP2 shards what tensor parallelism has left on the rank. Sizes are torch.chunk's.
    for dimension in reversed(range(tensor.device_mesh.ndim)):
        axis = _sharded_axis(tensor.placements[dimension])
        if axis is not None:
            size = -(-(ends[axis] - begins[axis]) // tensor.device_mesh.size(dimension))
            begins[axis] = min(begins[axis] + coordinate[dimension] * size, ends[axis])
            ends[axis] = min(begins[axis] + size, ends[axis])
    return tuple(map(slice, begins, ends))


def zeros_sharded_like(
    tensor: Tensor, last_size: int, dtype: torch.dtype, zeros_at: Callable[..., Tensor] | None = None
) -> Tensor:
    """Zeros of the tensor's shape but for `last_size` in the last axis, sharded as it is; each rank makes its shard.

    The last axis' shards of `tensor` must correspond to integer sizes of the new one. `zeros_at`: makes a shard, of a
    shape and a dtype; None: on the tensor's device.
    """
    own = local(tensor).detach()
    assert (own.shape[-1] * last_size) % tensor.shape[-1] == 0, f"{last_size} cannot be cut like {tensor.shape[-1]}"
    shape = (*own.shape[:-1], own.shape[-1] * last_size // tensor.shape[-1])
    zeros = torch.zeros(shape, dtype=dtype, device=own.device) if zeros_at is None else zeros_at(shape, dtype)
    if not isinstance(tensor, DTensor):
        return zeros
    full = torch.empty(*tensor.shape[:-1], last_size, device="meta")
    distributed = with_shard(zeros, tensor.device_mesh, tensor.placements, full)
    return distributed.to(zeros.device)  # back to the host, if parameters are offloaded: from_local goes to the mesh


def is_replicated(placement: Placement) -> bool:
    """Whether all ranks along a dimension of a mesh hold the same values."""
    return _sharded_axis(placement) is None


def num_shards(tensor: Tensor) -> int:
    """How many different shards of a tensor the ranks hold."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements)
    return math.prod(size for size, placement in sizes if not is_replicated(placement))


def _sharded_axis(placement: Placement) -> int | None:
    # Not by is_shard(), because FSDP2's placement over what tensor parallelism left of the same axis is a Shard by that
    # in torch 2.11 and none in 2.13.
    return getattr(placement, "dim", None)


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that FSDP2, HSDP or DDP was applied to."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def free_gathered_weights(model: nn.Module) -> None:
    """Free whatever FSDP2's forward and backward passes have gathered; parameters are the sharded ones again."""
    for module in fsdp_modules(model):
        module.reshard()
