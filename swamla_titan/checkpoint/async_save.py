"""When a checkpoint is written and by whom: at once or in the background, and what follows from a failure."""

import logging
import threading
import time
from typing import Any

import torch

from swamla_titan.checkpoint.dump_folder import FolderLost
from swamla_titan.checkpoint.staging import Staging
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.checkpoint.train_state import Record
from swamla_titan.config.sections import Checkpoint
from swamla_titan.errors import RunFailed

logger = logging.getLogger(__name__)

_WAY_OUT = "Make room, and start the same command again: it goes on from the checkpoint before"


class Saver:
    """Saves a run: in the background (checkpoint.async_mode), one checkpoint at a time, or while training waits.

    A checkpoint that cannot be written is reported, and training goes on: the next interval tries again. RunFailed is
    raised after checkpoint.max_failures of them in a row, the last of which is waited for, or if it is the last of a
    run. All ranks call the same methods in the same order, and all come to the same outcome.
    """

    def __init__(
        self, config: Checkpoint, checkpoints: Checkpoints, device: torch.device, step: int, expected: int = 0
    ) -> None:
        """`step`: where the run resumes; what is saved until then is no concern of this object.

        `checkpoints` must talk to the other ranks through a group that nobody else uses at the same time. `expected`:
        about how many bytes this rank will save, see Staging.
        """
        self._config, self._checkpoints = config, checkpoints
        self._staging = Staging(device, expected if config.async_mode != "disabled" else 0)
        self._device = device
        self._saved = step
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._attempted: int | None = None  # the step of an attempt that is not counted yet
        self._outcome: BaseException | None = None  # how it failed

    @property
    def saved_step(self) -> int:
        """The newest step that needs no saving any more; waits for the one in flight."""
        self.settle()
        return self._saved

    def before_update(self) -> None:
        """Weights, optimizer states or the history of bad steps are about to change: first they must be copied."""
        self._staging.before_update()

    def save(self, tensors: dict[str, Any], record: Record, files: dict[str, bytes], last: bool = False) -> None:
        """Save; `last`: it must be on the disk before anything else happens, and must not fail."""
        self.settle()
        last = last or self._failures >= max(1, self._config.max_failures - 1)  # no further one is left after it
        begin = time.monotonic()
        self._attempted, self._outcome = record.step, None
        if self._config.async_mode != "disabled":
            tensors = self._staging.copy(tensors)
        if self._config.async_mode == "disabled" or last:
            self._staging.wait()
            self._outcome = self._attempt(tensors, record, files, begin)
            self.settle()
            if self._failures and (last or self._failures >= self._config.max_failures):
                number = f". That is failure {self._failures} in a row" if self._failures > 1 else ""
                raise RunFailed(f"{self._outcome}{number}. {_WAY_OUT}")
            return

        def write() -> None:
            self._staging.wait()
            self._outcome = self._attempt(tensors, record, files, begin)

        # A daemon: a rank that ends alone must not wait for the others.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def close(self, alone: bool = False) -> None:
        """Let the checkpoint in flight be finished. `alone`: the other ranks are not there for it; do not wait."""
        if self._thread is not None and not alone:
            self._thread.join()
        self._staging.close(alone)

    def _attempt(
        self, tensors: dict[str, Any], record: Record, files: dict[str, bytes], begin: float
    ) -> BaseException | None:
        try:
            path = self._checkpoints.save(tensors, record, files)
        except FolderLost as error:  # no further attempt can succeed
            return error
        except RunFailed as error:
            if self._failures + 1 < self._config.max_failures:  # at once, not when it is noticed an interval later
                self._report(error)
            return error
        except BaseException as error:  # it travels to the thread that can end the run
            return error
        logger.info("checkpoint %s (%.1f s)", path, time.monotonic() - begin)
        return None

    def _report(self, error: RunFailed) -> None:
        logger.error(
            "%s. Training goes on, and tries again after checkpoint.interval steps; this is failure %d in a row, and "
            "%d end the run (checkpoint.max_failures)",
            error,
            self._failures + 1,
            self._config.max_failures,
        )

    def settle(self) -> None:
        """Wait for the checkpoint in flight, and count it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        step, self._attempted = self._attempted, None
        if step is None:
            return
        if self._outcome is None:
            self._saved, self._failures = step, 0
        elif isinstance(self._outcome, RunFailed) and not isinstance(self._outcome, FolderLost):
            self._failures += 1
        else:
            raise self._outcome
