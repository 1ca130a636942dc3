"""The trainer: the loop, checkpoints, signals, metrics."""

from swamla_titan.train.logs import end_output, log_to_console
from swamla_titan.train.run import train
from swamla_titan.train.trainer import Trainer

__all__ = ["Trainer", "end_output", "log_to_console", "train"]
