"""Parameter groups: each parameter's update rule, format of moments, weight decay and learning-rate multiplier."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from swamla_titan.config.sections import Optimizer
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.init import plain_name
from swamla_titan.model.layers import Role, UpdateRule, linear_weights
from swamla_titan.model.row_table import RowTable
from swamla_titan.optim.rules import RULES, Kind
from swamla_titan.optim.state import BLOCKS, Format, block_size

_FEWEST_TO_QUANTIZE = 4096  # elements of a matrix, as bitsandbytes and torchao have it
# Matrices with one row per token of the vocabulary, and what else is looked up, are no hidden layers' matrices: Muon
# leaves them to AdamW, and by default they do not decay, because the norm after an embedding makes up for any scale of
# its rows, and rows that are rarely looked up would fade.
_VOCABULARY = ("embedding.weight", "head.weight")


def groups(model: nn.Module, config: Optimizer) -> dict[Kind, list[nn.Parameter]]:
    """The trained parameters of a model or a pipeline stage by their settings, each once; matrices come first.

    A tied weight is one parameter; where its two ends are on different pipeline stages, both have the same settings.
    """
    units, rules = column_units(model), dict(declared_rules(model))
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = isinstance(model, SWAMLAModel) and model.config.tie_embeddings
    found: dict[Kind, list[nn.Parameter]] = {}
    for name, parameter in sorted(trained_parameters(model), key=lambda pair: pair[1].ndim < 2):
        # The rows of absent tokens have no gradient: if their second moment decays to the code of 0 before the first
        # one does, a step becomes first / eps (hundreds of learning rates were seen). bitsandbytes advises the same.
        quantized = parameter not in tables or (tied and name == "embedding.weight")
        is_hidden = parameter not in tables and name not in _VOCABULARY
        rule = rules.get(parameter, UpdateRule())
        kind = _kind(name, parameter, units.get(parameter, 0), config, quantized, is_hidden, rule)
        found.setdefault(kind, []).append(parameter)
    return found


def declared_rules(model: nn.Module) -> Iterator[tuple[nn.Parameter, UpdateRule]]:
    """The parameters of modules that declare how they move.

    Raises TypeError for `by_rows` of a module that is no RowTable, because its gradient is not by rows.
    """
    for module in model.modules():
        rule = getattr(module, "update_rule", None)
        if isinstance(rule, UpdateRule):
            if rule.by_rows and not isinstance(module, RowTable):
                raise TypeError(f"{type(module).__name__}.update_rule: by_rows is for a RowTable")
            for parameter in module.parameters(recurse=False):
                yield parameter, rule


def column_units(model: nn.Module) -> dict[torch.Tensor, int]:
    """For each weight whose columns tensor parallelism shards, how many consecutive columns always stay together."""
    return {weight: spec.unit for weight, spec in linear_weights(model) if spec.role is Role.RESIDUAL_OUTPUT}


class GroupSummary(NamedTuple):
    """A group for the startup summary: kind, elements, and parameters' names without layer numbers and `.weight`."""

    kind: Kind
    elements: int
    names: list[str]

    def __str__(self) -> str:
        return f"{self.kind}: {self.elements:,} parameters ({', '.join(self.names)})"


def group_table(config: ModelConfig, optimizer: Optimizer) -> list[GroupSummary]:
    """The parameter groups of a full model."""
    with torch.device("meta"):
        model = SWAMLAModel(config)
    names = {parameter: _without_layer(name) for name, parameter in trained_parameters(model)}
    return [
        GroupSummary(
            kind, sum(each.numel() for each in parameters), list(dict.fromkeys(names[each] for each in parameters))
        )
        for kind, parameters in groups(model, optimizer).items()
    ]


def multiplier(name: str, patterns: Mapping[str, float]) -> float:
    """The value of the last pattern (fnmatch) that matches the name; 1 if none does."""
    return next((factor for pattern, factor in reversed(list(patterns.items())) if fnmatchcase(name, pattern)), 1.0)


def _kind(
    name: str,
    parameter: nn.Parameter,
    unit: int,
    config: Optimizer,
    quantized: bool,
    is_hidden: bool,
    declared: UpdateRule,
) -> Kind:
    is_matrix = parameter.ndim >= 2
    lr_multiplier = declared.lr_multiplier * multiplier(name, config.lr_multipliers)
    decays = is_matrix and declared.decays and (is_hidden or config.decay_embeddings)
    decay = config.weight_decay if decays else 0.0
    if declared.by_rows:
        return Kind("rows" if config.lazy_tables else "all_rows", "float32", decay, lr_multiplier)
    is_own = config.name in RULES and (not RULES[config.name].of_hidden_matrices or (is_matrix and is_hidden))
    rule = config.name if is_own else "adamw"
    moments: Format = config.moments if is_matrix else "float32"
    if config.name in BLOCKS and quantized and is_matrix and parameter.numel() >= _FEWEST_TO_QUANTIZE:
        fitting = (form for form in BLOCKS if form == config.name and block_size(form, parameter.shape[-1], unit))
        moments = next(fitting, "float32")
    return Kind(rule, moments, decay, lr_multiplier)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a model or a pipeline stage, by their names before any parallelism was applied."""
    tied = isinstance(model, SWAMLAModel) and model.config.tie_embeddings
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name, tied), parameter


def _without_layer(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(part for part in parts if part not in ("blocks", "annexes") and not part.isdigit())
