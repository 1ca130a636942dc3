"""Found on PYTHONPATH by every Python of a soak; spoils steps of training.

Gradients are no numbers in the steps that CHAOS_NAN_STEPS names. A process that finds a file of its PID in the folder
CHAOS_ASLEEP does not come out of its next step. Training itself is left as it is; this module waits until the trainer's
module has been imported, and wraps its methods.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_STEPS = {int(step) for step in os.environ.get("CHAOS_NAN_STEPS", "").split(",") if step}
_ASLEEP = Path(os.environ.get("CHAOS_ASLEEP", os.devnull))
_TRAINER = "swamla_titan.train.trainer"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the trainer's module as everybody else would, with a loader that spoils it afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_spoil(module: ModuleType) -> None:
            run(module)
            _spoil(module)

        spec.loader.exec_module = run_and_spoil  # type: ignore[method-assign]
        return spec


def _spoil(module: ModuleType) -> None:
    from swamla_titan.parallel.model_parts import ParallelModel

    norm_of = ParallelModel.gradient_norm
    train_step = module.Trainer.train_step
    steps = 0

    def gradient_norm(self):  # type: ignore[no-untyped-def]
        if steps in _STEPS:
            for part in self.parts:
                for weight in part.parameters():
                    weight.grad.fill_(float("nan"))
        return norm_of(self)

    def count_and_train(self, batch):  # type: ignore[no-untyped-def]
        nonlocal steps
        steps = self.step + 1
        if (asleep := _ASLEEP / str(os.getpid())).exists():
            asleep.unlink()  # the number may be another process's some day
            time.sleep(100_000)
        return train_step(self, batch)

    ParallelModel.gradient_norm = gradient_norm  # type: ignore[method-assign]
    module.Trainer.train_step = count_and_train  # type: ignore[attr-defined]


if _STEPS or "CHAOS_ASLEEP" in os.environ:
    sys.meta_path.insert(0, _Finder())
