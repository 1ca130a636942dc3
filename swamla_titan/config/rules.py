"""Rules between keys."""

import dataclasses
import os
from collections.abc import Collection, Iterator
from itertools import chain

from swamla_titan.conditions import Conflict, value_at
from swamla_titan.config.effects import NEEDS
from swamla_titan.config.mixture import data_of, mixture_conflicts, within_source
from swamla_titan.config.optimizer_rules import optimizer_conflicts
from swamla_titan.config.parallel_rules import parallel_conflicts
from swamla_titan.config.schedule import KEYS_OF_STAGE, Schedule, configs_of_stages, keys_changed_by
from swamla_titan.config.sections import MOST_RANKS, Config, Data
from swamla_titan.config.toml import shown
from swamla_titan.distributed.degrees import DIMENSIONS
from swamla_titan.errors import UserError
from swamla_titan.kernels.limits import (
    DOCUMENT_V_WIDTHS,
    DOCUMENT_WIDTHS,
    FLOAT8_MULTIPLE,
    WINDOW_SINKS,
    WINDOW_WIDTHS,
)
from swamla_titan.model import ModelConfig
from swamla_titan.model.config import Quantity

RETRY_SECONDS = 300.0  # what data.retry_seconds = -1 means, where nothing limits it
_MOST_TOKENS = 1 << 36  # of a step: 69 billion
_MOST_PARAMETERS = 1 << 47  # 140 trillion
_MOST_ACTIONS = 1 << 18  # of a pipeline's schedule
_MOST_CUTS = 1 << 26  # candidates in the division of layers into stages
_WIDTHS: tuple[Quantity, ...] = ("qk_width", "v_width", "latent_width")


def conflicts(config: Config) -> Iterator[Conflict]:
    """All conflicts between keys, also those of the values that training.stages gives them."""
    found = [*_conflicts(config)]
    yield from found
    if config.training.stages:
        yield from _of_stages(config, found)


def _of_stages(config: Config, known: Collection[Conflict]) -> Iterator[Conflict]:
    """Conflicts of training.stages; `known`: those of the configuration without them."""
    at, stages, configs = "training.stages", config.training.stages, configs_of_stages(config)
    ascending = [0, *(stage.tokens for stage in stages)]
    for number, (stage, before, changed) in enumerate(zip(stages, configs, configs[1:]), 1):
        where = f"number {number} (tokens = {stage.tokens})"
        if stage.tokens <= ascending[number - 1]:
            yield Conflict((at,), f"{where} must begin later than the one before it, tokens = {ascending[number - 1]}")
        if unknown := stage.weights.keys() - {source.name for source in config.data.sources}:
            yield Conflict((at, "data.sources"), f"{where}: weights: {shown(min(unknown))} is none of [[data.sources]]")
        elif changed == before:
            yield Conflict((at,), f"{where} changes nothing: give another {', '.join(KEYS_OF_STAGE)}, or leave it out")
        for name in keys_changed_by(stage):
            if name in NEEDS and (missing := NEEDS[name].missing(changed)):
                because = " and ".join(f"{each} = {shown(value_at(changed, each))}" for each in missing.keys)
                yield Conflict((at, *missing.keys), f"{where}: {name} has no effect with {because}: leave it out")
        for each in _conflicts(changed):
            if each not in known:
                yield Conflict((at, *each.keys), f"{where}: {each.keys[0]}: {each.problem}", each.consequence)
    if sorted(set(ascending)) == ascending:
        yield from _without_steps(config)


def _without_steps(config: Config) -> Iterator[Conflict]:
    """Conflicts of stages that no step would be of."""
    at, steps, begun = "training.stages", config.training.steps, Schedule.of(config)
    begins = {each.number: each.begin.step for each in begun.stages}
    for number, stage in enumerate(config.training.stages, 1):
        where = f"number {number} (tokens = {stage.tokens})"
        if number not in begins:
            yield Conflict((at,), f"{where} has no step, because the next one begins with the same: leave one out")
        elif begins[number] >= steps:
            yield Conflict(
                (at, "training.steps"),
                f"{where} would begin after step {begins[number]}, but training.steps = {steps}: raise that, or leave "
                "it out",
                "the run ends before it",
            )


def _conflicts(config: Config) -> Iterator[Conflict]:
    model, data, training, schedule = config.model, config.data, config.training, config.lr_schedule
    if _is_shared_folder(config.job.dump_folder):
        yield Conflict(
            ("job.dump_folder",),
            f"{shown(config.job.dump_folder)} is the current folder, one above it or the root, and a run would write "
            'among what is there: give it a folder of its own, as in "outputs/run"',
        )
    yield from _sizes(config)
    yield from _attention(config)
    yield from _loss(config)
    if training.seq_len > model.max_seq_len:
        yield Conflict(
            ("training.seq_len", "model.max_seq_len", "model.flavor"),
            f"{training.seq_len} is longer than model.max_seq_len = {model.max_seq_len}: raise that or lower this",
        )
    if not data.sources:
        yield from _path(data)
    yield from mixture_conflicts(config)
    for source in data.sources:
        yield from within_source(_path(data_of(data, source)), source)
    warm_up_and_decay = schedule.warmup_steps + schedule.decay_steps
    # effects.py reports a warm-up that alone takes longer.
    if schedule.name == "wsd" and schedule.decay_steps and schedule.warmup_steps <= training.steps < warm_up_and_decay:
        yield Conflict(
            ("lr_schedule.decay_steps", "lr_schedule.warmup_steps", "training.steps"),
            f"warm-up and decay take {warm_up_and_decay} steps, more than training.steps = {training.steps}",
            f"it decays in the {training.steps - schedule.warmup_steps} after the warm-up",
        )
    if config.profiling.enabled and config.profiling.start_step > training.steps:
        yield Conflict(
            ("profiling.start_step", "profiling.enabled", "training.steps"),
            f"{config.profiling.start_step} is after the last step, training.steps = {training.steps}",
        )
    if data.retry_seconds > retry_seconds(config):
        yield Conflict(
            ("data.retry_seconds", "fault_tolerance.step_timeout"),
            f"{data.retry_seconds:g} s of waiting for data are more than half of fault_tolerance.step_timeout = "
            f"{config.fault_tolerance.step_timeout:g}, and a step that waits that long counts as hanging: lower this, "
            "or raise that",
        )
    if config.validation.interval and not config.validation.path and config.validation.fraction == 0:
        yield Conflict(
            ("validation.fraction", "validation.path", "validation.interval"),
            "0 holds nothing out: give validation.path, or set validation.interval = 0",
        )
    yield from optimizer_conflicts(config)
    yield from parallel_conflicts(config)
    yield from _float8(config)


def _path(data: Data) -> Iterator[Conflict]:
    """The conflict of a source that lacks a path."""
    if data.source == "builtin" or data.path:
        return
    wanted = "a file or folder here"
    if data.source == "huggingface":
        wanted = 'the name of a dataset here, as "HuggingFaceFW/fineweb-edu" with data.name = "CC-MAIN-2024-10"'
    elif data.source == "shards":
        wanted = "the folder that `data prepare` wrote here"
    yield Conflict(("data.path", "data.source", "data.sources"), f'data.source = "{data.source}" needs {wanted}')


def _is_shared_folder(path: str) -> bool:
    """Whether a path means the current folder, one above it, or the root of the file system."""
    return not set(os.path.normpath(path or ".").split("/")) - {"", ".", ".."}


def _attention(config: Config) -> Iterator[Conflict]:
    """Conflicts of kernels.attention with a model of whose blocks it can compute none, on any machine.

    kernels/attention/dispatch.py chooses the implementation for a machine, and `validate_attention`
    (parallel/kernels.py) raises the errors of its choice. What it could choose is not an error here.
    """
    asked, model = config.kernels.attention, config.model
    if asked not in ("triton", "flex"):
        return
    at, kinds = "kernels.attention", dict.fromkeys(model.block_kinds)
    has_windows = any(model.quantities("window", kind) for kind in kinds)
    masked = [kind for kind in kinds if _wants_mask(config, kind)]
    if not masked and asked == "triton" and not has_windows:
        yield Conflict(
            (at, "data.document_mask"),
            '"triton" is for sliding-window blocks, of which this model has none, and for documents: use "auto"',
        )
    elif not masked:
        yield Conflict(
            (at, *(f"model.{key}" for key in model.quantities("window")), "training.seq_len", "data.document_mask"),
            f'"{asked}" is for windows and documents, and no sequence has any here: use "auto"',
        )
    elif asked == "flex" and all(_selects(model, kind) for kind in masked):
        yield Conflict(
            (at, *(f"model.{key}" for key in model.quantities("selects"))),
            '"flex" does not take selective attention, and no other attention here has a mask: use "auto"',
        )
    elif asked == "triton":
        limits = [[*_limits(config, kind)] for kind in masked]
        if all(limits):
            yield from dict.fromkeys(chain.from_iterable(limits))


def _wants_mask(config: Config, kind: str) -> bool:
    """Whether blocks of a kind need more than a causal mask, so that causal kernels are not preferred."""
    model, length = config.model, config.training.seq_len
    if config.parallel.context > 1 or (config.kernels.attention == "triton" and _selects(model, kind)):
        return True
    is_cut = any(window < length for window in model.quantities("window", kind).values())
    return length > 1 and (config.data.document_mask or is_cut)


def _selects(model: ModelConfig, kind: str) -> bool:
    return any(model.quantities("selects", kind).values())


def _limits(config: Config, kind: str) -> Iterator[Conflict]:
    """Conflicts of our kernels with a kind of block."""
    if config.parallel.context > 1 and not _selects(config.model, kind):
        yield Conflict(
            ("kernels.attention", "parallel.context"),
            '"triton" needs full sequences on each rank: use "flex" or "auto" with context parallelism',
        )
    elif config.model.quantities("window", kind):
        yield from _window_kernel(config.model, kind)
    else:
        yield from _document_kernel(config, kind)


def _window_kernel(model: ModelConfig, kind: str) -> Iterator[Conflict]:
    """Conflicts of our sliding-window kernel with a kind of block."""
    at, widths = "kernels.attention", model.quantities("qk_width", kind)
    keys, width = (tuple(widths), sum(widths.values())) if widths else (("dim", "num_heads"), model.head_dim)
    if width not in WINDOW_WIDTHS:
        yield Conflict(
            (at, *(f"model.{key}" for key in keys)),
            f'"triton" takes heads of {", ".join(map(str, WINDOW_WIDTHS))}, not of {width}: use "flex" or "auto"',
        )
    for key, sinks in model.quantities("sink", kind).items():
        if sinks > WINDOW_SINKS:
            yield Conflict(
                (at, f"model.{key}"),
                f'"triton" takes at most {WINDOW_SINKS} sinks, not {sinks}: use "flex" or "auto"',
            )


def _document_kernel(config: Config, kind: str) -> Iterator[Conflict]:
    """Conflicts of our document kernel with a kind of block that declares its head widths, such as MLA."""
    at, model, dtype = "kernels.attention", config.model, config.training.compute_dtype
    sides = (
        (model.quantities("qk_width", kind), DOCUMENT_WIDTHS),
        (model.quantities("v_width", kind), DOCUMENT_V_WIDTHS),
    )
    if dtype == "float32" and any(keys for keys, _ in sides):
        yield Conflict(
            (at, "training.compute_dtype"), f'"triton" takes {kind.upper()} in 16 bits, not in {dtype}: use "auto"'
        )
    others = '"auto"' if _selects(model, kind) else '"flex" or "auto"'
    for keys, taken in sides:
        width = sum(keys.values())
        if keys and width not in taken:
            yield Conflict(
                (at, *(f"model.{key}" for key in keys)),
                f'"triton" takes {" + ".join(keys)} of {", ".join(map(str, taken))}, not of {width}: use {others}',
            )


def _loss(config: Config) -> Iterator[Conflict]:
    split = [f"parallel.{name}" for name in ("tensor", "pipeline") if getattr(config.parallel, name) > 1]
    if config.kernels.loss == "fused" and split:
        yield Conflict(
            ("kernels.loss", *split),
            f'"fused" needs the full output head on each rank: use "plain" or "auto" with {" and ".join(split)}',
        )


def wants_fused_loss(config: Config) -> bool:
    """Whether output head and loss are one operation on a GPU; "auto": wherever it is possible, in 16 bits."""
    if config.kernels.loss != "auto":
        return config.kernels.loss == "fused"
    parallel, float8 = config.parallel, config.float8
    is_split = parallel.tensor > 1 or parallel.pipeline > 1
    return not is_split and not float8.output_head and config.training.compute_dtype != "float32"


def _float8(config: Config) -> Iterator[Conflict]:
    """Conflicts between [float8] and other keys."""
    float8, training, parallel = config.float8, config.training, config.parallel
    if float8.recipe == "off":
        return
    # Replicated linear layers compute the tokens of one tensor-parallel rank, sharded ones those of all.
    tokens, odd = divmod(training.seq_len, parallel.context * parallel.tensor)
    if float8.recipe != "auto" and (odd or tokens % FLOAT8_MULTIPLE):
        yield Conflict(
            ("training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"),
            f'{training.seq_len}: float8.recipe = "{float8.recipe}" needs tokens a rank in multiples of '
            f"{FLOAT8_MULTIPLE}: make seq_len / (parallel.context x parallel.tensor) one",
        )
    if float8.output_head and config.kernels.loss == "fused":
        yield Conflict(
            ("float8.output_head", "kernels.loss"),
            'true, but kernels.loss = "fused" computes the head with the loss in full precision: use "plain" or set '
            "this to false",
        )
    if float8.recipe == "tensorwise" and float8.fsdp_all_gather == "always" and (why := why_not_gathered(config)):
        yield Conflict(
            ("float8.fsdp_all_gather", *why), f'"always" is not possible with {" and ".join(why)} as set: use "auto"'
        )
    if float8.loss_scaling and not config.fault_tolerance.skip_bad_steps:
        yield Conflict(
            ("float8.loss_scaling", "fault_tolerance.skip_bad_steps"),
            "true finds its scale by steps that overflow and are skipped, but skip_bad_steps = false: make that true",
        )


def why_not_gathered(config: Config) -> list[str]:
    """Keys that prevent FSDP2 from all-gathering weights in float8, whatever the number of ranks."""
    parallel = config.parallel
    keys = {
        "float8.recipe": config.float8.recipe != "tensorwise",
        "parallel.data_parallel": parallel.data_parallel == "ddp",
        "parallel.tensor": parallel.tensor > 1,
        "parallel.cpu_offload": parallel.cpu_offload,
    }
    return [key for key, stands_in_the_way in keys.items() if stands_in_the_way]


def retry_seconds(config: Config) -> float:
    """The longest wait of a step for data: `data.retry_seconds`, -1 resolved, at most half of step_timeout."""
    wanted = config.data.retry_seconds
    half = config.fault_tolerance.step_timeout / 2  # the last attempt, and the step itself, take time too
    wanted = RETRY_SECONDS if wanted < 0 else wanted
    return min(wanted, half) if half else wanted


def _sizes(config: Config) -> Iterator[Conflict]:
    """Conflicts of values that together would make `plan` and the start of a run take hours."""
    training, model, parallel = config.training, config.model, config.parallel
    tokens = training.global_batch_size * training.seq_len
    if tokens > _MOST_TOKENS:
        yield Conflict(
            ("training.global_batch_size", "training.seq_len"),
            f"{training.global_batch_size} sequences of {training.seq_len} tokens are more than the {_MOST_TOKENS} "
            "tokens that a step may have: lower one of them",
        )
    qk_width, v_width, latents = (sum(model.quantities(each).values()) for each in _WIDTHS)
    heads = model.num_heads * (qk_width + 2 * v_width)
    layer = model.dim * (3 * model.ffn_width + heads + latents)
    if model.num_layers * layer > _MOST_PARAMETERS:
        yield Conflict(
            ("model.num_layers", "model.dim", "model.ffn_hidden_dim", "model.num_heads"),
            f"{model.num_layers} layers of width {model.dim} have more than {_MOST_PARAMETERS} parameters: lower one "
            "of model.num_layers, model.dim, model.ffn_hidden_dim, model.num_heads and the widths of heads",
        )
    keys = {dimension.key for dimension in DIMENSIONS}
    degrees = {each.name: getattr(parallel, each.name) for each in dataclasses.fields(parallel) if each.name in keys}
    ranks = 1
    for degree in degrees.values():
        ranks *= max(degree, 1)
    if ranks > MOST_RANKS:
        named = {name: degree for name, degree in degrees.items() if degree > 1}
        yield Conflict(
            tuple(f"parallel.{name}" for name in named),
            f"{' x '.join(f'{name} {degree}' for name, degree in named.items())} are more than {MOST_RANKS} ranks: "
            "lower one of them",
        )
    if parallel.pipeline == 1:
        return
    stages = parallel.pipeline * max(parallel.pipeline_stages_per_rank, 1)
    at_a_time = training.local_batch_size * max(parallel.dp_shard, 1) * max(parallel.dp_replicate, 1)
    micro_batches = -(-training.global_batch_size // at_a_time)
    if stages * micro_batches > _MOST_ACTIONS:
        yield Conflict(
            ("training.global_batch_size", "training.local_batch_size", "parallel.pipeline"),
            f"{micro_batches} micro-batches through {stages} stages are more than a schedule of {_MOST_ACTIONS} steps: "
            "raise training.local_batch_size, or lower this",
        )
    if stages * model.num_layers**2 > _MOST_CUTS:
        yield Conflict(
            ("parallel.pipeline", "model.num_layers"),
            f"{model.num_layers} layers cannot be cut in {stages} stages within a reasonable time: lower one of them",
        )


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """Set the model's vocabulary to the tokenizer's, unless a larger one is configured.

    Raises UserError if the configured one is smaller than the tokenizer's, or if the ranks of parallel.tensor cannot
    divide it.
    """
    given = config.model.vocab_size
    if 0 < given < vocab_size:
        raise UserError(
            f"model.vocab_size = {given} is smaller than the {vocab_size} tokens of "
            f'data.tokenizer = "{config.data.tokenizer}"; leave it out to use the tokenizer\'s'
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=given or vocab_size))
    for (section_key, *_), problem, _ in parallel_conflicts(config):
        raise UserError(f"{section_key}: {problem}")
    return config
