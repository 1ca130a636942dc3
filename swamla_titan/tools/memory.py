"""The memory that one rank needs on its GPU: counted on the model parts that it would hold; activations are estimated.

What blocks keep between a forward and a backward pass follows from their shapes. A compiled block keeps, for each
token, the inputs of linear layers and of attention, and the results of linear layers where arithmetic on them is
repeated: 4 dim of the residual stream and both norms' results, and what each branch declares as `saved`
(model/branch.py). With float8.recipe = "native" the inputs of converted linear layers are kept as float8
(`native_savings`).

The estimate leaves out masks, and what is one element a head and token. Eager blocks keep more, each float32
intermediate of norms and rotations, except where native float8 has operators for all of those. Blocks checkpointed by
operators keep the results of linear layers, which float8 gives in the dtype that they have without it.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.rules import wants_fused_loss
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.attention.selective import saved_sums
from swamla_titan.kernels.linear_cross_entropy import tokens_per_chunk
from swamla_titan.model import Block, ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.branch import Attention, Branch
from swamla_titan.model.counts import training_flops_per_token
from swamla_titan.model.layers import Linear, Role
from swamla_titan.model.row_table import RowTable, row_tables
from swamla_titan.optim import bytes_of_average, state_bytes
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions, is_annex_recomputed, keeps_operators
from swamla_titan.parallel.data_parallel import layer_units, reshards_after_forward, stays_replicated
from swamla_titan.parallel.float8 import float8_coverage, gathers_float8
from swamla_titan.parallel.row_tables import bytes_on_host

_FLOAT32, _INT64 = 4, 8

# Peak bytes per logit of a loss that is not compiled, measured: float32 intermediates and the gradient.
EAGER_LOSS_BYTES = 20

# Eager to compiled, measured on a CPU for both kinds of block; float32 has no casts that would be kept.
EAGER_FACTOR = {"float32": 1.3, "bfloat16": 1.5}


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose: `parameters`, `optimizer` and `average` are exact; `memory_of` defines the others."""

    parameters: int
    optimizer: int
    average: int
    gradients: int
    weights_in_use: int
    logits: int
    activations: int
    in_turn: int  # of gradients and activations, the part that never exists beside the rest of them
    merging: int  # what merging the gradients of tables needs beyond logits and activations, which are gone by then
    offloaded: int  # of the first four, the part that is kept on the host

    @property
    def total(self) -> int:
        """All bytes on the GPU."""
        training = self.parameters + self.optimizer + self.average + self.gradients
        passes = self.logits + self.activations - self.in_turn
        return training + self.weights_in_use + passes + self.merging - self.offloaded


@dataclass(frozen=True)
class InFlight:
    """The most that a rank keeps between forward and backward passes."""

    activations: int  # bytes
    recomputed: int  # bytes of activations that one block at a time recomputes in its backward pass
    logits: int  # micro-batches whose logits are kept


def memory_of(
    parts: Sequence[SWAMLAModel],
    config: Config,
    world: World,
    micro_batch_size: int,
    micro_batches: int,
    in_flight: InFlight,
) -> Memory:
    """The memory of the rank of `world`, which holds `parts` and runs `micro_batches` per step.

    gradients: float32, sharded as the parameters; of several micro-batches unsharded, until the last one reduces them.
    Of tables, of the rows looked up.
    weights_in_use: copies in the compute dtype, with which forward and backward passes multiply.
    logits: of the micro-batches between forward and backward pass, and the gradient of one.
    activations: those that blocks save, those that one block at a time recomputes, and the rows that are read ahead
    from tables on the host.
    in_turn: with one micro-batch a block's gradients come when its activations are freed, so only the larger of both
    counts; with several, gradients stay beside the activations of the next micro-batch.
    merging: as `merge_bytes`, where that is more.
    Not counted: communication buffers, float8 values that are not saved, workspaces and fragmentation.
    """
    parameters = [parameter for part in parts for parameter in part.parameters()]
    held = [local(parameter).numel() for parameter in parameters]
    state = sum(state_bytes(part, config.optimizer) for part in parts)
    average = sum(bytes_of_average(part) for part in parts) if config.ema.decay else 0
    unreduced = micro_batches > 1 and not config.parallel.reduce_every_micro_batch
    tables = {weight for part in parts for weight in row_tables(part)}
    others = [parameter for parameter in parameters if parameter not in tables]
    gradients = sum(gathered_elements(p) if unreduced else local(p).numel() for p in others)
    of_tables = _looked_up(parts, config, world, micro_batch_size)
    looked_up = sum(rows * width for rows, width in of_tables)
    gradients += looked_up * micro_batches
    gradients *= _FLOAT32
    offload = config.parallel.cpu_offload  # of gradients too, as soon as they are reduced
    offloaded = sum(bytes_on_host(part, config) for part in parts)
    read_ahead = _FLOAT32 * looked_up if config.parallel.tables_on_host else 0
    if offload:
        offloaded = _FLOAT32 * sum(held) + (0 if unreduced else gradients) + state + average
    logits = _logits(parts, config, world, micro_batch_size, in_flight.logits)
    activations = in_flight.activations + in_flight.recomputed + read_ahead
    in_turn = min(gradients, in_flight.activations) if micro_batches == 1 and not offload else 0
    shared = world.stage_group is not None and world.stage_group.size() > 1  # then ranks exchange float32
    merging = merge_bytes(of_tables, micro_batches, _FLOAT32 if shared else _itemsize(config))
    return Memory(
        parameters=_FLOAT32 * sum(held),
        optimizer=state,
        average=average,
        gradients=gradients,
        weights_in_use=sum(weights_in_use(part, config, world, micro_batches) for part in parts),
        logits=logits,
        activations=activations,
        in_turn=in_turn,
        merging=max(merging - (logits + activations - in_turn), 0),
        offloaded=offloaded,
    )


def _looked_up(
    parts: Sequence[SWAMLAModel], config: Config, world: World, micro_batch_size: int
) -> list[tuple[int, int]]:
    """Of each table, how many rows a rank looks up for a micro-batch, and their width."""
    tokens = micro_batch_size * config.training.seq_len // (world.degrees.context * world.degrees.tensor)
    annexes = [annex for part in parts for _, annex in part.annexes.each()]
    widths = [annex.table.weight.shape[1] for annex in annexes]
    return [(tokens * annex.looked_up(config.model) // width, width) for annex, width in zip(annexes, widths)]


def merge_bytes(looked_up: Sequence[tuple[int, int]], micro_batches: int, itemsize: int) -> int:
    """The most that exists beside the sums while the gradients of tables are merged (RowGradient.merge), on a GPU.

    `looked_up` is the (rows, width) of each table for a micro-batch, `itemsize` that of the gradients before they are
    summed. Of the table being merged: rows and values of all micro-batches, concatenated. Of each: its Segments, four
    numbers per row, which stay until the optimizer has moved the table.
    """
    segments = sum(4 * _INT64 * rows for rows, _ in looked_up)
    return micro_batches * (
        segments + max((rows * (width * itemsize + _INT64) for rows, width in looked_up), default=0)
    )


def gathered_elements(parameter: Tensor) -> int:
    """Elements of a weight as a matmul reads it: gathered over FSDP's ranks, sharded by tensor parallelism."""
    elements = parameter.numel()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, size, placement in zip(names, parameter.device_mesh.shape, parameter.placements):
            if name == "tensor" and placement.is_shard():
                elements //= size
    return elements


def weights_in_use(part: SWAMLAModel, config: Config, world: World, micro_batches: int = 1) -> int:
    """The most bytes of copies of a part's weights that exist at once, beside the parameters.

    Weights that are replicated in float32 (norms) are never copied.
    """
    if world.weights is None or world.weights["replicate"].size() * world.weights["shard"].size() == 1:
        return _cast_weights(part, config, micro_batches)
    return _gathered_weights(part, config, world, micro_batches)


def _cast_weights(part: SWAMLAModel, config: Config, micro_batches: int) -> int:
    """Without data parallelism each linear layer casts its weight, and saves the copy for its backward pass.

    A recomputed block saves none, and float32 needs none. Native float8 saves W^T, one byte per element, and with
    several micro-batches W too, because both are then cast once for all of them.
    """
    width = _itemsize(config)
    cast = 0 if width == _FLOAT32 else width
    native = config.float8.recipe == "native"
    float8_width = 1 + (micro_batches > 1) if native else cast

    def copied(module: nn.Module) -> int:
        return _copied(module, config, cast, float8_width)

    saved, recomputed = sum(map(copied, _layers(part))), 0
    if not (native and micro_batches > 1):
        for name, block in part.blocks.items():
            for region in checkpointed_regions(config.activation_checkpoint, int(name)).values():
                freed = sum(copied(block.get_submodule(branch)) for branch in region)
                saved, recomputed = saved - freed, max(recomputed, freed)
    return saved + recomputed + _copied(getattr(part, "head", None), config, cast)


def _gathered_weights(part: SWAMLAModel, config: Config, world: World, micro_batches: int) -> int:
    """With data parallelism: the gathered weights, all of them under DDP or if FSDP2 does not reshard.

    FSDP2 that reshards holds each communication unit (parallel/data_parallel.py) while it computes, the next ones up to
    a block, which are gathered meanwhile, and a tied embedding always. Torchao's float8 weights take one byte per
    element if FSDP2 gathers float8. Where gathered weights stay, native float8 saves W^T beside them, one byte per
    element, and W too under DDP with several micro-batches.
    """
    width, parallel = _itemsize(config), config.parallel
    embedding, head, norm = (
        _copied(getattr(part, name, None), config, width) for name in ("embedding", "head", "norm")
    )
    ends_are_tied = bool(part.config.tie_embeddings and embedding and head)

    def units(float8_width: int | None = None) -> list[list[int]]:
        """Of each layer, and before and behind them what is no layer."""
        layers = [[_copied(unit, config, width, float8_width) for unit in layer] for layer in layer_units(part)]
        return [[0], *layers] if ends_are_tied else [[embedding], *layers, [head + norm]]

    always = embedding + norm if ends_are_tied else 0
    frees = parallel.data_parallel != "ddp" and reshards_after_forward(parallel, always + sum(map(sum, units())))
    gathered = units(1 if gathers_float8(config, world.degrees) else None)
    at_once = (one[-1] + sum(following) for one, following in pairwise([*gathered, [0]]))
    most = max(at_once) if frees else sum(map(sum, gathered))
    both = micro_batches > 1 and parallel.data_parallel == "ddp"
    saves_float8 = config.float8.recipe == "native" and not frees
    float8 = sum(_copied(block, config, 0, 1 + both) for block in _layers(part)) if saves_float8 else 0
    return always + most + float8


def _layers(part: SWAMLAModel) -> list[nn.Module]:
    """Annexes and blocks, each a communication unit."""
    return [unit for layer in layer_units(part) for unit in layer]


def _itemsize(config: Config) -> int:
    dtype: torch.dtype = getattr(torch, config.training.compute_dtype)
    return dtype.itemsize


def _copied(module: nn.Module | None, config: Config, width: int, float8_width: int | None = None) -> int:
    """Bytes of copies of a module's weights, `width` per element, or `float8_width` in float8 linear layers."""
    total = 0
    for each in module.modules() if module is not None else ():
        if isinstance(each, RowTable):  # never gathered, and only the rows looked up are cast
            continue
        is_float8 = getattr(type(each), "matmul", Linear.matmul) is not Linear.matmul
        for weight in each.parameters(recurse=False):
            if not stays_replicated(weight, config.parallel):
                per_element = float8_width if is_float8 and float8_width is not None else width
                total += gathered_elements(weight) * per_element
    return total


def _logits(parts: Sequence[SWAMLAModel], config: Config, world: World, micro_batch_size: int, in_flight: int) -> int:
    if not any(hasattr(part, "head") for part in parts):
        return 0
    tokens = micro_batch_size * config.training.seq_len // world.degrees.context
    logits = tokens * config.model.padded_vocab_size // world.degrees.tensor
    width = _itemsize(config)
    if wants_fused_loss(config):
        vocabulary, dim = config.model.padded_vocab_size, config.model.dim
        chunk = tokens_per_chunk(tokens, vocabulary, width)
        # The weight's gradient is accumulated in float32, in 16 bits out of place: so twice, if there are more chunks.
        sums = 2 if chunk < tokens and width < _FLOAT32 else 1
        return chunk * vocabulary * width + tokens * dim * width + sums * vocabulary * dim * _FLOAT32
    if config.compile.enabled:
        return logits * width * (in_flight + 1)
    # Micro-batches in flight keep the float32 logits and a mask beside them; the last one is at its peak.
    return logits * ((width + _FLOAT32 + 1) * (in_flight - 1) + EAGER_LOSS_BYTES)


def kept_elements(model: ModelConfig, kind: str, context: int = 1, tensor: int = 1) -> float:
    """Elements that a compiled block of `kind` keeps on a rank for each token of a sequence.

    The ranks of `context` shard the tokens, but some kinds gather the keys and values of full sequences. The ranks of
    `tensor` shard heads and hidden units, and the residual stream's tokens; the norms' results they have gathered.
    """
    return sum(kept_by_branch(model, kind, branch, context, tensor) for branch in Block.branches)


def kept_by_branch(model: ModelConfig, kind: str, branch: str, context: int = 1, tensor: int = 1) -> float:
    """What one residual branch keeps of it: its input, the norm's result, and what the branch saves."""
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


def block_bytes(config: Config, degrees: Degrees, layers: Sequence[int], rows: int = 1) -> int:
    """Bytes that these layers keep on a rank for one sequence of a micro-batch of `rows`, by [activation_checkpoint].

    Regions that are recomputed need, besides, what one of them keeps without checkpointing, while its backward pass
    runs: see `recomputed_bytes`.
    """
    return round(sum(_of_layer(config, degrees, layer, rows)[0] for layer in layers))


def recomputed_bytes(config: Config, degrees: Degrees, layers: Sequence[int], rows: int = 1) -> int:
    """Bytes for one sequence that the backward pass of the largest recomputed region recomputes; 0 without one."""
    return round(max((_of_layer(config, degrees, layer, rows)[1] for layer in layers), default=0))


def _of_layer(config: Config, degrees: Degrees, layer: int, rows: int) -> tuple[float, float]:
    """Bytes for one sequence that a layer keeps, and that its largest recomputed region recomputes."""
    model, settings = config.model, config.activation_checkpoint
    kind = model.block_kinds[layer]
    branches = {branch: _branch_elements(config, degrees, kind, branch) for branch in Block.branches}
    sums = _sums_of_selection(config, degrees, kind, rows)
    branches["attention"] += sums
    its_input = model.dim / (degrees.tensor * degrees.context)
    regions = checkpointed_regions(settings, layer)
    recomputed = 0.0
    kept = sum(branches.values())
    for region in regions.values():
        without = sum(branches[branch] for branch in region)  # checkpointing
        of_region = its_input
        if keeps_operators(settings):
            of_region += sum(kept_by_operators(model, kind, each, degrees.context, degrees.tensor) for each in region)
            of_region += sums if "attention" in region else 0
        recomputed = max(recomputed, without - of_region)
        kept += of_region - without
    if settings.memory_budget < 1:  # of the compiler: 0 keeps the inputs alone, 1 everything
        recomputed = (1 - settings.memory_budget) * (kept - its_input)
        kept -= recomputed
    of_annexes, of_one = _of_annexes(config, degrees, layer)
    unit = config.training.seq_len * getattr(torch, config.training.compute_dtype).itemsize
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
        itemsize = getattr(torch, dtype).itemsize
        elements -= native_savings(model, kind, own, itemsize, degrees.tensor) / degrees.context
    if not config.compile.enabled and not (degrees.tensor == 1 and has_operators(model, kind, converted)):
        elements *= EAGER_FACTOR[dtype]
    return elements


def _sums_of_selection(config: Config, degrees: Degrees, kind: str, rows: int) -> float:
    """What our kernels of selective attention save for each token beyond other attention, in units of 16 bits."""
    mixer, training = BLOCKS[kind], config.training
    itemsize = getattr(torch, training.compute_dtype).itemsize
    if not issubclass(mixer, Attention) or mixer.selection_head(config.model) is None or itemsize > 2:
        return 0
    chunks = 2 if degrees.context > 1 else 1  # parallel/sequence_layout.py
    length = training.seq_len // (chunks * degrees.context)
    return chunks * saved_sums(rows, training.seq_len, length) * torch.float32.itemsize / itemsize


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
