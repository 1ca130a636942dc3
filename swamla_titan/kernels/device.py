"""Where our kernels are launched, and with what: tiles, and views of tensors as they read them."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


def why_no_kernels(device: torch.device) -> str | None:
    """What keeps our kernels from this device, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    return None if has_triton() else "needs the package triton, which comes with PyTorch for CUDA"


def named(dtype: torch.dtype) -> str:
    """As in the configuration: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def is_tuned_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels were timed there and found faster than what PyTorch has: in 16 bits on H100 and H200.

    On GPUs before them (A100, L40) their code would keep much of its work in memory instead of registers.
    """
    return dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) == (9, 0)


class Tiles(NamedTuple):
    """Rows of queries and of keys that meet at a time, and what runs one such program."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most, so that more programs share a processor

    def constants(self) -> dict[str, int]:
        """As the kernels' arguments."""
        rows = {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}
        return rows if self.registers is None else rows | {"maxnreg": self.registers}


class Parts(NamedTuple):
    """Powers of two that a head is cut into, since Triton's tiles are such; the second may be 0."""

    D1: int
    D2: int

    @classmethod
    def of(cls, width: int) -> "Parts":
        """As few as can be."""
        wide = 1 << (width.bit_length() - 1)
        return cls(wide, width - wide)


def descriptors(x: Tensor, rows: int, parts: tuple[int, ...]) -> list[Any]:
    """By which the tensor memory accelerator reads `rows` rows of each part of a head; None for a part of 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, strides = list(x.shape), list(x.stride())
    return [TensorDescriptor(x, shape, strides, [1, rows, 1, n]) if n else None for n in parts]


def readable(x: Tensor) -> Tensor:
    """x, or a copy of it where the tensor memory accelerator could not read it: addresses in multiples of 16 bytes."""
    unaligned = any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    fits = x.stride(-1) == 1 and not unaligned and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head."""
    assert x.stride(-1) == 1, "the elements of a head must be adjacent"
    return x.stride(0), x.stride(1), x.stride(2)
