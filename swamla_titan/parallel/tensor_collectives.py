"""What the ranks of a tensor-parallel group tell each other, as differentiable functions of plain tensors.

Each of them waits for the result of its collective (distributed/collectives.py) at once. Inside a compiled graph that
is an operator which the compiler moves as late as it can, so nothing is lost.

Along the sequence (axis 1 of [B, T, ...]), gather and scatter-sum are each other's derivative: with S the sum over
ranks of what each computed from all tokens, the gradient of a token's shard is the sum of all ranks' gradients of it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from swamla_titan.distributed.collectives import OPERATORS, waited

_SEQUENCE = 1  # axis of [B, T, ...]


class TensorGroup(NamedTuple):
    """The ranks that share each matrix product: their group's name, this rank's place in it, how many they are."""

    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "TensorGroup":
        """The group of a mesh of one dimension."""
        assert mesh.ndim == 1, f"expected a mesh of one dimension, got {mesh}"
        return cls(str(mesh.get_group().group_name), mesh.get_local_rank(), mesh.size())


def gather_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """[B, T/n, ...] of each rank -> [B, T, ...] on every rank. Backward: the sum over ranks, cut into shards."""
    gathered: Tensor = _GatherSequence.apply(x, group.name, group.size)
    return gathered


def scatter_sum_over_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """Partial sums [B, T, ...] of each rank -> [B, T/n, ...], this rank's tokens of their sum. Backward: gathered.

    T must be a multiple of the number of ranks.
    """
    scattered: Tensor = _ScatterSum.apply(x, group.name, group.size)
    return scattered


def sum_over_shards(x: Tensor, group: TensorGroup) -> Tensor:
    """The sum over ranks, the same on every rank. Backward: as it comes.

    For what every rank goes on to compute alike (a loss): each then has the gradient of the whole, not a part of it.
    """
    total: Tensor = _SumOverShards.apply(x, group.name)
    return total


def max_over_shards(x: Tensor, group: TensorGroup) -> Tensor:
    """The largest over ranks of each element, without a gradient."""
    return waited(OPERATORS.all_reduce(x.detach().contiguous(), "max", group.name))


def gather_last_axis(x: Tensor, group: TensorGroup) -> Tensor:
    """[..., V/n] of each rank -> [..., V]. Backward: this rank's part, for every rank has the gradient of the whole."""
    gathered: Tensor = _GatherLastAxis.apply(x, group.name, group.rank, group.size)
    return gathered


# The operators work on axis 0. split and cat around them, and not one transposition, are what the compiler's
# asynchronous tensor-parallel pass recognizes.
def _gather(x: Tensor, axis: int, name: str, size: int) -> Tensor:
    gathered = waited(OPERATORS.all_gather_into_tensor(x.contiguous(), size, name))
    return torch.cat(gathered.chunk(size), dim=axis)


def _scatter(x: Tensor, axis: int, name: str, size: int) -> Tensor:
    stacked = torch.cat(x.chunk(size, dim=axis))
    return waited(OPERATORS.reduce_scatter_tensor(stacked, "sum", size, name))


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return _gather(x, _SEQUENCE, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(gradient, _SEQUENCE, ctx.name, ctx.size), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        assert x.shape[_SEQUENCE] % size == 0, f"{x.shape[_SEQUENCE]} tokens cannot be shared by {size} ranks"
        ctx.name, ctx.size = name, size
        return _scatter(x, _SEQUENCE, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, _SEQUENCE, ctx.name, ctx.size), None, None


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return waited(OPERATORS.all_reduce(x.contiguous(), "sum", name))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherLastAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return _gather(x, x.dim() - 1, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.chunk(ctx.size, dim=-1)[ctx.rank], None, None, None
