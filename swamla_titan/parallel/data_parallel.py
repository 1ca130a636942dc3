"""FSDP2, HSDP and DDP: which rank keeps which shard of the weights, and when gradients are reduced.

All three are torch's own (fully_shard, arXiv:2304.11277; replicate). Ranks that share a sequence (context parallel)
hold shards, or copies, like ranks that read different sequences, because both compute gradients of the same weights
from different tokens. Gradients of replicated parameters are all-reduced here, once a step:

| parameter                         | held by                          | its gradient is summed over                   |
|-----------------------------------|----------------------------------|-----------------------------------------------|
| one axis (norms)                  | every rank of the pipeline stage | those ranks, here                             |
| matrix, Replicate under tensor    | as FSDP2 or DDP says             | data and context by FSDP2 or DDP; tensor here |
| a RowTable's (row_tables.py)      | its rows, by one rank each       | its own all-to-all                            |
| any other                         | as FSDP2 or DDP says             | data and context by FSDP2 or DDP              |
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor, Placement, Replicate

from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.degrees import GRADIENT_DIMENSIONS
from swamla_titan.distributed.dtensor import fsdp_modules, is_replicated, local
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.row_table import row_tables

_KEPT_BYTES = 4 * 2**30
_KEEPING: WeakSet[nn.Module] = WeakSet()  # models whose blocks keep gathered weights after the forward pass


def apply_data_parallel(model: SWAMLAModel, parallel: Parallel, world: World, compute_dtype: torch.dtype) -> None:
    """Shard or replicate the model's weights in place, as the configuration says; does nothing for a single rank."""
    if world.weights is None or world.weights["replicate"].size() == world.weights["shard"].size() == 1:
        return
    over = {"ddp": ("replicate",), "hsdp": ("replicate", "shard"), "fsdp": ("shard",)}
    wrap(model, parallel, world.weights[over[parallel.data_parallel]], compute_dtype)


def wrap(model: SWAMLAModel, parallel: Parallel, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Apply FSDP2, HSDP or DDP over `mesh`: each block is one unit of communication, the rest of the model another.

    Weights are gathered in `compute_dtype`; gradients are reduced in float32, and summed, because the loss has been
    divided by the count of the global batch already. A tied embedding and head are one weight, which is used first and
    last, so it stays gathered through the pass. Untied, each is a unit of its own, so that the head's all-gather and
    the embedding's reduction overlap with the blocks.

    Parameters of one axis (`stays_replicated`) stay in float32 on every rank, because norms compute with their float32
    values: `all_reduce_replicated_grads` is due before each optimizer step.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the embedding's output sets the dtype of what follows
    )
    ignored = {weight for weight in model.parameters() if stays_replicated(weight, parallel)} | row_tables(model).keys()
    gathered = sum(local(weight).numel() for weight in model.parameters() if weight not in ignored)
    reshard = parallel.data_parallel != "ddp" and reshards_after_forward(parallel, compute_dtype.itemsize * gathered)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": ignored}
    if parallel.data_parallel == "ddp":
        for unit in (*_inner_units(model), model):
            replicate(unit, **options)
    else:
        options["offload_policy"] = CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy()
        _shard(model, parallel, reshard, options)
    for module in fsdp_modules(model):
        if mesh.size() > 1:  # a single rank has nothing to reduce, and torch would divide by 1 in a pass of its own
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else gloo is asked for NCCL's scaled sum
        if mesh.device_type == "cpu":
            module.set_custom_all_gather(_AllGatherOfBytes())
    if not reshard:
        _KEEPING.add(model)
    _prefetch(model)


def _shard(model: SWAMLAModel, parallel: Parallel, reshard: bool, options: dict[str, Any]) -> None:
    """FSDP2 or HSDP on each unit; `reshard`: free a block's gathered weights after its forward pass."""
    shard = functools.partial(fully_shard, **options)
    for unit in _inner_units(model):
        shard(unit, reshard_after_forward=reshard)
    head = getattr(model, "head", None)
    if head is not None and not _is_tied(model):
        # The backward pass begins with it, so what was freed would be gathered again at once.
        shard([model.norm, head] if parallel.cpu_offload else head, reshard_after_forward=False)
    shard(model)


def _inner_units(model: SWAMLAModel) -> list[nn.Module]:
    """The modules that are units of communication by themselves: an untied embedding, each annex, and each block."""
    embedding = getattr(model, "embedding", None)
    first = [embedding] if embedding is not None and not _is_tied(model) else []
    return [*first, *(unit for layer in layer_units(model) for unit in layer)]


def layer_units(model: SWAMLAModel) -> list[list[nn.Module]]:
    """The units of communication of each layer, in the order of the forward pass: its annexes, then its block."""
    annexes = defaultdict(list)
    for (layer, _), annex in model.annexes.each():
        annexes[layer].append(annex)
    return [[*annexes[name], block] for name, block in model.blocks.items()]


def _is_tied(model: SWAMLAModel) -> bool:
    """Whether embedding and head are one weight here; on different pipeline stages they are two copies."""
    return model.config.tie_embeddings and hasattr(model, "embedding") and hasattr(model, "head")


class _AllGatherOfBytes(AllGather):
    """All-gathers any dtype as bytes, because gloo refuses float8."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        out, mine = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        # all_gather_single is its name since torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gather(out, mine, group=group, async_op=async_op)


def stays_replicated(weight: Tensor, parallel: Parallel) -> bool:
    """Whether every rank keeps a full float32 copy of a parameter, which FSDP2, HSDP and DDP then ignore.

    That is every parameter of one axis: norms compute in float32, and gathered in bfloat16 a gain within 1/256 of 1
    would be 1. They are a few thousand elements a block. Not with cpu_offload, where only FSDP2 would copy them to the
    GPU.
    """
    return weight.ndim < 2 and not parallel.cpu_offload


def reshards_after_forward(parallel: Parallel, gathered_bytes: int) -> bool:
    """Whether FSDP2 frees a block's gathered weights after its forward pass, and gathers them again for the backward.

    `gathered_bytes` are those of all weights of this rank's stages, in the dtype they are gathered in. "auto" keeps up
    to 4 GiB, which saves a third of the communication and gathers once for all micro-batches of a step; pipelines,
    which would gather for every micro-batch, always keep them.
    """
    if parallel.reshard_after_forward == "auto":
        return parallel.pipeline == 1 and gathered_bytes > _KEPT_BYTES
    return parallel.reshard_after_forward == "always"


def model_reshards_after_forward(model: nn.Module) -> bool:
    """`reshards_after_forward`, as `apply_data_parallel` decided it for a model."""
    return isinstance(model, FSDPModule) and model not in _KEEPING


def _prefetch(model: SWAMLAModel) -> None:
    """Start all-gathers up to the next block's while a unit computes, also where the host is late to request them."""
    layers: list[list[FSDPModule]] = [
        [unit for unit in layer if isinstance(unit, FSDPModule)] for layer in layer_units(model)
    ]
    for before, layer, after in zip([[], *layers], layers, [*layers[1:], []]):
        for place, unit in enumerate(layer):
            unit.set_modules_to_forward_prefetch(layer[place + 1 :] or after)
            unit.set_modules_to_backward_prefetch([*before[-1:], *layer[:place]][::-1])


def reduce_after_this_backward(model: nn.Module, last: bool, every_micro_batch: bool) -> None:
    """Set, before a micro-batch's passes, whether gradients are reduced and gathered weights freed after them.

    By default gradients stay on the rank, unsharded in float32, and are reduced after the step's last micro-batch only
    (`last`). With `every_micro_batch` they are reduced to their shards each time; the copies of HSDP are still
    all-reduced once. Blocks that keep their gathered weights through a micro-batch keep them through the whole step.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        if model in _KEEPING:
            model.set_reshard_after_backward(last)
        if every_micro_batch:
            model.set_requires_all_reduce(last)
        else:
            model.set_requires_gradient_sync(last)


_DATA_PARALLEL = ("replicate", "shard")


def all_reduce_replicated_grads(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum over the ranks that replicate a parameter the gradients that each computed from its own tokens or heads.

    Due once a step: after the last micro-batch and FSDP's reduction, before the gradient norm is taken. That is exact,
    because the sums (over tokens and heads here, over micro-batches, over FSDP's ranks) may be taken in any order; and
    one message with all norms replaces one per module and micro-batch. Parameters that FSDP2 has sharded are summed
    over tensor-parallel ranks alone, which hold the same shard of them.

    In place, in the gradients' own dtype, one message per dtype and group of ranks: all ranks of this pipeline stage,
    or those along each dimension that is left to sum, as tensor parallelism's beside FSDP2. Skips what FSDP2 or DDP has
    summed and tensor parallelism has sharded, and parameters without a gradient. Collective over the ranks of a
    pipeline stage, with the same parameters on each.
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
        for group in [world.stage_group] if over == wide else map(world.weights.get_group, over):
            _sum(gradients, group)


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
    """All-reduce tensors in place, in one message."""
    assert group is not None
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sums = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [s.view_as(t) for s, t in zip(sums, tensors)])
