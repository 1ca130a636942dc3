"""The trainer: the loop, checkpoints, signals, metrics."""

from swamla_titan.train.logs import end_output, log_to_console
from swamla_titan.train.trainer import Trainer, train

__all__ = ["Trainer", "end_output", "log_to_console", "train"]
