"""torch's functional collectives, called as operators: autograd has their gradients, and torch.compile traces them.

They return before the result is there. The operators are called directly because torch's wrappers return a tensor
that waits at its first use, and such tensors as inputs of a compiled block have given wrong gradients.

The differentiable functions of a tensor-parallel group wait for the result of their collective at once. Along the
sequence (axis 1 of [B, T, ...]), all-gather and reduce-scatter are each other's derivative, because every rank computes
from all tokens, and the gradient of a token is the sum of all ranks' gradients of it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives  # registers the gradients; nothing else is sure to have imported it
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

OPERATORS = torch.ops._c10d_functional
_SEQUENCE = 1  # axis of [B, T, ...]


def waited(x: Tensor) -> Tensor:
    """The result `x` of one of OPERATORS once it is there. In a compiled graph, the wait comes as late as it can."""
    result: Tensor = OPERATORS.wait_tensor(x)
    return result


class TensorGroup(NamedTuple):
    """The ranks that share each linear layer: their group's name, this process's rank in it, its size."""

    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "TensorGroup":
        """The group of a mesh of one dimension."""
        assert mesh.ndim == 1, f"expected a mesh of one dimension, got {mesh}"
        return cls(str(mesh.get_group().group_name), mesh.get_local_rank(), mesh.size())


def all_gather_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """All-gather: [B, T/n, ...] of each rank -> [B, T, ...] on every rank. Backward: reduce-scatter."""
    gathered: Tensor = _AllGatherSequence.apply(x, group.name, group.size)
    return gathered


def reduce_scatter_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """Reduce-scatter: partial sums [B, T, ...] of each rank -> [B, T/n, ...], this rank's tokens. Backward: all-gather.

    T must be a multiple of the number of ranks.
    """
    scattered: Tensor = _ReduceScatter.apply(x, group.name, group.size)
    return scattered


def all_reduce_sum(x: Tensor, group: TensorGroup) -> Tensor:
    """All-reduce: the sum over ranks, on every rank. Backward: identity.

    For sums from which every rank computes the same (a loss): the gradient of each is then that of the full loss.
    """
    total: Tensor = _SumOverShards.apply(x, group.name)
    return total


def broadcast(x: Tensor, is_source: bool, group: TensorGroup) -> Tensor:
    """The `x` of the one rank that is the source, on every rank; those of the others have its shape and dtype.

    Backward: the sum of all ranks' gradients, for the source. Both by all-reduce: x + 0 is exact, and no rank needs to
    know which one is the source.
    """
    shared: Tensor = _Broadcast.apply(x, is_source, group.name)
    return shared


def all_reduce_max(x: Tensor, group: TensorGroup) -> Tensor:
    """The maximum over ranks of each element, without a gradient."""
    return waited(OPERATORS.all_reduce(x.detach().contiguous(), "max", group.name))


def all_gather_last_axis(x: Tensor, group: TensorGroup) -> Tensor:
    """[..., V/n] of each rank -> [..., V]. Backward: this rank's slice, because every rank has the full gradient."""
    gathered: Tensor = _AllGatherLastAxis.apply(x, group.name, group.rank, group.size)
    return gathered


# The operators work on axis 0. The compiler's asynchronous tensor-parallel pass recognizes split and cat around them,
# but no transposition.
def _all_gather(x: Tensor, axis: int, name: str, size: int) -> Tensor:
    gathered = waited(OPERATORS.all_gather_into_tensor(x.contiguous(), size, name))
    return torch.cat(gathered.chunk(size), dim=axis)


def _reduce_scatter(x: Tensor, axis: int, name: str, size: int) -> Tensor:
    stacked = torch.cat(x.chunk(size, dim=axis))
    return waited(OPERATORS.reduce_scatter_tensor(stacked, "sum", size, name))


class _AllGatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return _all_gather(x, _SEQUENCE, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, _SEQUENCE, ctx.name, ctx.size), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        assert x.shape[_SEQUENCE] % size == 0, f"{x.shape[_SEQUENCE]} tokens cannot be shared by {size} ranks"
        ctx.name, ctx.size = name, size
        return _reduce_scatter(x, _SEQUENCE, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradient, _SEQUENCE, ctx.name, ctx.size), None, None


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return waited(OPERATORS.all_reduce(x.contiguous(), "sum", name))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, is_source: bool, name: str) -> Tensor:
        ctx.is_source, ctx.name = is_source, name
        given = x.contiguous() if is_source else torch.zeros_like(x, memory_format=torch.contiguous_format)
        return waited(OPERATORS.all_reduce(given, "sum", name))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        total = waited(OPERATORS.all_reduce(gradient.contiguous(), "sum", ctx.name))
        return total if ctx.is_source else None, None, None


class _AllGatherLastAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return _all_gather(x, x.dim() - 1, name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.chunk(ctx.size, dim=-1)[ctx.rank], None, None, None
