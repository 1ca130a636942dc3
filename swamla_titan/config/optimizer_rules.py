"""Rules of [optimizer] and [ema].

Beside what cannot work, a value that is not the default and would have no effect is refused: whoever wrote it expects
one.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase

from swamla_titan.config.contradiction import Contradiction
from swamla_titan.config.sections import Config, Optimizer

_QUANTIZED = ("adamw8bit", "adamw4bit", "adamw_fp8")
# Of the decay of an average that is kept in bfloat16: nearer to 1, steps are of the size of its last bit or less.
_LARGEST_IN_BFLOAT16 = 0.99
_DECAYS = {
    "adamw": ("beta1", "beta2"),
    "auto": ("beta1", "beta2"),
    "lion": ("beta2",),
    "muon": ("muon_momentum", "beta1", "beta2"),
}


def optimizer_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every set of keys of these sections that cannot all hold."""
    yield from _without_effect(config)
    yield from _decay(config)
    yield from _moments(config)
    yield from _offloaded(config)
    yield from _multipliers(config)
    if config.validation.use_ema and not config.ema.decay:
        yield Contradiction(
            ("validation.use_ema", "ema.decay"),
            "true, but ema.decay = 0 keeps no average: set that, 0.999 perhaps, or this to false",
        )
    if config.validation.use_ema and not config.validation.interval:
        yield Contradiction(
            ("validation.use_ema", "validation.interval"),
            "true has no effect with validation.interval = 0: set this to false, or validate",
        )


def _without_effect(config: Config) -> Iterator[Contradiction]:
    optimizer = config.optimizer
    of_others = ["eps"] if optimizer.name == "lion" else []
    of_others += [field.name for field in fields(Optimizer) if field.name.startswith("muon_")] * (
        optimizer.name != "muon"
    )
    for key in of_others:
        value, default = getattr(optimizer, key), getattr(Optimizer(), key)
        if value != default:
            yield Contradiction(
                (f"optimizer.{key}", "optimizer.name"),
                f'{value} has no effect with name = "{optimizer.name}": leave it out',
            )


def _decay(config: Config) -> Iterator[Contradiction]:
    if config.optimizer.decay_embeddings and not config.optimizer.weight_decay:
        yield Contradiction(
            ("optimizer.decay_embeddings", "optimizer.weight_decay"),
            "true has no effect with weight_decay = 0: leave it out",
        )


def _moments(config: Config) -> Iterator[Contradiction]:
    optimizer = config.optimizer
    if optimizer.moments == "float32":
        return
    if optimizer.name in _QUANTIZED:
        yield Contradiction(
            ("optimizer.moments", "optimizer.name"),
            f'"{optimizer.moments}", but name = "{optimizer.name}" quantizes moments: leave it out, or use "adamw"',
        )
        return
    for key in _DECAYS[optimizer.name]:
        decay = getattr(optimizer, key)
        if decay > _LARGEST_IN_BFLOAT16:
            yield Contradiction(
                ("optimizer.moments", f"optimizer.{key}"),
                f'"bfloat16" has too few bits for the changes of a moment with {key} = {decay}: use {key} <= '
                f'{_LARGEST_IN_BFLOAT16}, or "float32"',
            )


def _offloaded(config: Config) -> Iterator[Contradiction]:
    name = config.optimizer.name
    if config.parallel.cpu_offload and name in ("muon", *_QUANTIZED):
        why = "would orthogonalize matrices" if name == "muon" else "would quantize moments"
        yield Contradiction(
            ("optimizer.name", "parallel.cpu_offload"),
            f'"{name}" {why} on the host with parallel.cpu_offload = true: use "adamw" or "lion", or set that to false',
        )


def _multipliers(config: Config) -> Iterator[Contradiction]:
    patterns = config.optimizer.lr_multipliers
    if not patterns:
        return
    from swamla_titan.model.sizes import parameter_names  # torch takes seconds to import

    names = parameter_names(config.model)
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.3) or kinds
        tied = "; the head is the embedding's (model.tie_embeddings)" if "head" in pattern else ""
        yield Contradiction(
            ("optimizer.lr_multipliers", "model.flavor", "model.num_layers"),
            f'"{pattern}" fits no parameter{tied}; among them are {", ".join(near)}',
        )
