"""The tensors of a run under the names that they have in a checkpoint."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from swamla_titan.distributed.dtensor import plain
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import AveragedWeights

EMA = "ema"


def tensors_of(
    parts: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    ema: AveragedWeights | None = None,
) -> dict[str, Any]:
    """The live tensors to save or to load into, by name; loading writes them in place.

    `parts` are the model, or the pipeline stages that this rank holds, each with its optimizer. Names and shapes are
    those of the whole model whatever the plan, so a checkpoint of one plan loads into any other. A tied output head
    goes by the embedding's name: on a stage that holds it alone it is a copy. Of the optimizer only tensors are taken:
    learning rates and the like follow from the configuration and the step.
    """
    tensors: dict[str, Any] = {"model": {}} | ({"optimizer": {}} if optimizers else {}) | ({EMA: {}} if ema else {})
    for part in parts:
        for name, weight in get_model_state_dict(part).items():
            tensors["model"].setdefault(_stored_name(name, part), plain(weight))
    for part, optimizer in zip(parts, optimizers):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for name, value in get_optimizer_state_dict(part, optimizer, options=options).items():
            if isinstance(value, torch.Tensor):
                tensors["optimizer"].setdefault(_stored_name(name, part), value)
    if ema:
        for part in parts:
            tensors[EMA] = ema.of_part(part) | tensors[EMA]
    return tensors


def _stored_name(name: str, part: nn.Module) -> str:
    tied = isinstance(part, SWAMLAModel) and part.config.tie_embeddings
    return re.sub(r"(^|\.)head\.weight", r"\1embedding.weight", name) if tied else name
