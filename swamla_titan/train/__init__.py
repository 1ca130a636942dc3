"""The trainer: the loop, checkpoints, signals, metrics."""

from swamla_titan.train.logs import log_to_console
from swamla_titan.train.trainer import Trainer, train

__all__ = ["Trainer", "log_to_console", "train"]
