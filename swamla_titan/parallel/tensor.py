"""Tensor parallelism with sequence parallelism: ranks share each matmul, and the tokens between them.

Megatron's plan (Shoeybi et al., arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198), by the role that each linear
layer declares (model/linear.py):

| parameter                    | placement  | what its module does                                            |
|------------------------------|------------|-----------------------------------------------------------------|
| embedding                    | Shard(0)   | own ids of all tokens, then reduce-scatter over the sequence    |
| COLUMN, the head among them  | Shard(0)   | all-gather the sequence, then own heads, hidden units or ids    |
| LATENT_COLUMN                | Shard(0)   | own heads, of a latent that every rank has                      |
| RESIDUAL_OUTPUT              | Shard(1)   | own heads or units, then reduce-scatter over the sequence       |
| REPLICATED                   | Replicate  | own tokens, then all-gather the latent                          |
| norms                        | Replicate  | own tokens, own heads, or the full latent                       |

Between modules are plain tensors, of two layouts: the residual stream holds this rank's tokens, [B, T/n, dim], and
inside attention and feed-forward are all tokens of this rank's heads or hidden units. Parameters stay DTensors under
their own names, for FSDP2 and checkpoints look for them there; the modules compute with the local part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from swamla_titan.model import SWAMLAModel
from swamla_titan.model.linear import Embedding, LinearSpec, Role, spec_of
from swamla_titan.model.norms import Norm
from swamla_titan.model.sharding import Sharding
from swamla_titan.parallel.tensor_collectives import TensorGroup, all_gather_sequence, reduce_scatter_sequence
from swamla_titan.parallel.vocabulary_loss import VocabularyParallelLossHead


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


_Style = tuple[type[LocalParameters], Placement]
_BY_TYPE: dict[type[nn.Module], _Style] = {
    Norm: (LocalParameters, Replicate()),
    Embedding: (LocalParameters, Shard(0)),
}
_BY_ROLE: dict[Role, _Style] = {
    Role.COLUMN: (GatheredColumnParallel, Shard(0)),
    Role.LATENT_COLUMN: (LocalParameters, Shard(0)),
    Role.RESIDUAL_OUTPUT: (RowParallel, Shard(1)),
    Role.REPLICATED: (LocalTokens, Replicate()),
}


def apply_tensor_parallel(model: SWAMLAModel, mesh: DeviceMesh) -> None:
    """Make the model one rank's shard of it, in place; `mesh` has one dimension, World.weights["tensor"].

    Parameters become DTensors on `mesh`, without communication: a rank takes its shard of the values that it has, which
    must be the same on all ranks (or none, on the meta device). The model may be a pipeline stage; it is converted to
    float8 before, if at all. Tokens, targets and documents go in whole, on every rank alike. Activations between
    blocks are [B, T/n, dim]; the head gives logits [B, T, V/n], the model without targets full ones, and the loss is
    that of all, on every rank. `all_reduce_replicated_grads` (replicated_grads.py) is due before each optimizer step.

    The ranks must divide heads, feed-forward groups and vocabulary: config/parallel_rules.py has refused others. Raises
    TypeError for a kind of linear module that is not known here.
    """
    group = TensorGroup.of(mesh)
    _require_even_shards(model, group.size)
    shared: dict[Tensor, nn.Parameter] = {}  # head and embedding, tied, stay one parameter
    for name, module in list(model.named_modules()):
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
            raise TypeError(f"no tensor-parallel form of {type(module).__module__}.{type(module).__qualname__}")
    model.loss_head = VocabularyParallelLossHead(model.config, group)
    model.why_not_decode = "a tensor-parallel model does not decode: generate from its checkpoint in one process"


def sides_on_a_rank(ranks: int, name: str, linear: nn.Linear) -> tuple[int, int]:
    """[out, in] of a linear layer's weight as each of `ranks` ranks will have it."""
    whole = linear.out_features, linear.in_features
    _, placement = _style(name, linear)
    if not isinstance(placement, Shard):
        return whole
    return (whole[0] // ranks, whole[1]) if placement.dim == 0 else (whole[0], whole[1] // ranks)


def _style(name: str, module: nn.Module) -> _Style:
    if isinstance(spec := getattr(module, "spec", None), LinearSpec):
        return _BY_ROLE[spec.role]
    style = next((style for kind, style in _BY_TYPE.items() if isinstance(module, kind)), None)
    assert style is not None, f"tensor parallelism has no rule for {name} ({type(module).__name__})"
    return style


def _require_even_shards(model: nn.Module, ranks: int) -> None:
    """No head, and no group of hidden units, is cut in two."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _, placement = _style(name, module)
            if isinstance(placement, Shard):
                count = module.weight.shape[placement.dim] // spec_of(name, module).unit
                assert count % ranks == 0, f"{ranks} ranks cannot share {count} heads or groups of {name}"


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    part = parameter.detach()
    if isinstance(placement, Shard):
        assert part.shape[placement.dim] % mesh.size() == 0, f"{mesh.size()} ranks cannot share {tuple(part.shape)}"
        part = part.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()].clone().contiguous()
    distributed = DTensor.from_local(
        part, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)
