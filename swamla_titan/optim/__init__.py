"""Parameter groups, optimizers, the moving average of the weights, and learning-rate schedules."""

from swamla_titan.optim.ema import AveragedWeights, bring_up_to_date, bytes_of_average, names_of_decays
from swamla_titan.optim.groups import group_table, trained_parameters
from swamla_titan.optim.optimizer import (
    GroupedOptimizer,
    Optimizers,
    build_optimizer,
    clip_divisor,
    gradient_norm,
    lr_factor,
    state_bytes,
    validate_optimizer_device,
)

__all__ = [
    "AveragedWeights",
    "GroupedOptimizer",
    "Optimizers",
    "bring_up_to_date",
    "build_optimizer",
    "bytes_of_average",
    "clip_divisor",
    "gradient_norm",
    "group_table",
    "lr_factor",
    "names_of_decays",
    "state_bytes",
    "trained_parameters",
    "validate_optimizer_device",
]
