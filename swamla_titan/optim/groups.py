"""Parameter groups: by which rule a parameter moves, how its moments are kept, whether it decays, its learning rate."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from swamla_titan.config.sections import Optimizer
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.init import plain_name
from swamla_titan.optim.matrices import column_units

# optimizer.name -> most elements that share a scale, for those that keep moments of matrices in few bits. The sizes are
# torchao's.
BLOCKS = {"adamw8bit": 256, "adamw4bit": 128, "adamw_fp8": 256}
_FEWEST_TO_QUANTIZE = 4096  # elements of a matrix, as bitsandbytes and torchao have it
_SMALLEST_BLOCK = 32  # below, scales of both moments take more than a quarter of a byte an element
# Looked up or as wide as the vocabulary: no hidden layer's matrices. Muon leaves them to AdamW, and by default they do
# not decay: the norms behind an embedding make up for any size of its rows, and those of rare tokens would fade.
_VOCABULARY = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Kind:
    """What the parameters of a group have in common.

    `rule`: adamw, lion or muon. `moments`: float32, bfloat16, or the name of the optimizer that quantizes them.
    """

    rule: str
    moments: str
    weight_decay: float
    lr_multiplier: float

    def __str__(self) -> str:
        kept = "" if self.moments == "float32" else f" with moments of {self.moments.removeprefix('adamw').lstrip('_')}"
        decay = f"decay {self.weight_decay:g}" if self.weight_decay else "no decay"
        return f"{self.rule}{kept}, {decay}" + (f", lr x {self.lr_multiplier:g}" if self.lr_multiplier != 1 else "")


def groups(model: nn.Module, config: Optimizer) -> dict[Kind, list[nn.Parameter]]:
    """The trained parameters of a model or a part of it, each once; groups with matrices come first.

    A tied weight is one, and both ends of it, on different stages of a pipeline, are of the same kind.
    """
    units = column_units(model)
    untied = isinstance(model, SWAMLAModel) and not model.config.tie_embeddings
    found: dict[Kind, list[nn.Parameter]] = {}
    for name, parameter in sorted(named(model), key=lambda pair: pair[1].ndim < 2):
        # Rows of absent tokens have no gradient: a second moment that fades to the code of 0 before the first one does
        # would make steps of first / eps (hundreds of learning rates were seen). bitsandbytes advises the same.
        quantized = not (untied and name == "embedding.weight")
        kind = _kind(name, parameter, units.get(parameter, 0), config, quantized)
        found.setdefault(kind, []).append(parameter)
    return found


class Row(NamedTuple):
    """Of a group: its kind, how many elements it has, and its parameters' names without layers and `.weight`."""

    kind: Kind
    elements: int
    names: list[str]

    def __str__(self) -> str:
        return f"{self.kind}: {self.elements:,} parameters ({', '.join(self.names)})"


def group_table(config: ModelConfig, optimizer: Optimizer) -> list[Row]:
    """The groups of a whole model."""
    with torch.device("meta"):
        model = SWAMLAModel(config)
    names = {parameter: _folded(name) for name, parameter in named(model)}
    return [
        Row(kind, sum(each.numel() for each in parameters), list(dict.fromkeys(names[each] for each in parameters)))
        for kind, parameters in groups(model, optimizer).items()
    ]


def block_of(name: str, columns: int, unit: int) -> int:
    """How many consecutive elements of a row of a matrix share a scale under optimizer `name`; 0: it is not quantized.

    As many as the optimizer takes at most, and so that they divide the row; or `unit`, if ranks may cut rows into such.
    So no rank ever holds a part of a block, and the numbers are the same under every plan.
    """
    whole = unit or columns
    fitting = [size for size in range(_SMALLEST_BLOCK, BLOCKS[name] + 1, 2) if whole % size == 0]
    return max(fitting, default=0)


def multiplier(name: str, patterns: Mapping[str, float]) -> float:
    """The factor of the last of the patterns (fnmatch) that fit the name; 1 where none does."""
    return next((factor for pattern, factor in reversed(list(patterns.items())) if fnmatchcase(name, pattern)), 1.0)


def _kind(name: str, parameter: nn.Parameter, unit: int, config: Optimizer, quantized: bool) -> Kind:
    is_matrix = parameter.ndim >= 2
    rule = {"lion": "lion", "muon": "muon"}.get(config.name, "adamw")
    if rule == "muon" and (not is_matrix or name in _VOCABULARY):
        rule = "adamw"
    moments = config.moments if is_matrix else "float32"
    if config.name in BLOCKS and quantized and is_matrix and parameter.numel() >= _FEWEST_TO_QUANTIZE:
        moments = config.name if block_of(config.name, parameter.shape[-1], unit) else "float32"
    decays = is_matrix and (name not in _VOCABULARY or config.decay_embeddings)
    decay = config.weight_decay if decays else 0.0
    return Kind(rule, moments, decay, multiplier(name, config.lr_multipliers))


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a model or a part of it, by their names in a model to which nothing was applied."""
    tied = isinstance(model, SWAMLAModel) and model.config.tie_embeddings
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name, tied), parameter


def _folded(name: str) -> str:
    return ".".join(part for part in name.removesuffix(".weight").split(".") if part != "blocks" and not part.isdigit())
