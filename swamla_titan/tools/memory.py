"""The memory that one rank needs on its GPU: counted on the model parts that it would hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.rules import wants_fused_loss
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.cross_entropy import tokens_per_chunk
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.layers import Linear
from swamla_titan.model.row_table import RowTable, row_tables
from swamla_titan.optim import bytes_of_average, state_bytes
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions
from swamla_titan.parallel.data_parallel import layer_units, reshards_after_forward, stays_replicated
from swamla_titan.parallel.float8 import gathers_float8
from swamla_titan.parallel.row_tables import bytes_on_host
from swamla_titan.tools.activations import itemsize

_FLOAT32, _INT64 = 4, 8

# Peak bytes per logit of a loss that is not compiled, measured: float32 intermediates and the gradient.
EAGER_LOSS_BYTES = 20


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank by purpose.

    Exact are `parameters`, `optimizer` and `average`. Not counted are communication buffers, float8 values that are not
    saved, workspaces and fragmentation.
    """

    parameters: int
    optimizer: int
    average: int
    # Float32, sharded as the parameters; of several micro-batches unsharded, until the last one reduces them. Of
    # tables, of the rows looked up.
    gradients: int
    weights_in_use: int  # copies in the compute dtype, with which forward and backward passes multiply
    logits: int  # of the micro-batches between forward and backward pass, and the gradient of one
    # Those that blocks save, those that one block at a time recomputes, and rows read ahead from tables on the host.
    activations: int
    # Of gradients and activations, the part that never exists beside the rest of them. With one micro-batch a block's
    # gradients come when its activations are freed; with several, gradients stay beside the next one's activations.
    in_turn: int
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
    """The memory of the rank of `world`, which holds `parts` and runs `micro_batches` per step."""
    tables = {weight for part in parts for weight in row_tables(part)}
    weights = [weight for part in parts for weight in part.parameters()]
    parameters = _FLOAT32 * sum(local(weight).numel() for weight in weights)
    state = sum(state_bytes(part, config.optimizer) for part in parts)
    average = sum(bytes_of_average(part) for part in parts) if config.ema.decay else 0

    unreduced = micro_batches > 1 and not config.parallel.reduce_every_micro_batch
    of_tables = _looked_up(parts, config, world, micro_batch_size)
    looked_up = sum(rows * width for rows, width in of_tables)
    dense = [gathered_elements(each) if unreduced else local(each).numel() for each in weights if each not in tables]
    gradients = _FLOAT32 * (sum(dense) + looked_up * micro_batches)

    offloaded = sum(bytes_on_host(part, config) for part in parts)
    if config.parallel.cpu_offload:  # of gradients too, as soon as they are reduced
        offloaded = parameters + state + average + (0 if unreduced else gradients)

    logits = _logits(parts, config, world, micro_batch_size, in_flight.logits)
    read_ahead = _FLOAT32 * looked_up if config.parallel.tables_on_host else 0
    activations = in_flight.activations + in_flight.recomputed + read_ahead
    takes_turns = micro_batches == 1 and not config.parallel.cpu_offload
    in_turn = min(gradients, in_flight.activations) if takes_turns else 0
    shared = world.stage_group is not None and world.stage_group.size() > 1  # then ranks exchange float32
    merging = merge_bytes(of_tables, micro_batches, _FLOAT32 if shared else itemsize(config))
    return Memory(
        parameters=parameters,
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
    width = itemsize(config)
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
    width, parallel = itemsize(config), config.parallel
    embedding, head, norm = (
        _copied(getattr(part, name, None), config, width) for name in ("embedding", "head", "norm")
    )
    ends_are_tied = bool(part.config.tie_embeddings and embedding and head)

    def units(float8_width: int | None = None) -> list[list[int]]:
        """Of each layer, and what comes before and after the layers."""
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
    width = itemsize(config)
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
