"""What "auto" stands for in float8.recipe and optimizer.name: decided once a start, alike on all ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from swamla_titan.config import Config
from swamla_titan.config.effects import without_effect
from swamla_titan.config.optimizer_rules import optimizer_contradictions
from swamla_titan.config.sections import Float8
from swamla_titan.data import rows_at_a_time
from swamla_titan.distributed.agreement import all_gather_dict
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import has_triton
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY, FLOAT8_MULTIPLE
from swamla_titan.optim import state_bytes
from swamla_titan.parallel.parallelize import float8_products
from swamla_titan.quantization.coverage import little_gained, share_of


class Choice(NamedTuple):
    """A configuration without "auto", and a line for each that it had."""

    config: Config
    lines: list[str]


def choose(config: Config, world: World, begun_with: str | None) -> Choice:
    """What a run takes; all ranks come here.

    `begun_with`: optimizer.name of the checkpoint to resume from, which "auto" keeps, for states of one optimizer are
    none of another's. Weights are float32 under any recipe: that is chosen again by each start, by the GPUs it has.
    """
    reasons: dict[int, str | None] = {}
    if config.float8.recipe == "auto":
        reasons = all_gather_dict(world, {world.rank: why_no_float8(config, world.degrees, world.device)})
    rank, why = next(((rank, why) for rank, why in sorted(reasons.items()) if why), (0, None))
    return _chosen(config, world.degrees, f"{why}, on rank {rank}" if why and rank else why, "", begun_with)


def choose_for(config: Config, degrees: Degrees, device: torch.device | None, begun_with: str | None = None) -> Choice:
    """The same for ranks that are not there, each with such a device; None: GPUs that have float8."""
    if config.float8.recipe != "auto":
        return _chosen(config, degrees, None, "", begun_with)
    on = "" if device else ", on GPUs of compute capability 8.9 or higher; off on others"
    return _chosen(config, degrees, why_no_float8(config, degrees, device), on, begun_with)


def why_no_float8(config: Config, degrees: Degrees, device: torch.device | None) -> str | None:
    """Why native float8 cannot be had on this device, or would not pay; None: it pays."""
    training, parallel = config.training, config.parallel
    if device is not None and device.type != "cuda":
        return "there is no GPU"
    if device is not None:
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"{name} has compute capability {major}.{minor}, and float8 needs 8.9"
        if not has_triton():
            return "the package triton is missing"
    if training.compute_dtype == "float32":
        return 'training.compute_dtype = "float32" asks for more precision'
    if parallel.async_tensor:
        return "parallel.async_tensor = true cuts products into pieces"
    tokens, odd = divmod(training.seq_len, parallel.context * parallel.tensor)
    if odd or tokens % FLOAT8_MULTIPLE:
        return f"tokens of a sequence on a rank are no multiple of {FLOAT8_MULTIPLE}"
    native = replace(config, float8=replace(config.float8, recipe="native", products="auto"))
    products = float8_products(native)
    rows = rows_at_a_time(training.local_batch_size, training.global_batch_size, degrees.data)
    return next(little_gained(products, native, rows), None)


def _chosen(config: Config, degrees: Degrees, why_not: str | None, on: str, begun_with: str | None) -> Choice:
    lines = []
    if config.float8.recipe == "auto":
        if why_not:
            # Its other keys would have no effect.
            config = replace(config, float8=Float8())
            lines.append(f'float8.recipe = "auto" is "off": {why_not}')
        else:
            config = _with_recipe(config, "native")
            share = share_of(float8_products(config), "native")
            lines.append(f'float8.recipe = "auto" is "native": it takes {share:.0%} of the operations of products{on}')
    if config.optimizer.name == "auto":
        name, why = _optimizer(config, begun_with)
        config = replace(config, optimizer=replace(config.optimizer, name=name))
        lines.append(f'optimizer.name = "auto" is "{name}": {why}')
        idle = ((each.keys, each.problem) for each in without_effect(config))
        unfit = ((each.keys, each.problem) for each in optimizer_contradictions(config))
        for (key, *_), problem in (*unfit, *idle):
            if key in ("optimizer.name", "optimizer.moments"):
                raise UserError(f"{key}: {problem}")
    return Choice(config, lines)


def _optimizer(config: Config, begun_with: str | None) -> tuple[str, str]:
    """Its name, and why."""
    recipe = config.float8.recipe
    if begun_with in ("adamw", "adamw_fp8"):
        return begun_with, "the run began with it"
    if recipe == "off":
        return "adamw", "products are not in float8"
    if config.optimizer.moments != "float32":
        return "adamw", f'optimizer.moments = "{config.optimizer.moments}"'
    if config.parallel.cpu_offload:
        return "adamw", "parallel.cpu_offload = true"
    return "adamw_fp8", f'float8.recipe = "{recipe}"'


def _with_recipe(config: Config, recipe: str) -> Config:
    return replace(config, float8=replace(config.float8, recipe=recipe))


def saved_by_float8_moments(parts: Sequence[torch.nn.Module], config: Config) -> int:
    """Bytes of optimizer state on this rank that optimizer.name = "adamw_fp8" would save; 0 if it may not be taken.

    `parts` are laid out for the rank, and may be on the meta device.
    """
    if not may_save_by_float8_moments(config):
        return 0
    float8 = replace(config.optimizer, name="adamw_fp8", moments="float32")
    return sum(state_bytes(part, config.optimizer) - state_bytes(part, float8) for part in parts)


def may_save_by_float8_moments(config: Config) -> bool:
    """Whether products are in float8, and moments could be: other optimizers were chosen for what they do."""
    return config.float8.recipe != "off" and config.optimizer.name == "adamw" and not config.parallel.cpu_offload


def float8_moments_advice(saved: int) -> str:
    """What is said where that is not 0."""
    return f'optimizer.name = "adamw_fp8" (or "auto") would save {saved / 2**30:.3g} GiB of optimizer state a GPU'
