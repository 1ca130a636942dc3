"""The trainer: the loop, checkpoints, signals, metrics."""

from swamla_titan.train.logs import log_to_console
from swamla_titan.train.run import train
from swamla_titan.train.trainer import Trainer

__all__ = ["Trainer", "log_to_console", "train"]
