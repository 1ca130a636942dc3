"""How the modules of the model compute on one rank of a tensor-parallel group.

Between modules are plain tensors, of two layouts: the residual stream holds this rank's tokens, [B, T/n, dim], and
inside attention and feed-forward are all tokens of this rank's heads or hidden units. Parameters stay DTensors under
their own names, for FSDP2 and checkpoints look for them there; the modules compute with the local part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swamla_titan.model.linear import Embedding
from swamla_titan.model.sharding import Sharding
from swamla_titan.parallel.tensor_collectives import TensorGroup, all_gather_sequence, reduce_scatter_sequence


def local_with_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, whose gradient becomes that part of the parameter's gradient.

    The gradient of a replicated parameter is taken as it is, although it is this rank's summand only; see
    `all_reduce_replicated_grads`.
    """
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=parameter.placements)


class LocalParameters(Sharding):
    """Parameters are DTensors over `group`, of which a module computes with the local part.

    As it is, for norms of whatever tokens or heads this rank has, and for linear layers whose rows are sharded: each
    rank computes its outputs for all tokens, and is given these, [B, T, in] -> [B, T, out/n].
    """

    is_full = False

    def __init__(self, group: TensorGroup) -> None:
        self.group = group

    def parameter(self, parameter: Tensor) -> Tensor:
        """As in Sharding."""
        return local_with_gradient(parameter)


class GatheredColumnParallel(LocalParameters):
    """Rows of the weight are sharded, and this rank's tokens given: [B, T/n, in] -> [B, T, out/n]."""

    def input(self, x: Tensor) -> Tensor:
        """As in Sharding."""
        return all_gather_sequence(x, self.group)


class RowParallel(LocalParameters):
    """Columns of the weight are sharded: each rank has a summand of the result, [B, T, in/n] -> [B, T/n, out]."""

    def output(self, y: Tensor) -> Tensor:
        """As in Sharding."""
        return reduce_scatter_sequence(y, self.group)


class LocalTokens(LocalParameters):
    """A narrow matmul with a replicated weight, [B, T/n, in] -> [B, T, out]: to send its result is cheaper."""

    def output(self, y: Tensor) -> Tensor:
        """As in Sharding."""
        return all_gather_sequence(y, self.group)


class VocabularyParallelEmbedding(Embedding):
    """Each rank looks up the ids of its rows; the others' are zeros, and the sum is cut into shards of tokens."""

    def __init__(self, embedding: nn.Embedding, group: TensorGroup) -> None:
        with torch.device("meta"):
            super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.weight = embedding.weight
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T/n, dim]. Raises ValueError if the ranks do not divide T."""
        group = self.group
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
