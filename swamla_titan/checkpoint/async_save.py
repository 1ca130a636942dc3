"""Saving in the background: tensors are copied to the host's memory, and a thread writes the copies.

`Saver` also decides whether training continues after a failure.
"""

import logging
import threading
import time

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swamla_titan.checkpoint.dump_folder import FolderLost
from swamla_titan.checkpoint.reader import Tensors
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.state import aligned_bytes
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config.sections import Checkpoint
from swamla_titan.distributed.dtensor import local
from swamla_titan.errors import RunFailed
from swamla_titan.kernels.host_memory import copy_within_host, is_on_host, lock_pages, unlock_pages
from swamla_titan.system.events import record_event

logger = logging.getLogger(__name__)

_WAY_OUT = "Make room, and start the same command again: it continues from the checkpoint before"


class Saver:
    """Saves a run: in the background (checkpoint.async_mode), one checkpoint at a time, or while training waits.

    A checkpoint that cannot be written is reported, and training continues: the next interval tries again. Raises
    RunFailed after checkpoint.max_failures consecutive failures, the last of which it waits for, and for the last
    checkpoint of a run. All ranks call the same methods in the same order, with the same outcome.
    """

    def __init__(
        self, config: Checkpoint, checkpoints: Checkpoints, device: torch.device, step: int, expected: int = 0
    ) -> None:
        """`step`: the one that the run resumes from, which is saved. `expected`: bytes this rank saves, see Staging.

        `checkpoints` must have a process group of its own, because the thread communicates while training does.
        """
        self._config, self._checkpoints = config, checkpoints
        self._in_background = config.async_mode != "disabled"
        self._staging = Staging(device, expected if self._in_background else 0)
        self._saved = step
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._attempted: int | None = None  # the step of an attempt that is not counted yet
        self._outcome: BaseException | None = None  # of that attempt

    @property
    def saved_step(self) -> int:
        """The newest step that is saved; waits for the checkpoint in flight."""
        self.settle()
        return self._saved

    def before_update(self) -> None:
        """Order the copy in flight before the changes of weights, optimizer states and policies that follow."""
        self._staging.before_update()

    def save(self, tensors: Tensors, state: TrainState, files: dict[str, bytes], last: bool = False) -> None:
        """Save one checkpoint. `last`: wait until it is on the disk, and raise RunFailed if it fails."""
        self.settle()
        last = last or self._failures >= max(1, self._config.max_failures - 1)  # one more failure ends the run
        begin = time.monotonic()
        self._attempted, self._outcome = state.step, None
        if self._in_background:
            tensors = self._staging.copy(tensors)
        if last or not self._in_background:
            self._staging.wait()
            self._outcome = self._attempt(tensors, state, files, begin)
            self.settle()
            if self._failures and (last or self._failures >= self._config.max_failures):
                number = f". That is consecutive failure {self._failures}" if self._failures > 1 else ""
                raise RunFailed(f"{self._outcome}{number}. {_WAY_OUT}")
            return

        def write() -> None:
            self._staging.wait()
            self._outcome = self._attempt(tensors, state, files, begin)

        # A daemon, because a rank that ends alone must not wait for the others.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def close(self, alone: bool = False) -> None:
        """Wait for the checkpoint in flight. `alone`: the other ranks do not participate; do not wait."""
        if self._thread is not None and not alone:
            self._thread.join()
        self._staging.close(alone)

    def _attempt(
        self, tensors: Tensors, state: TrainState, files: dict[str, bytes], begin: float
    ) -> BaseException | None:
        try:
            path = self._checkpoints.save(tensors, state, files)
        except FolderLost as error:  # no further attempt can succeed
            return error
        except RunFailed as error:
            if self._failures + 1 < self._config.max_failures:  # at once, not when `settle` finds it an interval later
                self._report(error)
            return error
        except BaseException as error:  # for the thread that can end the run
            return error
        seconds = time.monotonic() - begin
        logger.info("checkpoint %s (%.1f s)", path, seconds)
        record_event("checkpoint", step=state.step, seconds=round(seconds, 3))
        return None

    def _report(self, error: RunFailed) -> None:
        record_event("checkpoint_failed", step=self._attempted, error=str(error))
        logger.error(
            "%s. Training continues, and tries again after checkpoint.interval steps; this is consecutive failure %d, "
            "and %d end the run (checkpoint.max_failures)",
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


class Staging:
    """Copies this rank's shards of named tensors to the host, into one buffer that is kept for the next copy.

    On a GPU the buffer is pinned, and the copy runs on its own stream beside the next step's forward and backward
    passes. Neither host nor device waits for it until the tensors are about to change: `before_update`. If the buffer
    cannot be pinned, the host waits for the copy.
    """

    def __init__(self, device: torch.device, expected: int = 0) -> None:
        """`expected`: bytes that a thread pins at once, because that takes half a second a gigabyte."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._awaited = True  # the last copy, by the device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._preparing: threading.Thread | None = None
        if expected and self._stream is not None:
            self._preparing = threading.Thread(target=self._reserve, args=(expected,), name="pinning", daemon=True)
            self._preparing.start()

    @torch.no_grad()
    def copy(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """Begin to copy `tensors` as they are once the work submitted so far is done.

        Returns the copies by the same groups and names, of DTensors on the same mesh. They are valid from `wait` to the
        next call.
        """
        self._prepared()
        self._reserve(sum(aligned_bytes(local(each)) for group in tensors.values() for each in group.values()))
        if self._stream is None:
            return self._copied_to_host(tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = self._copied_to_host(tensors)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._awaited = False
        return copies

    def before_update(self) -> None:
        """Make work submitted to the current stream from here on, which changes the tensors, wait for the copy."""
        if self._copied is not None and not self._awaited:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._awaited = True

    def wait(self) -> None:
        """Wait for the last copy, in any thread of the host."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self, alone: bool = False) -> None:
        """Free the buffer, and with it the copies.

        `alone`: the device may never finish, so wait only for the thread that pins memory, which must not outlive the
        interpreter.
        """
        self._prepared()
        if not alone:
            self.wait()
            self._release()

    def _prepared(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _release(self) -> None:
        if self._pinned:
            unlock_pages(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, size: int) -> None:
        """Make the buffer at least `size` bytes long."""
        if size <= len(self._memory):
            return
        self._release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._stream is None:
            return
        # Not with torch's allocator of pinned memory, because it takes the next power of two.
        refused = lock_pages(self._memory.data_ptr(), size, self._device)
        self._pinned = refused == 0
        if refused:
            logger.warning(
                "%.1f GiB of the host's memory could not be pinned (CUDA error %d; see ulimit -l): checkpoints are "
                "copied there all the same, but training waits for it",
                size / 2**30,
                refused,
            )

    def _copied_to_host(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        copies: dict[str, dict[str, Tensor]] = {}
        begin = 0  # of the next copy in the buffer
        for group, members in tensors.items():
            copies[group] = {}
            for name, tensor in members.items():
                copies[group][name] = self._copy_of(tensor, begin)
                begin += aligned_bytes(local(tensor))
        return copies

    def _copy_of(self, tensor: Tensor, begin: int) -> Tensor:
        own = local(tensor)
        buffer = self._memory[begin : begin + own.numel() * own.element_size()].view(own.dtype).view(own.shape)
        if self._pinned and is_on_host(own):
            copy_within_host(buffer, own)
        else:
            buffer.copy_(own, non_blocking=self._pinned)
        if self._stream is not None and own.is_cuda:
            own.record_stream(self._stream)  # it may be freed before the copy is done
        if not isinstance(tensor, DTensor):
            return buffer
        # Not with from_local, because it would move the copy to the mesh's device.
        return DTensor(buffer, tensor._spec, requires_grad=False)
