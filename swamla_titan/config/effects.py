"""Conditions for keys to have an effect. A key without effect is an error unless it has its default value."""

from collections.abc import Iterator
from functools import reduce
from operator import or_

from swamla_titan.conditions import (
    Condition,
    Conflict,
    decided_by,
    replace_at,
    value_at,
    when,
    when_many,
    when_not,
    when_on,
    when_within,
)
from swamla_titan.config.mixture import data_of, within_source
from swamla_titan.config.sections import KEYS, Config
from swamla_titan.config.toml import shown
from swamla_titan.fields import settings
from swamla_titan.model import FLAVORS, ModelConfig


def _reads(config: Config, *others: str) -> bool:
    """Whether a file is read that has none of these endings; a folder may hold any file."""
    paths = [config.validation.path] if config.validation.path else []
    paths += [config.data.path] if config.data.source == "local" else []
    return not all(path.endswith(others) for path in paths)


_FILES = when("data.source", *(each for each in KEYS["data.source"].choices if each != "builtin"))
_TEXT_FILES = when_not("data.source", "builtin", "shards") | when_on("validation.path")
_MUON = when("optimizer.name", "muon")
_SHARDS = when("parallel.data_parallel", "fsdp", "hsdp")
_TABLES = reduce(or_, (when_on(f"model.{name}.layers") for name in ModelConfig.annex_configs()))
_COMPILED = when_on("compile.enabled", "compile.enabled = true")
_SELECTIVE = when("activation_checkpoint.mode", "selective")
_NATIVE = when("float8.recipe", "native", "auto")
_SKIPPING = when_on("fault_tolerance.skip_bad_steps", "fault_tolerance.skip_bad_steps = true")

# Keys, and the condition under which they have an effect. Keys of a kind of block declare it in model/config.py.
_NEEDS: dict[str, Condition] = {
    "data.path data.on_error": _FILES,
    "data.name data.split data.revision": when("data.source", "huggingface"),
    "data.max_document_mib": _TEXT_FILES,
    "data.retry_seconds": _FILES | when_on("validation.path"),
    "data.text_key": decided_by(  # records with named fields, which text files and Python's documentation do not have
        ("data.source", "data.path"),
        lambda config: config.data.source == "huggingface" or _reads(config, ".txt", ".md"),
        'data.source = "huggingface", or a path to jsonl or parquet',
    ),
    "data.text_separator": decided_by(
        ("data.source", "data.path"),
        lambda config: _reads(config, ".jsonl", ".json", ".parquet"),
        'data.source = "local" and a path to text files',
    ),
    "data.num_workers": when_within("data.num_workers", "data.streams"),
    "training.local_batch_size": when_within("training.local_batch_size", "training.global_batch_size", False),
    "optimizer.eps": when_not("optimizer.name", "lion"),
    "optimizer.decay_embeddings": when_on("optimizer.weight_decay"),
    "optimizer.lazy_tables parallel.tables_on_host": _TABLES,
    "optimizer.moments": when_not("optimizer.name", "adamw8bit", "adamw4bit", "adamw_fp8"),
    "optimizer.muon_momentum optimizer.muon_nesterov optimizer.muon_ns_steps optimizer.muon_adjust_lr_fn": _MUON,
    "lr_schedule.warmup_steps": when_within(
        "lr_schedule.warmup_steps", "training.steps", False, ": the run would end before its peak"
    ),
    "lr_schedule.decay_steps": when("lr_schedule.name", "wsd"),
    "parallel.reshard_after_forward parallel.cpu_offload": _SHARDS,
    "parallel.reduce_every_micro_batch": _SHARDS & when("parallel.pipeline", 1),
    "parallel.async_tensor": when_many("parallel.tensor") & _COMPILED & when_not("float8.recipe", "native"),
    "parallel.pipeline_schedule parallel.pipeline_stages_per_rank": when_many("parallel.pipeline"),
    "compile.cache_folder": _COMPILED,
    "activation_checkpoint.selective": _SELECTIVE,
    "activation_checkpoint.every_n_blocks": _SELECTIVE & when("activation_checkpoint.selective", "blocks"),
    "activation_checkpoint.modules": when_not("activation_checkpoint.mode", "none"),
    "activation_checkpoint.memory_budget": when("activation_checkpoint.mode", "none") & _COMPILED,
    "float8.linear_layers float8.output_head float8.loss_scaling": when_not("float8.recipe", "off"),
    "float8.gradient_dtype float8.fast_accumulation": _NATIVE,
    "float8.fsdp_all_gather": decided_by(
        ("float8.recipe",),
        lambda config: config.float8.recipe == "tensorwise" or config.float8.fsdp_all_gather == "never",  # true anyway
        'float8.recipe = "tensorwise"',
    ),
    "checkpoint.initial_load_state": when_on("checkpoint.initial_load"),
    "checkpoint.keep_every": when_on("checkpoint.keep_latest", "checkpoint.keep_latest to a number from 1"),
    "validation.fraction": decided_by(
        ("validation.path",),
        lambda config: not config.validation.path or config.validation.fraction == 0,  # true anyway
        'validation.path = ""',
    ),
    "validation.max_tokens": when_on("validation.interval") | when_on("validation.path"),
    "validation.use_ema": when_on("ema.decay", "ema.decay, to 0.999 perhaps")
    & (when_on("validation.interval") | when_on("validation.tasks")),
    "validation.tasks_interval validation.tasks_limit": when_on("validation.tasks"),
    "metrics.wandb_project": when_on("metrics.wandb", "metrics.wandb = true"),
    "profiling.start_step profiling.num_steps": when_on("profiling.enabled", "profiling.enabled = true"),
    "fault_tolerance.max_bad_steps fault_tolerance.max_rewinds fault_tolerance.spike_sigma": _SKIPPING,
    "fault_tolerance.spike_window": _SKIPPING
    & when_on("fault_tolerance.spike_sigma", "fault_tolerance.spike_sigma = 6"),
    "fault_tolerance.first_step_timeout": when_on("fault_tolerance.step_timeout"),
}

NEEDS = {name: setting.needs for name, setting in KEYS.items() if setting.needs}
NEEDS |= {name: condition for names, condition in _NEEDS.items() for name in names.split()}
NEEDS |= {
    f"model.{annex}.{key}": when_on(
        f"model.{annex}.layers", f"model.{annex}.layers to the numbers of one or more layers"
    )
    for annex, kind in ModelConfig.annex_configs().items()
    for key in settings(kind)
    if key != "layers"
}


def has_effect(config: Config, name: str) -> bool:
    """Whether the key has an effect."""
    return name not in NEEDS or NEEDS[name].missing(config) is None


def without_effect(config: Config, flavor: str | None = None) -> Iterator[Conflict]:
    """Every key without effect whose value is not the default or the flavor's; it is the first key of its Conflict."""
    defaults = Config(model=FLAVORS[flavor] if flavor else ModelConfig())
    of_sources = [(source, replace_at(config, "data", data_of(config.data, source))) for source in config.data.sources]
    for source, own in of_sources:
        yield from within_source(without_effect(own, flavor), source)
    for name in filter(NEEDS.get, KEYS):
        value, needs = value_at(config, name), NEEDS[name]
        if name.startswith("data.") and not all(needs.missing(own) for _, own in of_sources):
            continue  # it has an effect on a source of the mixture
        if value != value_at(defaults, name) and (missing := needs.missing(config)):
            because = " and ".join(f"{each} = {shown(value_at(config, each))}" for each in missing.keys)
            problem = f"{shown(value)} has no effect with {because}: leave it out, or set {missing.remedy}"
            yield Conflict((name, *missing.keys), problem)


def without(config: Config, name: str) -> Config:
    """The configuration with a key set to its default."""
    changed: Config = replace_at(config, name, KEYS[name].default)
    return changed
