"""All-reduces the gradients of replicated parameters, which neither FSDP2, DDP nor tensor parallelism has summed.

| parameter                         | held by                          | its gradient is summed over                   |
|-----------------------------------|----------------------------------|-----------------------------------------------|
| one axis (norms)                  | every rank of the pipeline stage | those ranks, here                             |
| matrix, Replicate under tensor    | as FSDP2 or DDP says             | data and context by FSDP2 or DDP; tensor here |
| any other                         | as FSDP2 or DDP says             | data and context by FSDP2 or DDP              |
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate

from swamla_titan.distributed.degrees import GRADIENT_DIMENSIONS
from swamla_titan.distributed.dtensor import is_replicated, local
from swamla_titan.distributed.mesh import World

_DATA_PARALLEL = ("replicate", "shard")


def all_reduce_replicated_grads(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum over the ranks that replicate a parameter the gradients that each computed from its own tokens or heads.

    Due once a step: after the last micro-batch and FSDP's reduction, before the gradient norm is taken. That is exact,
    because the sums (over tokens and heads here, over micro-batches, over FSDP's ranks) may be taken in any order; and
    one message with all norms replaces one per module and micro-batch. Parameters that FSDP2 has sharded are summed
    over tensor-parallel ranks alone, which hold the same shard of them.

    In place, in the gradients' own dtype, one message per dtype and group of ranks: all ranks of this pipeline stage,
    or those of its tensor-parallel group. Skips what FSDP2 or DDP has summed and tensor parallelism has sharded, and
    parameters without a gradient. Collective over the ranks of a pipeline stage, with the same parameters on each.
    """
    if world.weights is None:
        return
    # By index, because a slice of the mesh by name takes 0.1 ms.
    names = world.weights.mesh_dim_names or ()
    wide = tuple(name for i, name in enumerate(names) if name in GRADIENT_DIMENSIONS and world.weights.size(i) > 1)
    messages: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            over = tuple(name for name in wide if name in _dimensions_to_sum(parameter))
            gradient = local(parameter.grad)
            if over:
                messages[over, gradient.dtype].append(gradient)
    for (over, _), gradients in messages.items():
        assert over in (wide, ("tensor",)), f"no plan leaves a gradient to be summed over {over} alone"
        _sum(gradients, world.stage_group if over == wide else world.weights.get_group("tensor"))


def _dimensions_to_sum(parameter: nn.Parameter) -> set[str]:
    """Dimensions of World.weights along which each rank's gradient is a summand, whatever their sizes."""
    held: dict[str, Placement] = {}
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names
        assert names is not None
        held = dict(zip(names, parameter.placements))
    dimensions = {name for name in GRADIENT_DIMENSIONS if is_replicated(held.get(name, Replicate()))}
    # FSDP2 and DDP put their dimensions into the parameters that they reduce, also where these are copies.
    return dimensions - {*_DATA_PARALLEL} if held.keys() & {*_DATA_PARALLEL} else dimensions


@torch.no_grad()
def _sum(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """In place, in one message."""
    assert group is not None
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sums = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [s.view_as(t) for s, t in zip(sums, tensors)])
