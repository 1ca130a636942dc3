"""Parameter groups, optimizers and learning-rate schedules."""

from swamla_titan.optim.gradients import clip_gradients
from swamla_titan.optim.optimizers import STATE_BYTES, build_optimizer, set_learning_rate, skip_where
from swamla_titan.optim.schedules import lr_factor

__all__ = ["STATE_BYTES", "build_optimizer", "clip_gradients", "lr_factor", "set_learning_rate", "skip_where"]
