"""The lines that open a run: what is trained, on what, and from where."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from swamla_titan.checkpoint.manifest import CONFIG
from swamla_titan.checkpoint.train_state import TrainState
from swamla_titan.config import Config
from swamla_titan.config.float8_rules import why_not_gathered
from swamla_titan.config.stability import stability_advice
from swamla_titan.data import Corpus, described, micro_batch_count, uneven, waits_for_streams
from swamla_titan.distributed.mesh import World
from swamla_titan.model.sizes import parameter_counts
from swamla_titan.optim import group_table
from swamla_titan.parallel.kernels import is_loss_fused
from swamla_titan.parallel.parallelize import float8_products, gathers_float8
from swamla_titan.quantization.coverage import warnings
from swamla_titan.train.changed_settings import changed_settings
from swamla_titan.train.kernels import attention_of, pointwise_of

logger = logging.getLogger(__name__)


def announce(
    config: Config,
    world: World,
    corpus: Corpus,
    rows: int,
    state: TrainState,
    resumed: Path | None,
    choices: Sequence[str] = (),
) -> None:
    """Log model, data, device and batch; `rows` sequences are computed at a time, `state` is where the run stands.

    `choices`: what "auto" was taken to be, and why.
    """
    training, kinds = config.training, config.model.block_kinds
    total, without_embeddings = parameter_counts(config.model)
    logger.info(
        f"model: {total:,} parameters ({without_embeddings:,} without embeddings), "
        f"{kinds.count('swa')} SWA + {kinds.count('mla')} MLA layers, {training.compute_dtype}"
    )
    segments = corpus.segments[-1]
    logger.info(f"data: {corpus.source.describe()}; {described(segments)}")
    if corpus.added_files:
        names = ", ".join(corpus.added_files[:3]) + (", ..." if len(corpus.added_files) > 3 else "")
        logger.warning(
            f"data: {len(corpus.added_files)} new in this run ({names}): each stream finishes its epoch of the earlier "
            "files, then reads the new ones once, and from then on all of them"
        )
    if warning := uneven(corpus.source, segments, training.seq_len):
        logger.warning(f"data: {warning}")
    if corpus.validates_on_training_text:
        logger.warning(
            "validation: this run began without holding out what validation reads now; where that stands in the "
            "training data too, it is trained on"
        )
    is_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    if world.size > 1:
        name = f"{world.size} x {name} ({config.parallel.data_parallel}: {world.degrees})"
    logger.info(
        f"on {name}: {training.steps} steps of {training.global_batch_size} sequences of {training.seq_len} "
        f"{corpus.tokenizer.name} tokens, {rows} at a time"
    )
    micro_batches = micro_batch_count(
        state.sequences, training.global_batch_size, config.data.streams, world.degrees.data, rows
    )
    if config.parallel.pipeline > micro_batches:
        logger.warning(
            f"parallel.pipeline = {config.parallel.pipeline}, but a step has {micro_batches} micro-batches a rank: "
            f"stages wait for each other; lower training.local_batch_size, or raise training.global_batch_size"
        )
    waits = waits_for_streams(training.global_batch_size, config.data.streams, world.degrees.data, rows)
    if waits:
        logger.warning(waits)
    logger.info(f"attention: {attention_of(config, world)}")
    if is_loss_fused(config, world.device):
        logger.info("loss: as one with the output head")
    if pointwise := pointwise_of(config, world):
        logger.info(f"pointwise: {pointwise}")
    for choice in choices:
        logger.info(choice)
    degrees = world.degrees
    is_sharded = config.parallel.data_parallel != "ddp" and degrees.shard * degrees.context > 1
    if gathers_float8(config, degrees):
        logger.info("float8: FSDP2 gathers the weights of products in 8 bits")
    elif config.float8.fsdp_all_gather == "auto" and config.float8.recipe == "tensorwise" and is_sharded:
        why = why_not_gathered(config) or ["rows that ranks cannot share evenly"]
        logger.info(f"float8: FSDP2 gathers weights in {training.compute_dtype}, because of {' and '.join(why)}")
    if world.is_rank_0:
        for warning in warnings(float8_products(config), config, rows):
            logger.warning(warning)
    for row in group_table(config.model, config.optimizer):
        logger.info(f"optimizer: {row}")
    for advice in stability_advice(config) if world.is_rank_0 else ():
        logger.warning(advice)
    if config.ema.decay:
        logger.info(f"average of the weights: decay {config.ema.decay:g}")
    logger.info(f"resumed from {resumed}" if resumed else "a new run")
    for change in changed_settings(resumed / CONFIG, config) if resumed and world.is_rank_0 else ():
        logger.warning(f"resumed with another setting: {change}")
    if state.step >= training.steps:
        logger.info(f"all {training.steps} steps were taken; raise training.steps, or choose another job.dump_folder")
