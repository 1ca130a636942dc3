"""Activation checkpointing: which results of a block's forward pass are kept for the backward pass.

The rest is recomputed (Chen et al., arXiv:1604.06174). A checkpointed block is the same module: it only gets other
`regions`, which run its forward pass, or that of its residual branches, under `torch.utils.checkpoint`. A wrapping
module would rename parameters. Hooks that are added later (FSDP2's, which gather weights) run outside of a region and
are not repeated.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import swamla_titan.kernels.float8.linear  # noqa: F401  registers its operators
from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint
from swamla_titan.distributed.dtensor import local
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import IMPLEMENTATIONS
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block
from swamla_titan.model.branch import Regions
from swamla_titan.model.layers import spec_of

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
_ATTENTION = frozenset(operator for each in IMPLEMENTATIONS for operator in each.operators)
_collective = torch.ops._c10d_functional
# Their repetition would keep all ranks waiting once more. Not among them: the waits (a wait's result is the memory of
# its collective) and FSDP2's gathering of weights, which happens outside of the block's forward pass.
_COLLECTIVES = frozenset(
    {
        _collective.all_gather_into_tensor.default,
        _collective.reduce_scatter_tensor.default,
        _collective.all_reduce.default,
        _collective.all_to_all_single.default,
    }
)
# Of each matmul the [in, out] of its weight, by its arguments.
_WEIGHT_SHAPES: dict[Any, Callable[..., tuple[int, ...]]] = {
    _aten.mm.default: lambda *args: args[1].shape,
    _aten._scaled_mm.default: lambda *args: args[1].shape,
    _aten.addmm.default: lambda *args: args[2].shape,
    torch.ops.swamla_titan.float8_product.default: lambda *args: args[4].shape[::-1],
}

# A matmul of [N, K] and [K, M] costs 2 N K M operations and its result holds N M elements: dropping it frees memory at
# 2 K operations an element. So linear layers declare whether theirs is recomputed (LinearSpec). In a SWA block that
# keeps 6 dim of 16 elements a token, for 44% of the forward operations of its linear layers again; `full` keeps 1 dim,
# for 78%.


def _keep_all() -> Any:
    """What `checkpoint` takes as `context_fn`, to keep all that a region computes."""
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


_keep_all.cache_hash = "keep all"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _CheckpointedRegions(Regions):
    """Recomputes the regions of these names in the backward pass, as far as `contexts` says (None: all of them)."""

    names: frozenset[str]
    contexts: Callable[[], Any] | None

    def run(self, name: str, forward: Callable[..., Any], *inputs: Any) -> Any:
        """As in Regions."""
        options: dict[str, Any] = {} if self.contexts is None else {"context_fn": self.contexts}
        if name == "residual" and "attention" in self.names and torch.compiler.is_compiling():
            # Else the compiler, for which what is recomputed is free, would make this again too, out of attention: both
            # branches then had to be there at once.
            options = {"context_fn": _keep_all}
        elif name not in self.names:
            return forward(*inputs)
        # Random state is restored for the repetition (torch's default), so dropout drops the same.
        return checkpoint(forward, *inputs, use_reentrant=False, **options)


# The regions that a block is cut into, by activation_checkpoint.modules; of each, the residual branches inside.
_REGIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "block": {"block": ("attention", "feed_forward")},
    "attention": {"attention": ("attention",)},
    "feed_forward": {"feed_forward": ("feed_forward",)},
    "both": {"attention": ("attention",), "feed_forward": ("feed_forward",)},
}


def checkpointed_regions(config: ActivationCheckpoint, layer: int) -> dict[str, tuple[str, ...]]:
    """The regions of this layer that are checkpointed, each with the residual branches that it is made of.

    Layers are counted over the whole model, also where a pipeline stage holds a part of it.
    """
    by_blocks = config.mode == "selective" and config.selective == "blocks"
    if config.mode == "none" or (by_blocks and (layer + 1) % config.every_n_blocks):
        return {}
    return _REGIONS[config.modules]


def is_annex_recomputed(config: ActivationCheckpoint, layer: int) -> bool:
    """Whether the annexes before this layer are checkpointed: where the block is, in full."""
    return "block" in checkpointed_regions(config, layer)


def keeps_operators(config: ActivationCheckpoint) -> bool:
    """Whether a checkpointed region keeps results of operators, and not its input alone."""
    return config.mode == "selective" and config.selective == "operators"


def validate_recomputation(config: Config, device: torch.device) -> None:
    """Raise UserError where compiled blocks cannot recompute what is asked for.

    That is on CPUs under tensor parallelism: of an operator that may draw random numbers, as attention and dropout may,
    torch (2.13) keeps the generator's state behind the mesh of the weights, and then takes one for the other. On GPUs
    it keeps no such state.
    """
    settings = config.activation_checkpoint
    if device.type != "cpu" or not config.compile.enabled or config.parallel.tensor == 1 or settings.mode == "none":
        return
    is_attention_repeated = settings.modules != "feed_forward" and not keeps_operators(settings)
    culprit = None
    if is_attention_repeated and config.kernels.attention != "reference":
        culprit = "attention"
    elif config.model.dropout and settings.modules == "block":
        culprit = "dropout"
    if culprit:
        raise UserError(
            f"activation_checkpoint: {culprit} cannot be recomputed in compiled blocks on a CPU with parallel.tensor = "
            f'{config.parallel.tensor}: set compile.enabled = false, or activation_checkpoint.modules = "feed_forward"'
        )


def apply_activation_checkpointing(model: SWAMLAModel, config: ActivationCheckpoint) -> None:
    """Checkpoint the blocks and annexes of the layers that `config` names, in place; parameter names stay.

    `full`: each block keeps its input alone. `selective` by blocks: so does each `every_n_blocks`-th layer. `selective`
    by operators: each block keeps the results of attention, collectives and most matmuls. With `modules` the same holds
    for a block's residual branches: for one, while the other keeps all, or for each by itself. Comes after tensor
    parallelism, which may change weights' shapes, and before compilation and FSDP2. `memory_budget` is the compiler's,
    see parallel/compile.py.

    Raises ValueError for a block that is checkpointed already.
    """
    if config.mode == "none":
        return
    blocks = model.blocks
    regions = {name: checkpointed_regions(config, int(name)) for name in blocks}
    chosen = [block for name, block in blocks.items() if regions[name]]
    # One object for all blocks: compiled code is specific to it.
    contexts = _contexts(_shapes_not_kept(chosen)) if keeps_operators(config) else None
    for name, block in blocks.items():
        assert isinstance(block, Block)
        if isinstance(block.regions, _CheckpointedRegions):
            raise ValueError(f"blocks.{name} cannot be checkpointed: it is already")
        if regions[name]:
            block.regions = _CheckpointedRegions(frozenset(regions[name]), contexts)
    for (name, _), annex in model.annexes.each():
        if is_annex_recomputed(config, int(name)):
            annex.regions = _CheckpointedRegions(frozenset({"annex"}), contexts)
    what = {"block": "", "both": "attention and feed-forward, each by itself, of "}
    of = what.get(config.modules, f"{config.modules.replace('_', '-')} of ")
    how = "except attention and narrow matmuls" if contexts else "in full"
    logger.info("activation checkpointing: %s%d of %d blocks recomputed, %s", of, len(chosen), len(blocks), how)


def _shapes_not_kept(blocks: Iterable[nn.Module]) -> frozenset[tuple[int, ...]]:
    """[in, out] of the weights whose matmuls are recomputed, in full and as this rank's shard of them.

    Operators know no names. Where a kept matmul has the same shape, it is recomputed as well.
    """
    shapes = set()
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and spec_of(name, module).recomputed:
                shapes |= {tuple(weight.shape[::-1]) for weight in (module.weight, local(module.weight))}
    return frozenset(shapes)


def _contexts(not_kept: frozenset[tuple[int, ...]]) -> Callable[[], Any]:
    """What `checkpoint` takes as `context_fn`."""
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, not_kept))
    # torch caches compiled code between runs only where this hash identifies the choice: here, by this file.
    source = Path(__file__).read_bytes() + repr((sorted(not_kept), sorted(map(str, _ATTENTION)))).encode()
    contexts.cache_hash = hashlib.sha256(source).hexdigest()  # type: ignore[attr-defined]
    return contexts


def _keep(
    not_kept: frozenset[tuple[int, ...]], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operator in _ATTENTION or operator in _COLLECTIVES:
        return CheckpointPolicy.MUST_SAVE
    shape = _WEIGHT_SHAPES.get(operator)
    if shape is not None and tuple(shape(*args)) not in not_kept:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
