"""Applies the plan of the configuration to a model, from outside."""

import torch

from swamla_titan.config import Config
from swamla_titan.model import SWAMLAModel


def parallelize(model: SWAMLAModel, config: Config) -> None:
    """Change the model in place: compute type and compilation per block.

    Blocks are compiled one by one, so all blocks of a kind share one compiled code and a deep model compiles as
    fast as a shallow one. The loss is compiled apart, which fuses its float32 upcast into the reduction.
    """
    model.compute_dtype = getattr(torch, config.training.compute_dtype)
    if config.compile.enabled:
        for block in model.blocks.values():
            block.compile(fullgraph=True, dynamic=False)
        model.loss_function = torch.compile(model.loss_function, fullgraph=True, dynamic=False)
