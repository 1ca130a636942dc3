"""Tensor parallelism with sequence parallelism: ranks share each matmul, and the tokens between them.

Megatron's plan (Shoeybi et al., arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198), by the role that each linear
layer declares (model/layers.py):

| parameter                    | placement  | what its module does                                            |
|------------------------------|------------|-----------------------------------------------------------------|
| embedding                    | Shard(0)   | own ids of all tokens, then reduce-scatter over the sequence    |
| COLUMN, the head among them  | Shard(0)   | all-gather the sequence, then own heads, hidden units or ids    |
| LATENT_COLUMN                | Shard(0)   | own heads, of a latent that every rank has                      |
| RESIDUAL_OUTPUT              | Shard(1)   | own heads or units, then reduce-scatter over the sequence       |
| REPLICATED                   | Replicate  | own tokens, then all-gather the latent                          |
| MEMORY                       | Replicate  | own tokens                                                      |
| norms, convolutions          | Replicate  | own tokens, own heads, or the full latent                       |

Between modules are plain tensors, of two layouts: the residual stream holds this rank's tokens, [B, T/n, dim], and
inside attention and feed-forward are all tokens of this rank's heads or hidden units. Parameters stay DTensors under
their own names, for FSDP2 and checkpoints look for them there; the modules compute with the local shards.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from swamla_titan.config.parallel_rules import why_not_shared
from swamla_titan.distributed.collectives import (
    TensorGroup,
    all_gather_last_axis,
    all_gather_sequence,
    all_reduce_max,
    all_reduce_sum,
    broadcast,
    reduce_scatter_sequence,
)
from swamla_titan.distributed.dtensor import with_shard
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.masks import Selection, SelectionRule
from swamla_titan.kernels.cross_entropy import IGNORE, summed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.branch import SelectingHead
from swamla_titan.model.layers import Embedding, LinearSpec, PerChannel, Role, Sharding, spec_of
from swamla_titan.model.loss_head import LossHead
from swamla_titan.model.row_table import RowTable


def local_with_gradient(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, whose gradient becomes that shard of the parameter's gradient.

    The gradient of a replicated parameter is taken as it is, although it is this rank's summand only; see
    `all_reduce_replicated_grads`.
    """
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=parameter.placements)


class LocalParameters(Sharding):
    """Parameters are DTensors over `group`, of which a module computes with the local shard.

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
                f"sequences of {tokens.shape[1]} tokens cannot be shared by {group.size} tensor-parallel ranks: "
                f"take a multiple of {group.size}"
            )
        weight = local_with_gradient(self.weight)
        row = tokens - group.rank * weight.shape[0]
        mine = (row >= 0) & (row < weight.shape[0])
        # Masked before and after: a clamped id must neither read another row's value nor give it a gradient.
        found = F.embedding(torch.where(mine, row, 0), weight)
        return reduce_scatter_sequence(torch.where(mine[..., None], found, 0.0), group)


_Style = tuple[type[LocalParameters], Placement]
_BY_TYPE: dict[type[nn.Module], _Style] = {
    PerChannel: (LocalParameters, Replicate()),
    Embedding: (LocalParameters, Shard(0)),
}
_BY_ROLE: dict[Role, _Style] = {
    Role.COLUMN: (GatheredColumnParallel, Shard(0)),
    Role.LATENT_COLUMN: (LocalParameters, Shard(0)),
    Role.RESIDUAL_OUTPUT: (RowParallel, Shard(1)),
    Role.REPLICATED: (LocalTokens, Replicate()),
    Role.MEMORY: (LocalParameters, Replicate()),
}


def apply_tensor_parallel(model: SWAMLAModel, mesh: DeviceMesh) -> None:
    """Reduce the model to this rank's shard of it, in place; `mesh` has one dimension, World.weights["tensor"].

    Parameters become DTensors on `mesh`, without communication: a rank takes its shard of the values that it has, which
    must be the same on all ranks (or none, on the meta device). The model may be a pipeline stage; it is converted to
    float8 before, if at all. Tokens, targets and documents are full, and the same on every rank. Activations between
    blocks are [B, T/n, dim]; the head gives logits [B, T, V/n], the model without targets full ones, and the loss is
    that of all, on every rank. `all_reduce_replicated_grads` (data_parallel.py) is due before each optimizer step.

    Raises UserError with the numbers if the ranks do not divide the heads or groups of a layer, as far as
    config/parallel_rules.py does not know them; TypeError for a module with parameters that is not known here.
    """
    group = TensorGroup.of(mesh)
    _require_even_shards(model, group.size)
    shared: dict[Tensor, nn.Parameter] = {}  # head and embedding, tied, stay one parameter
    for name, module in list(_modules(model)):
        if isinstance(module, SelectingHead):
            model.set_submodule(name, SharedSelectingHead(module.head, group))
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        style, placement = _style(name, module)
        for key, parameter in own.items():
            if parameter not in shared:
                shared[parameter] = _distribute(parameter, mesh, placement)
            module.register_parameter(key, shared[parameter])
        if isinstance(module, Embedding):
            model.set_submodule(name, VocabularyParallelEmbedding(module, group))
        elif hasattr(module, "sharding"):
            module.sharding = style(group)
        else:
            raise _unknown(name, module)
    model.loss_head = VocabularyParallelLossHead(model.config, group)
    model.why_not_decode = "a tensor-parallel model does not decode: generate from its checkpoint in one process"


def sides_on_a_rank(ranks: int, name: str, linear: nn.Linear) -> tuple[int, int]:
    """[out, in] of a linear layer's weight as each of `ranks` ranks will have it."""
    sides = [linear.out_features, linear.in_features]
    _, placement = _style(name, linear)
    if isinstance(placement, Shard):
        sides[placement.dim] //= ranks
    return sides[0], sides[1]


def _modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All but tables, whose rows all ranks of the pipeline stage share (row_tables.py)."""
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, RowTable))


def _style(name: str, module: nn.Module) -> _Style:
    if isinstance(spec := getattr(module, "spec", None), LinearSpec):
        return _BY_ROLE[spec.role]
    style = next((style for kind, style in _BY_TYPE.items() if isinstance(module, kind)), None)
    if style is None:
        raise _unknown(name, module)
    return style


def _unknown(name: str, module: nn.Module) -> TypeError:
    return TypeError(f"no tensor-parallel form of {name}, a {type(module).__module__}.{type(module).__qualname__}")


def _require_even_shards(model: nn.Module, ranks: int) -> None:
    """Raise UserError if a head, or a group of hidden units, would be cut, or some rank would have fewer."""
    for name, module in _modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            _, placement = _style(name, module)
            if isinstance(placement, Shard):
                unit = spec_of(name, module).unit if isinstance(module, nn.Linear) else 1
                count, shape = parameter.shape[placement.dim] // unit, tuple(parameter.shape)
                what = f"the {count} heads or groups of {unit} in {name}.{key} {shape}"
                if problem := why_not_shared(ranks, what, count):
                    raise UserError(f"parallel.tensor: {problem}")


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    part = parameter.detach()
    if isinstance(placement, Shard):
        part = part.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()].clone().contiguous()
    return nn.Parameter(with_shard(part, mesh, [placement], parameter), requires_grad=parameter.requires_grad)


class SharedSelectingHead(SelectingHead):
    """The selecting head of one rank of `group`, for the others' heads too: they are given its queries and keys.

    Each rank computes what is selected, and its gradient by its own heads; their sum over ranks goes to the owner.
    """

    def __init__(self, head: int, group: TensorGroup) -> None:
        super().__init__(head)
        self.group = group

    def forward(self, query: Tensor, key: Tensor, rule: SelectionRule) -> Selection:
        """As in SelectingHead, of this rank's heads."""
        rank, head = divmod(self.head, query.shape[2])
        own = torch.cat([query[:, :, head], key[:, :, head]], dim=1)
        shared = broadcast(own, rank == self.group.rank, self.group)
        by_query, by_key = shared.split([query.shape[1], key.shape[1]], dim=1)
        return Selection(rule, self.head, by_query, by_key)


class VocabularyParallelLossHead(LossHead):
    """LossHead for a head that gives the ranks of `group` their shards of the logits."""

    def __init__(self, config: ModelConfig, group: TensorGroup) -> None:
        super().__init__(config)
        self.group = group
        self.cross_entropy = VocabularyParallelCrossEntropy(group)

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """As in LossHead: those of the full vocabulary, on every rank."""
        return all_gather_last_axis(head(x), self.group)[..., : self.config.vocab_size]


class VocabularyParallelCrossEntropy(nn.Module):
    """kernels/cross_entropy.py for logits [N, V/n]: on each rank of `group` those of the ids from rank * V/n on.

    It takes the same arguments with the same meaning, and gives every rank the loss over the full vocabulary; the
    gradient of a rank's logits is that of this loss. `vocab_size` counts over all ranks, so the last ranks' logits may
    be padding in part or entirely.

    Ranks communicate three or four values per token instead of the logits: an all-reduce of their maximum, then one of
    the sums of exponentials, of the target's logit and, with label smoothing, of the logits.
    """

    def __init__(self, group: TensorGroup) -> None:
        super().__init__()
        self.group = group

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        sequences: int = 0,
    ) -> Tensor:
        """Logits [N, V/n] and targets [N] -> the sum of the losses, or sums by sequence, in float32."""
        group = self.group
        first = group.rank * logits.shape[1]
        real = min(max(vocab_size - first, 0), logits.shape[1])
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Masked and not sliced as without sharding, because a shard may be all padding, and nothing has no maximum.
        unpadded = logits if real == logits.shape[1] else torch.where(columns < real, logits, float("-inf"))
        maximum = all_reduce_max(unpadded.amax(dim=-1), group)  # [N]; without a gradient, because it cancels
        terms = [
            (unpadded - maximum[:, None]).exp().sum(dim=-1),
            torch.where(columns == targets[:, None] - first, logits, 0.0).sum(dim=-1),
        ]
        if label_smoothing > 0:
            terms.append(torch.where(columns < real, logits, 0.0).sum(dim=-1))
        exponentials, target_logit, *logit_sum = all_reduce_sum(torch.stack(terms), group).unbind()  # [N] each
        log_partition = maximum + exponentials.log()
        loss = log_partition - target_logit
        if label_smoothing > 0:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logit_sum[0] / vocab_size)
        if z_loss > 0:
            loss = loss + z_loss * log_partition.square()
        return summed(torch.where(targets != IGNORE, loss, 0.0), sequences)


def enable_async_tensor_parallel(mesh: DeviceMesh) -> None:
    """Have what is compiled from here on overlap the communication of `mesh` (World.weights["tensor"]).

    The compiler's pass splits all-gathers and reduce-scatters into pieces and overlaps each with the matmul of another:
    fused operators read the other GPUs' memory directly (symmetric memory). The ranks of `mesh` must be GPUs with peer
    access: of one host, or of one NVLink domain.
    """
    assert mesh.device_type == "cuda", "refused in launch/process_group.py"
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # Deprecated as needless, but the pass (torch 2.11 to 2.13) skips groups for which it was not called.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
