"""Training: setup, the step, the loop over steps, policies, logging."""

from swamla_titan.train.logging import log_to_console
from swamla_titan.train.run import train
from swamla_titan.train.trainer import Trainer

__all__ = ["Trainer", "log_to_console", "train"]
