"""Float8 in a run: which linear layers are computed in it, how FSDP2 gathers their weights, and what "auto" is.

"auto" in float8.recipe, and in optimizer.name with it, is resolved once a start, the same on all ranks.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from swamla_titan.config import Config
from swamla_titan.config.effects import without_effect
from swamla_titan.config.optimizer_rules import optimizer_conflicts
from swamla_titan.config.rules import why_not_gathered
from swamla_titan.config.schedule import configs_of_stages
from swamla_titan.config.sections import Float8, OptimizerName
from swamla_titan.data import micro_batch_size
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import ELSEWHERE, World, all_gather_dict
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import has_triton
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY, FLOAT8_MULTIPLE
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.optim import state_bytes
from swamla_titan.parallel.tensor import sides_on_a_rank
from swamla_titan.quantization.coverage import (
    LinearCoverage,
    little_gained,
    share_of,
    survey,
    validate_coverage,
    validate_device,
)


def float8_coverage(config: Config) -> list[LinearCoverage]:
    """The linear layers of the configured model and whether each is computed in float8; empty without float8.

    Also empty for "auto" before it is resolved (`resolve_auto`).
    """
    if config.float8.recipe in ("off", "auto"):
        return []
    model = replace(config.model, vocab_size=config.model.vocab_size or 1)  # not known before the tokenizer is
    return list(_coverage_of(model, config.float8, config.parallel.tensor))


def validate_float8(config: Config, device: torch.device, degrees: Degrees | None = None) -> None:
    """Raise UserError where `device` cannot compute what [float8] asks for, or nothing would be converted.

    Or where FSDP2 on ranks of these `degrees` (None: not known) cannot gather weights as "always" would have it.
    """
    if config.float8.recipe == "auto":  # which takes what is not refused
        return
    validate_device(config.float8.recipe, device)
    validate_coverage(float8_coverage(config), config.float8)
    if degrees:
        gathers_float8(config, degrees)


def gathers_float8(config: Config, degrees: Degrees) -> bool:
    """Whether FSDP2 gathers the weights of converted linear layers in float8 (float8.fsdp_all_gather).

    Not where weights are not sharded, and not where shards differ in size, because torchao sends them unpadded. Raises
    UserError if that rules "always" out.
    """
    wanted, shards = config.float8.fsdp_all_gather, degrees.weight_shards
    if wanted == "never" or why_not_gathered(config):
        return False
    if shards == 1:
        if wanted == "always":
            raise UserError(
                'float8.fsdp_all_gather = "always": every rank has full weights, and nothing is gathered; use '
                '"auto", or share them (parallel.dp_shard above 1)'
            )
        return False
    uneven = [
        each for each in float8_coverage(config) if not each.why_not and each.name != "head" and each.out % shards
    ]
    if uneven and wanted == "always":
        raise UserError(
            f'float8.fsdp_all_gather = "always": {shards} ranks cannot share the {uneven[0].out} rows of '
            f'{uneven[0].kind} evenly, as they would have to; use "auto", or other widths or numbers of ranks'
        )
    return not uneven


@functools.lru_cache  # for `plan`, which asks for every layer
def _coverage_of(shape: ModelConfig, float8: Float8, tensor: int) -> tuple[LinearCoverage, ...]:
    with torch.device("meta"):
        model = SWAMLAModel(shape)
    return tuple(survey(model, float8, functools.partial(sides_on_a_rank, tensor), norms_cast=tensor == 1))


class Resolved(NamedTuple):
    """A configuration without "auto", and a line for each that it had."""

    config: Config
    lines: list[str]


def resolve_auto(config: Config, world: World, begun_with: str | None = None) -> Resolved:
    """What a run in this world uses, which may be a planned one; all ranks call this.

    `begun_with`: optimizer.name of the checkpoint to resume from, which "auto" keeps, because the states of one
    optimizer do not fit another. Each start chooses the recipe again, by the GPUs it finds, because weights are float32
    under any recipe.
    """
    lines = []
    if config.float8.recipe == "auto":
        config, line = _with_recipe(config, world)
        lines.append(line)
    if config.optimizer.name == "auto":
        config, line = _with_optimizer(config, begun_with)
        lines.append(line)
    return Resolved(config, lines)


def why_no_float8(config: Config, degrees: Degrees, device: torch.device) -> str | None:
    """Why native float8 is not available on this device, or would gain nothing; None: it gains."""
    training, parallel = config.training, config.parallel
    if device != ELSEWHERE:
        if device.type != "cuda":
            return "there is no GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"{name} has compute capability {major}.{minor}, and float8 needs 8.9"
        if not has_triton():
            return "the package triton is missing"
    if training.compute_dtype == "float32":
        return 'training.compute_dtype = "float32" asks for more precision'
    if parallel.async_tensor:
        return "parallel.async_tensor = true cuts matmuls into pieces"
    tokens, odd = divmod(training.seq_len, parallel.context * parallel.tensor)
    if odd or tokens % FLOAT8_MULTIPLE:
        return f"tokens of a sequence on a rank are no multiple of {FLOAT8_MULTIPLE}"
    native = replace(config, float8=replace(config.float8, recipe="native", linear_layers="auto"))
    coverage = float8_coverage(native)
    sequences = micro_batch_size(training.local_batch_size, training.global_batch_size, degrees.data)
    return next(little_gained(coverage, native, sequences), None)


def _with_recipe(config: Config, world: World) -> tuple[Config, str]:
    of_stages = (why_no_float8(each, world.degrees, world.device) for each in configs_of_stages(config))
    reasons = all_gather_dict(world, {world.rank: next(filter(None, of_stages), None)})
    rank, why_not = next(((rank, why) for rank, why in sorted(reasons.items()) if why), (0, None))
    if why_not:
        on = f", on rank {rank}" if rank else ""
        # The section's other keys would have no effect.
        return replace(config, float8=Float8()), f'float8.recipe = "auto" is "off": {why_not}{on}'
    config = replace(config, float8=replace(config.float8, recipe="native"))
    share = share_of(float8_coverage(config), "native")
    on = ", on GPUs of compute capability 8.9 or higher; off on others" if world.is_elsewhere else ""
    return config, f'float8.recipe = "auto" is "native": it takes {share:.0%} of the operations of matmuls{on}'


def _with_optimizer(config: Config, begun_with: str | None) -> tuple[Config, str]:
    name, why = _optimizer(config, begun_with)
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    for each in (*optimizer_conflicts(config), *without_effect(config)):
        if (key := each.keys[0]) in ("optimizer.name", "optimizer.moments"):
            raise UserError(f"{key}: {each.problem}")
    return config, f'optimizer.name = "auto" is "{name}": {why}'


def _optimizer(config: Config, begun_with: str | None) -> tuple[OptimizerName, str]:
    """The optimizer's name, and why."""
    recipe = config.float8.recipe
    may_continue: tuple[OptimizerName, ...] = ("adamw", "adamw_fp8")
    for name in may_continue:
        if begun_with == name:
            return name, "the run began with it"
    if recipe == "off":
        return "adamw", "matmuls are not in float8"
    if config.optimizer.moments != "float32":
        return "adamw", f'optimizer.moments = "{config.optimizer.moments}"'
    if config.parallel.cpu_offload:
        return "adamw", "parallel.cpu_offload = true"
    return "adamw_fp8", f'float8.recipe = "{recipe}"'


def saved_by_float8_moments(parts: Sequence[torch.nn.Module], config: Config) -> int:
    """Bytes of optimizer state on this rank that optimizer.name = "adamw_fp8" would save; 0 where it does not apply.

    `parts` are sharded for the rank, and may be on the meta device.
    """
    if not may_save_by_float8_moments(config):
        return 0
    float8 = replace(config.optimizer, name="adamw_fp8", moments="float32")
    return sum(state_bytes(part, config.optimizer) - state_bytes(part, float8) for part in parts)


def may_save_by_float8_moments(config: Config) -> bool:
    """Whether matmuls are in float8 and AdamW's moments could be; other optimizers were chosen for what they do."""
    return config.float8.recipe != "off" and config.optimizer.name == "adamw" and not config.parallel.cpu_offload


def float8_moments_advice(saved: int) -> str:
    """The advice where `saved_by_float8_moments` is not 0."""
    return f'optimizer.name = "adamw_fp8" (or "auto") would save {saved / 2**30:.3g} GiB of optimizer state a GPU'
