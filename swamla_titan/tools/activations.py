"""What blocks keep between a forward and a backward pass, estimated from their shapes, and what they recompute.

A compiled block keeps, for each token, the inputs of linear layers and of attention, and the results of linear layers
where arithmetic on them is repeated: 4 dim of the residual stream and both norms' results, and what each branch
declares as `saved` (model/branch.py). With float8.recipe = "native" the inputs of converted linear layers are kept as
float8 (`native_savings`).

The estimate leaves out masks, and what is one element a head and token. Eager blocks keep more, each float32
intermediate of norms and rotations, except where native float8 has operators for all of those. Blocks checkpointed by
operators keep the results of linear layers, which float8 gives in the dtype that they have without it.
"""

import functools
from collections.abc import Collection, Sequence

import torch

from swamla_titan.config import Config
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.model import Block, ModelConfig
from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.branch import Branch
from swamla_titan.model.counts import training_flops_per_token
from swamla_titan.model.layers import Linear, Role
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions, is_annex_recomputed, keeps_operators
from swamla_titan.parallel.float8 import float8_coverage
from swamla_titan.parallel.sequence_layout import SequenceLayout

# Eager to compiled, measured on a CPU for both kinds of block; float32 has no casts that would be kept.
EAGER_FACTOR = {"float32": 1.3, "bfloat16": 1.5}


def itemsize(config: Config) -> int:
    """Bytes of an element in the compute dtype."""
    dtype: torch.dtype = getattr(torch, config.training.compute_dtype)
    return dtype.itemsize


def kept_by_branch(model: ModelConfig, kind: str, branch: str, context: int = 1, tensor: int = 1) -> float:
    """Elements that a compiled branch of `kind` keeps on a rank for each token: its input, the norm's result, its own.

    The ranks of `context` shard the tokens, but some kinds gather the keys and values of full sequences. The ranks of
    `tensor` shard heads and hidden units, and the residual stream's tokens; the norms' results they have gathered.
    """
    saved = _branch(model, kind, branch).saved(model, tensor)
    return (model.dim / tensor + model.dim + saved.local) / context + saved.sequence


def native_savings(model: ModelConfig, kind: str, converted: Collection[str], itemsize: int, tensor: int = 1) -> float:
    """Elements of `itemsize` bytes for each own token that native float8 saves in a block of `kind`; may be negative.

    `converted` are linear layers by their names in a block. Their inputs are kept in one byte instead, and once if
    several read the same norm's result. But another reader of that result keeps it too, and an operator that saves its
    own result, such as attention, keeps it beside the input of the next layer.
    """
    total = 0.0
    for branch in Block.branches:
        linears = _linears(model, kind, branch)
        readers = [name for name, linear in linears.items() if linear.spec.role.reads_residual_stream]
        if _branch(model, kind, branch).linear_input:
            total += linears[readers[0]].in_features * (1 - 1 / itemsize) if readers[0] in converted else 0
        else:
            total -= sum(linears[name].in_features / itemsize for name in readers if name in converted)
        for name, linear in linears.items():
            if name in converted and linear.spec.role is Role.RESIDUAL_OUTPUT:
                saved_twice = _branch(model, kind, branch).saved(model, tensor).saves_result
                total += linear.in_features / tensor * ((0 if saved_twice else 1) - 1 / itemsize)
    return total


def has_operators(model: ModelConfig, kind: str, converted: Collection[str]) -> bool:
    """Whether norms and SwiGLU of a block of `kind` are operators of native float8, with these layers converted."""
    if model.norm != "rmsnorm":  # the other's result is cast, but there is no operator for it
        return False
    readers = _branch(model, kind, "attention").input_readers()
    names = {f"attention.{name}" for name in readers} | _linears(model, kind, "feed_forward").keys()
    return bool(readers) and names <= set(converted)


def kept_by_operators(model: ModelConfig, kind: str, branch: str, context: int = 1, tensor: int = 1) -> float:
    """What a branch that is checkpointed by operators (parallel/activation_checkpoint.py) keeps beside its input.

    Those are the results of its linear layers but for the recomputed ones, and of attention.
    """
    kept = 0.0
    for linear in _linears(model, kind, branch).values():
        if not linear.spec.recomputed:
            kept += linear.out_features / (1 if linear.spec.role is Role.REPLICATED else tensor)
        if linear.spec.role is Role.RESIDUAL_OUTPUT and _branch(model, kind, branch).saved(model, tensor).saves_result:
            kept += linear.in_features / tensor
    return kept / context


def block_bytes(config: Config, degrees: Degrees, layers: Sequence[int], micro_batch_size: int = 1) -> int:
    """Bytes that these layers keep on a rank for one sequence of a micro-batch, by [activation_checkpoint].

    Regions that are recomputed need, besides, what one of them keeps without checkpointing, while its backward pass
    runs: see `recomputed_bytes`.
    """
    return round(sum(_of_layer(config, degrees, layer, micro_batch_size)[0] for layer in layers))


def recomputed_bytes(config: Config, degrees: Degrees, layers: Sequence[int], micro_batch_size: int = 1) -> int:
    """Bytes for one sequence that the backward pass of the largest recomputed region recomputes; 0 without one."""
    return round(max((_of_layer(config, degrees, layer, micro_batch_size)[1] for layer in layers), default=0))


def _of_layer(config: Config, degrees: Degrees, layer: int, micro_batch_size: int) -> tuple[float, float]:
    """Bytes for one sequence that a layer keeps, and that its largest recomputed region recomputes."""
    model, settings = config.model, config.activation_checkpoint
    kind = model.block_kinds[layer]
    of_kernels = {name: _saved_by_kernels(config, degrees, kind, name, micro_batch_size) for name in Block.branches}
    branches = {name: _branch_elements(config, degrees, kind, name) + of_kernels[name] for name in Block.branches}
    its_input = model.dim / (degrees.tensor * degrees.context)
    regions = checkpointed_regions(settings, layer)
    recomputed = 0.0
    kept = sum(branches.values())
    for region in regions.values():
        without = sum(branches[branch] for branch in region)  # checkpointing
        of_region = its_input
        if keeps_operators(settings):
            of_region += sum(kept_by_operators(model, kind, each, degrees.context, degrees.tensor) for each in region)
            of_region += sum(of_kernels[each] for each in region)
        recomputed = max(recomputed, without - of_region)
        kept += of_region - without
    if settings.memory_budget < 1:  # of the compiler: 0 keeps the inputs alone, 1 everything
        recomputed = (1 - settings.memory_budget) * (kept - its_input)
        kept -= recomputed
    of_annexes, of_one = _of_annexes(config, degrees, layer)
    unit = config.training.seq_len * itemsize(config)
    return (kept + of_annexes) * unit, max(recomputed, of_one) * unit


def _of_annexes(config: Config, degrees: Degrees, layer: int) -> tuple[float, float]:
    """Elements a token that the annexes before a layer keep, and that the largest recomputed one recomputes."""
    model, settings = config.model, config.activation_checkpoint
    its_input, total, most = model.dim / (degrees.tensor * degrees.context), 0.0, 0.0
    for annex in annexes_of(model, layer).values():
        saved = annex.saved(model, degrees.tensor)
        own = saved.local / degrees.context
        total += its_input
        if is_annex_recomputed(settings, layer) and not keeps_operators(settings):
            looked_up = annex.looked_up(model) / (degrees.tensor * degrees.context)  # an input too, so it stays
            most = max(most, own - looked_up)
            total += looked_up
        else:
            total += own + saved.sequence
    return total, most


def _branch_elements(config: Config, degrees: Degrees, kind: str, branch: str) -> float:
    """What a residual branch keeps for each token if nothing of it is recomputed, as this run computes it."""
    model, dtype = config.model, config.training.compute_dtype
    elements = kept_by_branch(model, kind, branch, degrees.context, degrees.tensor)
    converted = set[str]()
    if config.float8.recipe == "native":
        converted = {each.kind for each in float8_coverage(config) if each.why_not is None}
        own = {each for each in converted if each.startswith(f"{branch}.")}
        elements -= native_savings(model, kind, own, itemsize(config), degrees.tensor) / degrees.context
    if not config.compile.enabled and not (degrees.tensor == 1 and has_operators(model, kind, converted)):
        elements *= EAGER_FACTOR[dtype]
    return elements


def _saved_by_kernels(config: Config, degrees: Degrees, kind: str, branch: str, micro_batch_size: int) -> float:
    """What kernels save for each token beside their inputs and result, in elements of the compute dtype."""
    seq_len, dtype = config.training.seq_len, getattr(torch, config.training.compute_dtype)
    chunk = SequenceLayout(seq_len, degrees.context, 0).chunk if degrees.context > 1 else None
    saved = _branch(config.model, kind, branch).saved_by_kernels(config.model, micro_batch_size, seq_len, chunk, dtype)
    return saved / itemsize(config)


def recomputed_operations(config: Config, layer: int) -> int:
    """Operations of a layer's forward pass over a sequence that its backward pass repeats, by model/counts.py's count.

    The output layer of a region's last branch is not repeated, because the backward pass does not need its result. Not
    counted is what the compiler repeats by `memory_budget`, because that is its own choice.
    """
    model, settings, length = config.model, config.activation_checkpoint, config.training.seq_len
    regions = checkpointed_regions(settings, layer)
    if not regions:
        return 0
    kind = model.block_kinds[layer]
    operators, total = keeps_operators(settings), 0
    for region in regions.values():
        linears = [(branch, linear) for branch in region for linear in _linears(model, kind, branch).values()]
        repeated = [
            linear.weight.numel()
            for branch, linear in linears
            if (linear.spec.recomputed or not operators)
            and not (branch == region[-1] and linear.spec.role is Role.RESIDUAL_OUTPUT)
        ]
        total += 2 * length * sum(repeated)
        if "attention" in region and not operators:
            total += BLOCKS[kind].flops(model, BLOCKS[kind].pairs(model, length))
    return total


def recomputed_share(config: Config) -> float:
    """Operations that the backward passes repeat, as a share of those of training without checkpointing."""
    model, length = config.model, config.training.seq_len
    repeated = sum(recomputed_operations(config, layer) for layer in range(model.num_layers))
    return repeated / (length * training_flops_per_token(model, length))


def _branch(model: ModelConfig, kind: str, branch: str) -> Branch:
    found = _block(model, kind).get_submodule(branch)
    assert isinstance(found, Branch)
    return found


@functools.cache
def _linears(model: ModelConfig, kind: str, branch: str) -> dict[str, Linear]:
    """The linear layers of a residual branch by their names in the block."""
    modules = _branch(model, kind, branch).named_modules(prefix=branch)
    return {name: module for name, module in modules if isinstance(module, Linear)}


@functools.cache
def _block(model: ModelConfig, kind: str) -> Block:
    with torch.device("meta"):
        return Block(model, kind)
