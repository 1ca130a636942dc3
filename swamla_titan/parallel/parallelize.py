"""Applies the plan of the configuration to a model, from outside, in one fixed order."""

import torch

from swamla_titan.config import Config
from swamla_titan.model import SWAMLAModel
from swamla_titan.parallel.data_parallel import apply_data_parallel
from swamla_titan.parallel.world import World


def parallelize(model: SWAMLAModel, config: Config, world: World) -> None:
    """Change the model, or a pipeline stage of it, in place; its parameters are still on the meta device.

    The order matters: what comes later sees what earlier steps made of the blocks.
    """
    model.compute_dtype = getattr(torch, config.training.compute_dtype)
    if config.compile.enabled:
        for block in model.blocks.values():
            block.compile(fullgraph=True, dynamic=False)
        model.loss_function = torch.compile(model.loss_function, fullgraph=True, dynamic=False)
    apply_data_parallel(model, config.parallel, world, model.compute_dtype)
