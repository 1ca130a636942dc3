"""Rules of [optimizer]."""

import difflib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from swamla_titan.conditions import Conflict
from swamla_titan.config.sections import Config
from swamla_titan.config.toml import shown

_QUANTIZED = ("adamw8bit", "adamw4bit", "adamw_fp8")
# The largest decay of a moment in bfloat16: beyond it, updates are of the size of the last bit or less.
_LARGEST_IN_BFLOAT16 = 0.99
_DECAYS = {
    "adamw": ("beta1", "beta2"),
    "auto": ("beta1", "beta2"),
    "lion": ("beta2",),
    "muon": ("muon_momentum", "beta1", "beta2"),
}


def optimizer_conflicts(config: Config) -> Iterator[Conflict]:
    """Conflicts between [optimizer] and other keys."""
    yield from _moments(config)
    yield from _offloaded(config)
    yield from _multipliers(config)


def _moments(config: Config) -> Iterator[Conflict]:
    optimizer = config.optimizer
    if optimizer.moments == "float32" or optimizer.name in _QUANTIZED:
        return
    for key in _DECAYS.get(optimizer.name, ()):
        decay = getattr(optimizer, key)
        if decay > _LARGEST_IN_BFLOAT16:
            yield Conflict(
                ("optimizer.moments", f"optimizer.{key}"),
                f'"bfloat16" has too few bits for the changes of a moment with {key} = {decay}: use {key} <= '
                f'{_LARGEST_IN_BFLOAT16}, or "float32"',
            )


def _offloaded(config: Config) -> Iterator[Conflict]:
    name = config.optimizer.name
    if config.parallel.cpu_offload and name in ("muon", *_QUANTIZED):
        why = "would orthogonalize matrices" if name == "muon" else "would quantize moments"
        yield Conflict(
            ("optimizer.name", "parallel.cpu_offload"),
            f'"{name}" {why} on the host with parallel.cpu_offload = true: use "adamw" or "lion", or set that to false',
        )
    annexes = [name for name in config.model.annex_configs() if getattr(config.model, name).layers]
    if config.parallel.cpu_offload and annexes:
        yield Conflict(
            ("parallel.cpu_offload", *(f"model.{name}.layers" for name in annexes)),
            f"the tables of {' and '.join(annexes)} are looked up on the device and stay there: set it to false, or "
            "share their rows among more ranks",
        )
    if config.parallel.tables_on_host and not config.optimizer.lazy_tables:
        yield Conflict(
            ("optimizer.lazy_tables", "parallel.tables_on_host"),
            "false would read and write all rows in the memory of the host in each step, and make a gradient of the "
            "table's size on the device: use true, or set tables_on_host to false",
        )


def _multipliers(config: Config) -> Iterator[Conflict]:
    patterns = config.optimizer.lr_multipliers
    if not patterns:
        return
    from swamla_titan.model.counts import parameter_names  # torch takes seconds to import

    names = parameter_names(config.model)
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.3) or kinds
        tied = "; the head is the embedding's (model.tie_embeddings)" if "head" in pattern else ""
        yield Conflict(
            ("optimizer.lr_multipliers", "model.flavor", "model.num_layers"),
            f"{shown(pattern)} matches no parameter{tied}; among them are {', '.join(near)}",
        )
