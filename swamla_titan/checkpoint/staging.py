"""Copies of tensors in the memory of the host, from which a checkpoint can be written while training goes on."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swamla_titan.distributed.dtensor import local

logger = logging.getLogger(__name__)

ALIGNED = 64  # bytes; any type may begin there
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class Staging:
    """Host copies of what this rank holds of named tensors, in one piece of memory that is kept for the next copy.

    On a GPU the memory is pinned, and the copy runs on a stream of its own beside the next step's forward and backward
    passes. Neither host nor device waits for it until the tensors are about to be changed: `before_update`. Memory that
    cannot be pinned does as well, but the host waits for the copy.
    """

    def __init__(self, device: torch.device, expected: int = 0) -> None:
        """`expected`: bytes for which memory is pinned at once, by a thread, for it takes half a second a gigabyte."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._awaited = True  # by the device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._preparing: threading.Thread | None = None
        if expected and self._stream is not None:
            self._preparing = threading.Thread(target=self._reserve, args=(expected,), name="pinning", daemon=True)
            self._preparing.start()

    @torch.no_grad()
    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Begin to copy `tensors`, in nested dictionaries, as they are once the work submitted so far is done.

        Returns the same with copies in place of tensors, DTensors on the same mesh. They are good after `wait`, until
        the next call.
        """
        self._prepared()
        self._reserve(sum(_room(local(each)) for each in _leaves(tensors)))
        if self._stream is None:
            return self._copied_to_host(tensors, [0])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = self._copied_to_host(tensors, [0])
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._awaited = False
        return copies

    def before_update(self) -> None:
        """The tensors are about to be changed in place, by work submitted to the current stream after this."""
        if self._copied is not None and not self._awaited:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._awaited = True

    def wait(self) -> None:
        """Wait on the host for the last copy; by whichever thread needs it."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self, alone: bool = False) -> None:
        """Give the memory back; copies are good no longer.

        `alone`: the device may never be done with it, so only the thread that pins memory is waited for, which must not
        outlive the interpreter.
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
        # Memory that is freed while it is pinned stays so by its address, and what comes to lie there next cannot be
        # pinned, or is copied to where it was.
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, size: int) -> None:
        """Have memory of at least `size` bytes."""
        if size <= len(self._memory):
            return
        self._release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._stream is None:
            return
        # Not by torch's allocator of pinned memory, which takes the next power of two. A thread has a current device of
        # its own, which would be the machine's first.
        with torch.cuda.device(self._device):
            refused = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, _PORTABLE))
        self._pinned = refused == 0
        if refused:
            logger.warning(
                "%.1f GiB of the host's memory could not be pinned (CUDA error %d; see ulimit -l): checkpoints are "
                "copied there all the same, but training waits for it",
                size / 2**30,
                refused,
            )

    def _copied_to_host(self, tensors: dict[str, Any], used: list[int]) -> dict[str, Any]:
        """`used`: a single number, of the bytes of memory that are taken."""
        return {
            name: self._copied_to_host(each, used) if isinstance(each, dict) else self._copy_of(each, used)
            for name, each in tensors.items()
        }

    def _copy_of(self, tensor: Tensor, used: list[int]) -> Tensor:
        own = local(tensor)
        begin, size = used[0], own.numel() * own.element_size()
        used[0] += _room(own)
        buffer = self._memory[begin : begin + size].view(own.dtype).view(own.shape)
        buffer.copy_(own, non_blocking=self._pinned)
        if self._stream is not None and own.is_cuda:
            own.record_stream(self._stream)  # it may be freed before the copy is done
        if not isinstance(tensor, DTensor):
            return buffer
        # Not by from_local, which would move it to the mesh's devices.
        return DTensor(buffer, tensor._spec, requires_grad=False)


def _leaves(tensors: dict[str, Any]) -> Iterator[Tensor]:
    for each in tensors.values():
        if isinstance(each, dict):
            yield from _leaves(each)
        else:
            yield each


def _room(tensor: Tensor) -> int:
    """Bytes that a copy takes, with what keeps the next one aligned."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
