"""Profiles some steps, for chrome://tracing or Perfetto."""

import errno
import logging
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from swamla_titan.config.sections import Profiling
from swamla_titan.train.policy import Policy, StepOutcome

logger = logging.getLogger(__name__)


class StepProfiler(Policy):
    """Records steps start_step .. start_step + num_steps - 1 into traces/steps-A-B.json, once.

    If the run ends earlier, the file has the steps until then.
    """

    def __init__(self, config: Profiling, folder: Path, rank: int = 0) -> None:
        self.config = config
        self.folder = folder
        self.suffix = f"-rank-{rank}" if rank else ""
        self._profile: profile | None = None
        self._last_step = 0

    def before_step(self, step: int) -> None:
        """Start recording if this is the first step to record."""
        if self.config.enabled and step == self.config.start_step:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        """Stop and write after the last step to record."""
        self._last_step = step
        if step == self.config.start_step + self.config.num_steps - 1:
            self._write()

    def close(self, discard: bool) -> None:
        """Stop recording, because a running profiler crashes the interpreter at its end; write the trace or drop it."""
        if discard:
            self._drop()
        else:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        path = self.folder / f"steps-{self.config.start_step}-{self._last_step}{self.suffix}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
            _require_complete(path)
            logger.info("profile written to %s", path)
        except (OSError, RuntimeError) as error:  # not a reason to end the run
            logger.warning("the profile %s could not be written (%s); training continues", path, error)
            with suppress(OSError):
                for part in self.folder.glob(f"{path.name}*"):  # torch writes to a temporary name first
                    part.unlink()
        self._profile = None

    def _drop(self) -> None:
        """Stop without waiting for the device, which may be in a collective that the other ranks never enter."""
        if self._profile is None:
            return
        assert self._profile.profiler is not None
        self._profile.profiler.use_device = None  # else its stop() synchronizes the device
        self._profile.stop()
        self._profile = None


def _require_complete(path: Path) -> None:
    """Raise OSError unless a trace has its end, because torch does not report a full disk."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(errno.ENOSPC, "its end is missing: is the disk full?")
