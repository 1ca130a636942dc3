"""Parameter groups, optimizers, the moving average of the weights, and learning-rate schedules."""

from swamla_titan.optim.ema import AveragedWeights
from swamla_titan.optim.gradients import gradient_norm
from swamla_titan.optim.groups import group_table
from swamla_titan.optim.optimizers import (
    build_optimizer,
    clip_gradients,
    lr_factor,
    set_learning_rate,
    skip_where,
    state_bytes,
    validate_optimizer_device,
)

__all__ = [
    "AveragedWeights",
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "group_table",
    "lr_factor",
    "set_learning_rate",
    "skip_where",
    "state_bytes",
    "validate_optimizer_device",
]
