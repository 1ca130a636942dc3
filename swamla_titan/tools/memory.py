"""What one rank holds in the memory of its GPU, counted on the parts of the model as they were laid out for it."""

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
from swamla_titan.kernels.linear_cross_entropy import tokens_at_a_time
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.linear import Linear
from swamla_titan.optim import state_bytes
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions
from swamla_titan.parallel.data_parallel import reshards_after_forward, stays_replicated
from swamla_titan.parallel.parallelize import gathers_float8

_FLOAT32 = 4

# Bytes a logit at the peak of a loss that is not compiled, gradient included: float32 in several forms, measured.
EAGER_LOSS_BYTES = 20


@dataclass(frozen=True)
class Memory:
    """Bytes. `parameters`, `optimizer` and `average` are exact; see `memory_of` for the rest."""

    parameters: int
    optimizer: int
    average: int
    gradients: int
    weights_in_use: int
    logits: int
    activations: int
    in_turn: int  # of gradients and activations, what is never there with the rest of them
    offloaded: int  # of the first four, what parallel.cpu_offload keeps on the host

    @property
    def total(self) -> int:
        """Of all that is counted, on the GPU."""
        training = self.parameters + self.optimizer + self.average + self.gradients
        return training + self.weights_in_use + self.logits + self.activations - self.in_turn - self.offloaded


@dataclass(frozen=True)
class InFlight:
    """What a rank keeps between forward and backward passes when that is most."""

    activations: int  # bytes
    again: int  # bytes of activations that one block at a time computes again in its backward pass
    logits: int  # micro-batches whose logits are kept


def memory_of(
    parts: Sequence[SWAMLAModel], config: Config, world: World, rows: int, micro_batches: int, in_flight: InFlight
) -> Memory:
    """The memory of the rank whose place `world` is and whose laid-out model are `parts`.

    `micro_batches` of `rows` sequences a step.

    gradients: float32, like the parameters; until the last micro-batch of several reduces them, unsharded.
    weights_in_use: copies in the compute dtype that passes multiply with, beside the parameters.
    logits: of the micro-batches between forward and backward, and one gradient of them.
    activations: those of the blocks, with what one of them computes again.
    in_turn: with one micro-batch a block's gradients come when the activations that it kept have gone, so the larger of
    both counts; the gradients of several wait beside the activations of the next.
    Not counted are buffers of communication, float8 numbers that wait for nothing, workspaces and fragmentation.
    """
    parameters = [parameter for part in parts for parameter in part.parameters()]
    held = [local(parameter).numel() for parameter in parameters]
    state = sum(state_bytes(part, config.optimizer) for part in parts)
    average = _FLOAT32 * sum(held) if config.ema.decay else 0
    waiting = micro_batches > 1 and not config.parallel.reduce_every_micro_batch
    gradients = sum(gathered_elements(p) for p in parameters) if waiting else sum(held)
    gradients *= _FLOAT32
    offload = config.parallel.cpu_offload  # of gradients too, as soon as they are there
    offloaded = _FLOAT32 * sum(held) * (1 if waiting else 2) + state + average
    return Memory(
        parameters=_FLOAT32 * sum(held),
        optimizer=state,
        average=average,
        gradients=gradients,
        weights_in_use=sum(weights_in_use(part, config, world, micro_batches) for part in parts),
        logits=_logits(parts, config, world, rows, in_flight.logits),
        activations=in_flight.activations + in_flight.again,
        in_turn=min(gradients, in_flight.activations) if micro_batches == 1 and not offload else 0,
        offloaded=offloaded if offload else 0,
    )


def gathered_elements(parameter: Tensor) -> int:
    """Elements of what a product is given: FSDP's shards put together, tensor parallelism's not."""
    elements = parameter.numel()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, size, placement in zip(names, parameter.device_mesh.shape, parameter.placements):
            if name == "tensor" and placement.is_shard():
                elements //= size
    return elements


def weights_in_use(part: SWAMLAModel, config: Config, world: World, micro_batches: int = 1) -> int:
    """Most bytes of a part's weights that exist at a time as copies of the parameters.

    Under FSDP and HSDP that frees weights: each unit of communication (parallel/data_parallel.py) while it computes,
    beside the one that is fetched meanwhile, and a tied embedding all the time. Else, and under DDP, all.

    Without data parallelism a product casts its weight, and keeps that for its backward pass, unless it is
    recomputed; in float32 there is nothing to cast. What each rank keeps whole (norms) is never copied.

    Of native float8 products W^T is kept, in one byte a number, and W too if both are cast for all micro-batches (not
    by FSDP2); beside what was gathered, where that is kept. Torchao's are gathered in one byte where FSDP2 gathers
    float8.
    """
    width = getattr(torch, config.training.compute_dtype).itemsize
    native = config.float8.recipe == "native"
    around = ("embedding", "head", "norm")
    embedding, head, norm = (_copied(getattr(part, name, None), config, width) for name in around)
    if world.weights is None or world.weights["replicate"].size() * world.weights["shard"].size() == 1:
        cast = 0 if width == _FLOAT32 else width
        of_float8 = 1 + (micro_batches > 1) if native else cast

        def copied(module: nn.Module) -> int:
            return _copied(module, config, cast, of_float8)

        kept, again = sum(map(copied, part.blocks.values())), 0
        if not (native and micro_batches > 1):
            for name, block in part.blocks.items():
                for region in checkpointed_regions(config.activation_checkpoint, int(name)).values():
                    freed = sum(copied(block.get_submodule(branch)) for branch in region)
                    kept, again = kept - freed, max(again, freed)
        return kept + again + (head if cast else 0)
    blocks = [_copied(block, config, width) for block in part.blocks.values()]
    always = 0
    if part.config.tie_embeddings and embedding and head:
        units, always = blocks, embedding + norm
    else:
        units = [embedding, *blocks, head + norm]
    parallel = config.parallel
    frees = parallel.data_parallel != "ddp" and reshards_after_forward(parallel, always + sum(units))
    if gathers_float8(config, world.degrees):
        gathered = [_copied(block, config, width, 1) for block in part.blocks.values()]
        units = gathered if units is blocks else [embedding, *gathered, head + norm]
    most = max(one + following for one, following in pairwise([*units, 0])) if frees else sum(units)
    both = micro_batches > 1 and parallel.data_parallel == "ddp"
    kept = 0 if frees or not native else sum(_copied(block, config, 0, 1 + both) for block in part.blocks.values())
    return always + most + kept


def _copied(module: nn.Module | None, config: Config, width: int, of_float8: int | None = None) -> int:
    """Bytes of copies of a module's weights, `width` of a number, but `of_float8` of one of a converted product."""
    total = 0
    for each in module.modules() if module is not None else ():
        is_float8 = getattr(type(each), "matmul", Linear.matmul) is not Linear.matmul
        for weight in each.parameters(recurse=False):
            if not stays_replicated(weight, config.parallel):
                of_each = of_float8 if is_float8 and of_float8 is not None else width
                total += gathered_elements(weight) * of_each
    return total


def _logits(parts: Sequence[SWAMLAModel], config: Config, world: World, rows: int, in_flight: int) -> int:
    if not any(hasattr(part, "head") for part in parts):
        return 0
    tokens = rows * config.training.seq_len // world.degrees.context
    logits = tokens * config.model.padded_vocab_size // world.degrees.tensor
    dtype = config.training.compute_dtype
    width = getattr(torch, dtype).itemsize
    if wants_fused_loss(config):
        vocabulary, dim = config.model.padded_vocab_size, config.model.dim
        stretch = tokens_at_a_time(tokens, vocabulary, width)
        # Beside the weight's gradient in float32 there is the sum before, where 16-bit products are added to it.
        sums = 2 if stretch < tokens and width < _FLOAT32 else 1
        return stretch * vocabulary * width + tokens * dim * width + sums * vocabulary * dim * _FLOAT32
    if config.compile.enabled:
        return logits * width * (in_flight + 1)
    # What waits keeps its float32 form and a mask beside it; the last one is at its peak.
    return logits * ((width + _FLOAT32 + 1) * (in_flight - 1) + EAGER_LOSS_BYTES)
