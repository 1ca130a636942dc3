"""Memory of the host that kernels of a GPU read and write: page-locked, and a tensor of that GPU all the same.

CUDA addresses the memory of the host and of all GPUs alike (unified virtual addressing). So a kernel that is given the
address of page-locked memory reads and writes it over PCIe, row by row, in the order of its stream:

    kernel  ->  address  ->  PCIe  ->  page of the host, locked so that it stays where it is

No operator knows the difference, and results are the same bits.
"""

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from swamla_titan.errors import RankFailed

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device
# Large pages are locked faster. No child process inherits the pages, because the kernel would copy those that are
# locked. Python has these constants where the system does.
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")


def zeros_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in the memory of the host, as a tensor of `device`; of a CPU or the meta device these are any zeros.

    The memory is freed with the tensor. Raises RankFailed where the host has not as much, or does not lock it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cuda" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.as_tensor(_Pages(size, device), device=device).view(dtype).view(shape)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor of a GPU is one of `zeros_on_host`, or a view of one."""
    return tensor.is_cuda and tensor.untyped_storage().data_ptr() in _Pages.addresses


def copy_within_host(target: Tensor, source: Tensor) -> None:
    """Copy a float32 tensor that `is_on_host` into a page-locked one of the CPU, in the order of the current stream.

    By a kernel, because CUDA's own copy from memory of the host to memory of the host makes the host wait.
    """
    there = _Addressed(target.data_ptr(), target.nbytes)
    on_device = torch.as_tensor(there, device=source.device).view(torch.int32)
    torch.bitwise_or(source.view(torch.int32).flatten(), 0, out=on_device)


class _Addressed:
    """Page-locked memory of the host, as torch.as_tensor reads it for a GPU."""

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address, False), "version": 3}


class _Pages(_Addressed):
    """Zeroed and page-locked memory for as long as this exists, which the tensor made of it keeps alive."""

    addresses: ClassVar[set[int]] = set()  # of all that exist

    def __init__(self, size: int, device: torch.device) -> None:
        free = free_memory()
        if free is not None and size > free:
            raise RankFailed(_message(size, f"{free / 2**30:.1f} GiB are free"))
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in _ADVICE:
            with suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        of_bytes = torch.frombuffer(memory, dtype=torch.uint8)
        of_bytes[:: mmap.PAGESIZE].zero_()  # by all cores, where locking alone would fetch one page after another
        super().__init__(of_bytes.data_ptr(), size)
        if refused := lock_pages(self._address, size, device):
            raise RankFailed(_message(size, f"it cannot be locked (CUDA error {refused}; see ulimit -l)"))
        self.addresses.add(self._address)
        # Not at the end of the process, which frees all, and when CUDA may be gone.
        weakref.finalize(self, _unlock_and_free, memory, self._address, device).atexit = False


def _unlock_and_free(memory: mmap.mmap, address: int, device: torch.device) -> None:
    """`memory` is freed when the caller lets go of it."""
    torch.cuda.synchronize(device)  # kernels may still use it
    _Pages.addresses.remove(address)
    unlock_pages(address)


def _message(size: int, reason: str) -> str:
    return (
        f"parallel.tables_on_host: {size / 2**30:.1f} GiB more of the host's memory are needed, and {reason}: make the "
        "tables smaller, or share their rows among more machines; `swamla-titan plan CONFIG` counts what they take"
    )


def lock_pages(address: int, size: int, device: torch.device) -> int:
    """Page-lock memory for the GPUs; 0, or the number of CUDA's error."""
    # A new thread's current device is GPU 0, so it must be set.
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE))


def unlock_pages(address: int) -> None:
    """Undo `lock_pages`; before the memory is freed.

    An address stays locked when its memory is freed, and the next memory there could then not be locked, or copies
    would go to the old pages.
    """
    torch.cuda.cudart().cudaHostUnregister(address)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, or the container that the process is in, has free; None where it does not say."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))  # given up where needed
        found.append(limit - used + cached)
    return min(found, default=None)
