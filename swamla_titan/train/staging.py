"""Copies of tensors in the memory of the host, from which a checkpoint can be written while training goes on."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swamla_titan.parallel.sharded import local


class Staging:
    """Host copies of what this rank holds of named tensors; their memory is kept for the next copy.

    On a GPU the memory is pinned, and the copy runs on a stream of its own beside the next step's forward and backward
    passes. Neither host nor device waits for it until the tensors are about to be changed: `before_update`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._awaited = True  # by the device
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Begin to copy `tensors`, in nested dictionaries, as they are once the work submitted so far is done.

        Returns the same with copies in place of tensors, DTensors on the same mesh. They are good after `wait`, until
        the next call.
        """
        if self._stream is None:
            return self._copied_to_host(tensors, "")
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = self._copied_to_host(tensors, "")
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

    def _copied_to_host(self, tensors: dict[str, Any], path: str) -> dict[str, Any]:
        return {
            name: self._copied_to_host(each, f"{path}{name}/")
            if isinstance(each, dict)
            else self._copy_of(each, path + name)
            for name, each in tensors.items()
        }

    def _copy_of(self, tensor: Tensor, name: str) -> Tensor:
        own = local(tensor)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != own.shape or buffer.dtype != own.dtype:
            buffer = torch.empty_like(own, device="cpu", pin_memory=self._stream is not None)
            self._buffers[name] = buffer
        buffer.copy_(own, non_blocking=True)
        if self._stream is not None and own.is_cuda:
            own.record_stream(self._stream)  # it may be freed before the copy is done
        if not isinstance(tensor, DTensor):
            return buffer
        # Not by from_local, which would move it to the mesh's devices.
        return DTensor(buffer, tensor._spec, requires_grad=False)
