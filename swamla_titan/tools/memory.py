"""The memory that one rank needs on its GPU, counted on the model parts that it would hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.loss import wants_fused_loss
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.linear_cross_entropy import tokens_per_chunk
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.linear import Linear
from swamla_titan.model.row_table import RowTable, row_tables
from swamla_titan.optim import bytes_of_average, state_bytes
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions
from swamla_titan.parallel.data_parallel import layer_units, reshards_after_forward, stays_replicated
from swamla_titan.parallel.parallelize import gathers_float8
from swamla_titan.parallel.row_tables import bytes_on_host

_FLOAT32 = 4

# Peak bytes per logit of a loss that is not compiled, measured: float32 intermediates and the gradient.
EAGER_LOSS_BYTES = 20


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
    offloaded: int  # of the first four, the part that is kept on the host

    @property
    def total(self) -> int:
        """All bytes on the GPU."""
        training = self.parameters + self.optimizer + self.average + self.gradients
        return training + self.weights_in_use + self.logits + self.activations - self.in_turn - self.offloaded


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
    looked_up = _looked_up(parts, config, world, micro_batch_size)
    gradients += looked_up * micro_batches
    gradients *= _FLOAT32
    offload = config.parallel.cpu_offload  # of gradients too, as soon as they are reduced
    offloaded = sum(bytes_on_host(part, config) for part in parts)
    read_ahead = _FLOAT32 * looked_up if config.parallel.tables_on_host else 0
    if offload:
        offloaded = _FLOAT32 * sum(held) + (0 if unreduced else gradients) + state + average
    return Memory(
        parameters=_FLOAT32 * sum(held),
        optimizer=state,
        average=average,
        gradients=gradients,
        weights_in_use=sum(weights_in_use(part, config, world, micro_batches) for part in parts),
        logits=_logits(parts, config, world, micro_batch_size, in_flight.logits),
        activations=in_flight.activations + in_flight.recomputed + read_ahead,
        in_turn=min(gradients, in_flight.activations) if micro_batches == 1 and not offload else 0,
        offloaded=offloaded,
    )


def _looked_up(parts: Sequence[SWAMLAModel], config: Config, world: World, micro_batch_size: int) -> int:
    """Elements that a rank looks up in tables for a micro-batch."""
    tokens = micro_batch_size * config.training.seq_len // (world.degrees.context * world.degrees.tensor)
    return tokens * sum(annex.looked_up(config.model) for part in parts for _, annex in part.annexes.each())


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
