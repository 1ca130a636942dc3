"""Found on PYTHONPATH by every Python of a soak; spoils steps of training.

Gradients are no numbers in the steps that CHAOS_NAN_STEPS names. A process that finds a file of its PID in the folder
CHAOS_ASLEEP does not come out of its next step. Training itself is left as it is; this module waits until the module of
the step has been imported, and wraps its methods.
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
_MODULE = "swamla_titan.train.step"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module of the step as everybody else would, with a loader that spoils it afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
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
    take_step = module.TrainStep.__call__
    current = 0

    def gradient_norm(self):  # type: ignore[no-untyped-def]
        if current in _STEPS:
            for part in self.parts:
                for weight in part.parameters():
                    weight.grad.fill_(float("nan"))
        return norm_of(self)

    def train_step(self, batch, step):  # type: ignore[no-untyped-def]
        nonlocal current
        current = step
        if (asleep := _ASLEEP / str(os.getpid())).exists():
            asleep.unlink()  # the number may be another process's some day
            time.sleep(100_000)
        return take_step(self, batch, step)

    ParallelModel.gradient_norm = gradient_norm  # type: ignore[method-assign]
    module.TrainStep.__call__ = train_step  # type: ignore[attr-defined]


if _STEPS or "CHAOS_ASLEEP" in os.environ:
    sys.meta_path.insert(0, _Finder())
