"""The log lines at the start of a run: model, data, device, kernels, and where it resumes."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import swamla_titan
from swamla_titan.checkpoint.manifest import CONFIG
from swamla_titan.config import Config
from swamla_titan.config.rules import why_not_gathered
from swamla_titan.config.schedule import TrainingStage
from swamla_titan.config.sections import LRSchedule, Optimizer
from swamla_titan.config.stability import stability_advice
from swamla_titan.data import (
    Corpus,
    Mixture,
    TrainingData,
    described,
    labelled,
    micro_batch_count,
    uneven,
    waits_for_streams,
)
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.attention.dispatch import Choice
from swamla_titan.launch.ranks import rank_info
from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.counts import parameter_counts
from swamla_titan.optim import group_table
from swamla_titan.parallel.float8 import float8_coverage, float8_moments_advice, gathers_float8, saved_by_float8_moments
from swamla_titan.parallel.kernels import are_elementwise_ours, attention_choices, attention_summary, is_loss_fused
from swamla_titan.parallel.row_tables import bytes_on_host
from swamla_titan.quantization.coverage import warnings
from swamla_titan.quantization.native import fuses_activation
from swamla_titan.system.console import Lines
from swamla_titan.system.events import record_event, seconds_since_start
from swamla_titan.train.setup import Setup
from swamla_titan.train.step import micro_batch_size_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

# What older versions did before there was a key for it.
_BEFORE_THE_KEY = {("optimizer", "decay_embeddings"): True}


def log_startup_summary(setup: Setup, parts: Sequence[nn.Module]) -> None:
    """Log the parts of a run; `parts`: those of the model on this rank. All ranks call this."""
    config, world = setup.config, setup.world
    _log_model(config)
    if config.parallel.tables_on_host:
        on_host = world.all_reduce_max(sum(bytes_on_host(part, config) for part in parts))
        logger.info(f"tables: in the memory of the host, at most {on_host / 2**30:.2f} GiB of a rank")
    _log_data(setup.corpus, setup.schedule.longest.training.seq_len)
    _log_batch(setup)
    _log_kernels(setup.stage.config, world)
    for choice in setup.choices:
        logger.info(choice)
    _log_float8(setup.stage.config, world, micro_batch_size_of(setup.stage, world))
    for row in group_table(config.model, config.optimizer):
        logger.info(f"optimizer: {row}")
    for advice in stability_advice(config) if world.is_rank_0 else ():
        logger.warning(advice)
    if config.ema.decay:
        logger.info(f"average of the weights: decay {config.ema.decay:g}")
    _log_resume(setup)
    saved = world.all_reduce_max(saved_by_float8_moments(parts, config))
    if saved > 0 and world.is_rank_0:
        logger.info(f"float8: {float8_moments_advice(int(saved))}; a run keeps the optimizer that it began with")


def _log_model(config: Config) -> None:
    kinds = config.model.block_kinds
    layers = " + ".join(f"{kinds.count(kind)} {kind.upper()}" for kind in BLOCKS)
    total, without_embeddings = parameter_counts(config.model)
    logger.info(
        f"model: {total:,} parameters ({without_embeddings:,} without embeddings), "
        f"{layers} layers, {config.training.compute_dtype}"
    )
    for annex in annexes_of(config.model).values():
        logger.info(annex.summary(config.model))


def _log_data(corpus: TrainingData, seq_len: int) -> None:
    for label, each in labelled(corpus):
        _log_corpus(label, each, seq_len)
    if isinstance(corpus, Mixture):
        for piece in corpus.pieces:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in piece.weights.items())
            logger.info(f"data: from sequence {piece.first:,} on the weights are {weights}")


def _log_corpus(label: str, corpus: Corpus, seq_len: int) -> None:
    segments = corpus.segments[-1]
    logger.info(f"data: {label}{corpus.source.description}; {described(segments)}")
    if corpus.added_files:
        names = ", ".join(corpus.added_files[:3]) + (", ..." if len(corpus.added_files) > 3 else "")
        logger.warning(
            f"data: {label}{len(corpus.added_files)} new in this run ({names}): each stream finishes its epoch of the "
            "earlier files, then reads the new ones once, and from then on all of them"
        )
    if warning := uneven(corpus.source, segments, seq_len):
        logger.warning(f"data: {label}{warning}")
    if corpus.validates_on_training_text:
        logger.warning(
            f"validation: {label}this run began without holding out what validation reads now; where that stands in "
            "the training data too, it is trained on"
        )


def _log_batch(setup: Setup) -> None:
    config, world, size = setup.stage.config, setup.world, micro_batch_size_of(setup.stage, setup.world)
    training = config.training
    is_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    if world.size > 1:
        name = f"{world.size} x {name} ({config.parallel.data_parallel}: {world.degrees})"
    logger.info(
        f"on {name}: {training.steps} steps of {training.global_batch_size} sequences of {training.seq_len} "
        f"{setup.corpus.tokenizer.name} tokens, {size} at a time"
    )
    later = [stage for stage in setup.schedule.stages if stage.begin.step > setup.train_state.step]
    for stage in later:
        logger.info(f"from step {stage.begin.step + 1}, stage {stage.number}: {stage}")
    for warning in dict.fromkeys(line for stage in (setup.stage, *later) for line in _waits(setup, stage)):
        logger.warning(warning)


def _waits(setup: Setup, stage: TrainingStage) -> Iterator[str]:
    """Why ranks will wait for each other in the steps of a stage."""
    training, pipeline = stage.training, stage.config.parallel.pipeline
    size, order, ranks = micro_batch_size_of(stage, setup.world), setup.corpus.order, setup.world.degrees.data
    first = max(stage.begin.sequences, setup.train_state.sequences)
    micro_batches = micro_batch_count(first, training.global_batch_size, order, ranks, size)
    if pipeline > micro_batches:
        yield (
            f"parallel.pipeline = {pipeline}, but a step has {micro_batches} micro-batches a rank: "
            f"stages wait for each other; lower training.local_batch_size, or raise training.global_batch_size"
        )
    if waits := waits_for_streams(training.global_batch_size, order, ranks, size):
        yield waits


def _log_kernels(config: Config, world: World) -> None:
    choices = attention_choices(config, world.device)
    logger.info(f"attention: {attention_summary(choices)}")
    if is_loss_fused(config, world.device):
        logger.info("loss: as one with the output head")
    if elementwise := elementwise_of(config, choices, world.device):
        logger.info(f"fused elementwise: {elementwise}")


def elementwise_of(config: Config, choices: Mapping[str, Choice], device: torch.device) -> str | None:
    """What our kernels compute between linear layers, in words; None: nothing. `choices`: those of attention."""
    if not are_elementwise_ours(config, device):
        return None
    float8 = {each.kind for each in float8_coverage(config) if each.why_not is None}
    fused = config.float8.recipe == "native" and fuses_activation(float8, "feed_forward")
    swiglu = "SwiGLU with its cast to float8" if fused else "SwiGLU by triton"
    words: list[str] = []
    for kind, choice in choices.items():
        why = choice.why_not_fused
        words.append(f"{kind.upper()} by {f'torch ({why})' if why else 'triton'}")
    return f"{swiglu}, rotation of {' and '.join(words)}" if words else swiglu


def _log_float8(config: Config, world: World, micro_batch_size: int) -> None:
    degrees = world.degrees
    is_sharded = config.parallel.data_parallel != "ddp" and degrees.weight_shards > 1
    if gathers_float8(config, degrees):
        logger.info("float8: FSDP2 gathers the weights of matmuls in 8 bits")
    elif config.float8.fsdp_all_gather == "auto" and config.float8.recipe == "tensorwise" and is_sharded:
        why = why_not_gathered(config) or ["rows that ranks cannot share evenly"]
        logger.info(f"float8: FSDP2 gathers weights in {config.training.compute_dtype}, because of {' and '.join(why)}")
    if world.is_rank_0:
        for warning in warnings(float8_coverage(config), config, micro_batch_size):
            logger.warning(warning)


def _log_resume(setup: Setup) -> None:
    newest, steps = setup.origin.path, setup.config.training.steps
    if initial := setup.initial:
        logger.info("a new run, which begins with the %s", initial.summary(setup.config))
        if setup.world.is_rank_0 and (table := initial.differences(setup.config, setup.fingerprint)):
            logger.warning("%s differs from this run:\n%s", initial.path, Lines(table))
    else:
        logger.info(f"resumed from {newest}" if newest else "a new run")
    record_event("start", **_start(setup))
    for change in changed_settings(newest / CONFIG, setup.config) if newest and setup.world.is_rank_0 else ():
        logger.warning(f"resumed with another setting: {change}")
    if setup.train_state.step >= steps:
        logger.info(f"all {steps} steps were taken; raise training.steps, or choose another job.dump_folder")


def _start(setup: Setup) -> dict[str, Any]:
    world, device = setup.world, setup.world.device
    return {
        "step": setup.train_state.step,
        "ranks": world.size,
        "machines": rank_info().machines,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "setup_seconds": seconds_since_start(),
        "version": swamla_titan.__version__,
    }


def changed_settings(checkpoint_config: Path, config: Config) -> list[str]:
    """A line for each key of [optimizer] and [lr_schedule] with another value in the checkpoint's config.toml.

    These keys may change when a run is resumed.
    """
    try:
        stored = tomllib.loads(checkpoint_config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # removed since the checkpoint was verified; nothing else depends on it here
        return []
    lines = []
    for section, cls in (("optimizer", Optimizer), ("lr_schedule", LRSchedule)):
        table = stored.get(section)
        for field in fields(cls) if isinstance(table, dict) else ():
            now = getattr(getattr(config, section), field.name)
            before = table.get(field.name, _BEFORE_THE_KEY.get((section, field.name), now))
            if before != now and not (field.name == "decay_embeddings" and not config.optimizer.weight_decay):
                lines.append(f"{section}.{field.name} was {json.dumps(before)} and is {json.dumps(now)}")
    return lines
