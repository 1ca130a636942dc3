"""Tensor parallelism with sequence parallelism: ranks share each matrix product, and the tokens between them.

Megatron's division (Shoeybi et al., arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198) of this model:

| parameter                                | held as    | what its module does                                     |
|------------------------------------------|------------|----------------------------------------------------------|
| embedding                                | Shard(0)   | own ids of all tokens, then scatter-sum over the sequence |
| wqkv, wq, gate_up, head                  | Shard(0)   | gather the sequence, then own heads, units or ids        |
| wq_b, wkv_b                              | Shard(0)   | own heads, of a latent that is whole already             |
| attention's wo, down                     | Shard(1)   | own heads or units, then scatter-sum over the sequence   |
| wkv_a, wq_a                              | Replicate  | own tokens, then gather the narrow result                |
| norms                                    | Replicate  | own tokens, own heads, or the whole latent               |
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from swamla_titan.model import SWAMLAModel
from swamla_titan.model.norms import DynamicTanh, RMSNorm
from swamla_titan.parallel.tensor_collectives import TensorGroup
from swamla_titan.parallel.tensor_modules import (
    ColumnParallel,
    GatheredColumnParallel,
    LocalTokensDynamicTanh,
    LocalTokensLinear,
    LocalTokensRMSNorm,
    RowParallel,
    TensorParallelModule,
    VocabularyParallelEmbedding,
    become,
)
from swamla_titan.parallel.vocabulary_loss import VocabularyParallelLossHead

_Style = tuple[type[TensorParallelModule], Placement]
_BY_NAME: dict[str, _Style] = {
    "embedding": (VocabularyParallelEmbedding, Shard(0)),
    "head": (GatheredColumnParallel, Shard(0)),
    "wqkv": (GatheredColumnParallel, Shard(0)),
    "wq": (GatheredColumnParallel, Shard(0)),
    "gate_up": (GatheredColumnParallel, Shard(0)),
    "wq_b": (ColumnParallel, Shard(0)),
    "wkv_b": (ColumnParallel, Shard(0)),
    "wo": (RowParallel, Shard(1)),
    "down": (RowParallel, Shard(1)),
    "wq_a": (LocalTokensLinear, Replicate()),
    "wkv_a": (LocalTokensLinear, Replicate()),
}


def apply_tensor_parallel(model: SWAMLAModel, mesh: DeviceMesh) -> None:
    """Make the model one rank's part of it, in place; `mesh` has one dimension, World.weights["tensor"].

    Parameters become DTensors on `mesh`, without communication: a rank takes its part of the values that it has, which
    must be the same on all ranks (or none, on the meta device). The model may be a pipeline stage; it is converted to
    float8 before, if at all. Tokens, targets and documents go in whole, on every rank alike. Activations between
    blocks are [B, T/n, dim]; the head gives logits [B, T, V/n], the model without targets whole ones, and the loss is
    that of all, on every rank. `all_reduce_replicated_grads` (replicated_grads.py) is due before each optimizer step.

    The ranks must divide heads, feed-forward groups and vocabulary: config/parallel_rules.py has refused others. Raises
    TypeError for a kind of linear module that is not known here.
    """
    group = TensorGroup.of(mesh)
    shape = model.config
    own_heads = shape.kv_heads if "swa" in shape.block_kinds else shape.num_heads
    for count in (shape.num_heads, own_heads, shape.ffn_width // shape.ffn_group):
        assert count % group.size == 0, f"{group.size} ranks cannot share {count} heads or feed-forward groups"
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
        become(module, style, group)
    model.loss_head = VocabularyParallelLossHead(shape, group)
    for method in ("prefill", "decode"):
        setattr(model, method, _refuse_to_decode)


def sides_on_a_rank(ranks: int, name: str, linear: nn.Linear) -> tuple[int, int]:
    """[out, in] of a product's weight as each of `ranks` ranks will have it."""
    whole = linear.out_features, linear.in_features
    _, placement = _style(name, linear)
    if not isinstance(placement, Shard):
        return whole
    return (whole[0] // ranks, whole[1]) if placement.dim == 0 else (whole[0], whole[1] // ranks)


def _style(name: str, module: nn.Module) -> _Style:
    if isinstance(module, RMSNorm):
        return LocalTokensRMSNorm, Replicate()
    if isinstance(module, DynamicTanh):
        return LocalTokensDynamicTanh, Replicate()
    style = _BY_NAME.get(name.rpartition(".")[2])
    assert style is not None, f"tensor parallelism has no rule for {name} ({type(module).__name__})"
    return style


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    part = parameter.detach()
    if isinstance(placement, Shard):
        assert part.shape[placement.dim] % mesh.size() == 0, f"{mesh.size()} ranks cannot share {tuple(part.shape)}"
        part = part.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()].clone().contiguous()
    distributed = DTensor.from_local(
        part, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def _refuse_to_decode(*_: object, **__: object) -> Tensor:
    raise ValueError("a tensor-parallel model does not decode: generate from its checkpoint in one process")
