"""Parallelizes a model as the configuration says, from outside the model, in one fixed order."""

import functools
from dataclasses import replace

import torch

from swamla_titan.config import Config
from swamla_titan.config.rules import why_not_gathered
from swamla_titan.config.sections import Float8
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.parallel.context import apply_context_parallel
from swamla_titan.parallel.data_parallel import apply_data_parallel, model_reshards_after_forward
from swamla_titan.parallel.kernels import choose_kernels
from swamla_titan.parallel.row_tables import shard_row_tables
from swamla_titan.parallel.stream import share_stream
from swamla_titan.parallel.tensor import apply_tensor_parallel, enable_async_tensor_parallel, sides_on_a_rank
from swamla_titan.quantization.coverage import LinearCoverage, survey, validate_coverage, validate_device
from swamla_titan.quantization.native import save_transposed_weights


def float8_coverage(config: Config) -> list[LinearCoverage]:
    """The linear layers of the configured model and whether each is computed in float8; empty without float8.

    Also empty for "auto" before it is resolved (automatic.py).
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
                'float8.fsdp_all_gather = "always": every rank has whole weights, and nothing is gathered; use '
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


def parallelize(model: SWAMLAModel, config: Config, world: World) -> None:
    """Parallelize the model, or a pipeline stage of it, in place; its parameters are still on the meta device.

    The order matters, because each step works on the blocks as those before it have changed them. Raises UserError for
    what this machine cannot do.
    """
    model.compute_dtype = getattr(torch, config.training.compute_dtype)
    choose_kernels(model, config, world.device)
    shard_row_tables(model, config.parallel, world)
    if config.float8.recipe != "off":
        from swamla_titan.quantization.float8 import convert_to_float8  # torchao takes a second to import

        tensor, gathered = world.degrees.tensor, gathers_float8(config, world.degrees)
        sides = functools.partial(sides_on_a_rank, tensor)
        convert_to_float8(model, config.float8, world.device, sides, norms_cast=tensor == 1, gathered=gathered)
    if world.weights is not None and world.degrees.tensor > 1:
        apply_tensor_parallel(model, world.weights["tensor"])
        if config.parallel.async_tensor:
            enable_async_tensor_parallel(world.weights["tensor"])
    if world.degrees.context > 1:
        apply_context_parallel(model, world.group("context"))
    share_stream(model, world)
    apply_activation_checkpointing(model, config.activation_checkpoint)
    compile_model(model, config.compile, config.activation_checkpoint.memory_budget)
    apply_data_parallel(model, config.parallel, world, model.compute_dtype)
    if config.float8.recipe == "native":
        save_transposed_weights(model, saved=not model_reshards_after_forward(model))
