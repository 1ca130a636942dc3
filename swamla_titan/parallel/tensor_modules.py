"""The modules of the model as one rank of a tensor-parallel group computes them.

Between modules are plain tensors, of two layouts: the residual stream holds this rank's tokens, [B, T/n, dim], and
inside attention and feed-forward are all tokens of this rank's heads or hidden units. Parameters stay DTensors under
their own names, for FSDP2 and checkpoints look for them there; the modules compute with the local part.

A class here is put in the place of a module's own (`become`), whose parameters and settings it goes on to use.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swamla_titan.model.norms import dynamic_tanh, rms_norm
from swamla_titan.parallel.tensor_collectives import TensorGroup, all_gather_sequence, reduce_scatter_sequence


def local_with_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, whose gradient becomes that part of the parameter's gradient.

    The gradient of a replicated parameter is taken as it is, although it is this rank's summand only; see
    `all_reduce_replicated_grads`.
    """
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=parameter.placements)


class TensorParallelModule(nn.Module):
    """A module whose parameters are DTensors over `tensor_group`; what else it has comes from the class it replaces."""

    tensor_group: TensorGroup
    weight: Tensor
    product: Callable[[Tensor, Tensor], Tensor]


class LocalTokensRMSNorm(TensorParallelModule):
    """RMSNorm with a replicated weight, of whatever tokens or heads this rank has."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, local_with_gradient(self.weight))


class LocalTokensDynamicTanh(TensorParallelModule):
    """DynamicTanh with replicated parameters, of whatever tokens this rank has."""

    alpha: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return dynamic_tanh(
            x, local_with_gradient(self.alpha), local_with_gradient(self.weight), local_with_gradient(self.bias)
        )


class VocabularyParallelEmbedding(TensorParallelModule):
    """Each rank looks up the ids of its rows; the others' are zeros, and the sum is cut into shards of tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T/n, dim]. Raises ValueError if the ranks do not divide T."""
        group = self.tensor_group
        if tokens.shape[1] % group.size:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens cannot be shared by {group.size} tensor-parallel ranks: "
                f"take a multiple of {group.size}"
            )
        weight = local_with_gradient(self.weight)
        row = tokens - group.rank * weight.shape[0]
        mine = (row >= 0) & (row < weight.shape[0])
        # Masked before and after: a clamped id must neither read another row's value nor give it a gradient.
        found = F.embedding(torch.where(mine, row, 0), weight)
        return reduce_scatter_sequence(torch.where(mine[..., None], found, 0.0), group)


class ColumnParallel(TensorParallelModule):
    """Rows of the weight, columns of the result: each rank computes its outputs for all tokens, and is given these."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out/n]."""
        return self.product(x, local_with_gradient(self.weight))


class GatheredColumnParallel(TensorParallelModule):
    """ColumnParallel that is given this rank's tokens of the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/n, in] -> [B, T, out/n]."""
        return self.product(all_gather_sequence(x, self.tensor_group), local_with_gradient(self.weight))


class RowParallel(TensorParallelModule):
    """Columns of the weight: each rank has a part of the inputs of all tokens and so a summand of the result."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in/n] -> [B, T/n, out]."""
        return reduce_scatter_sequence(self.product(x, local_with_gradient(self.weight)), self.tensor_group)


class LocalTokensLinear(TensorParallelModule):
    """A narrow product with a replicated weight: cheaper to send its result than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/n, in] -> [B, T, out]."""
        return all_gather_sequence(self.product(x, local_with_gradient(self.weight)), self.tensor_group)


def become(module: nn.Module, style: type[TensorParallelModule], group: TensorGroup) -> None:
    """Make a module compute as `style` says; its parameters must be DTensors already.

    Raises TypeError for a linear module of a kind that has no `product(x, weight)`.
    """
    pair = style, type(module)
    if pair not in _CLASSES:
        _CLASSES[pair] = _styled(*pair)
    module.__class__ = _CLASSES[pair]
    module.tensor_group = group  # type: ignore[assignment]


# One class per pair, and so one `forward`: torch.compile shares the code of all blocks of a kind.
_CLASSES: dict[tuple[type[TensorParallelModule], type[nn.Module]], type[nn.Module]] = {}


def _styled(style: type[TensorParallelModule], kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, nn.Linear) and not hasattr(kind, "product"):
        raise TypeError(f"no tensor-parallel form of {kind.__module__}.{kind.__qualname__}")
    return type(style.__name__ + kind.__name__, (style, kind), {"__module__": __name__})
