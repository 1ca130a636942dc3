"""What kernels need to be launched: whether they can run, on which stream, tile sizes, descriptors and strides."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Limit(str):
    """A reason against a kernel that lies in what it takes: devices, dtypes, sizes. Others: in the mask or plan."""


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


def why_no_kernels(device: torch.device) -> Limit | None:
    """Why our kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return Limit("needs a GPU")
    return None if has_triton() else Limit("needs the package triton, which comes with PyTorch for CUDA")


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as in the configuration: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def is_tuned_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels were timed there and were faster than PyTorch's: in 16 bits on H100 and H200.

    On earlier GPUs (A100, L40) they would spill registers to memory.
    """
    return dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside that of the training step, for the little that must not wait for it; None on a CPU.

    What is queued there comes first.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Within, kernels are queued on this stream; None: on the current one."""
    return torch.cuda.stream(stream) if stream else nullcontext()


def hand_over(stream: torch.cuda.Stream | None, tensors: Iterable[Tensor]) -> None:
    """Let the current stream wait for `stream`, and use tensors that were made on it."""
    if stream is None or (now := torch.cuda.current_stream(stream.device)) == stream:
        return
    now.wait_stream(stream)
    for tensor in tensors:
        tensor.record_stream(now)


class Tiles(NamedTuple):
    """Sizes of a program's tiles of queries and of keys, and its launch options."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # at most so many per thread, so that more programs share a multiprocessor

    def constants(self) -> dict[str, int]:
        """The kernels' constexpr arguments and launch options."""
        constants = {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}
        return constants if self.registers is None else constants | {"maxnreg": self.registers}


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, because Triton's tiles are powers of two."""
    return 1 << (number - 1).bit_length()


class SplitWidth(NamedTuple):
    """A head's width as a sum of powers of two, because Triton's tiles are powers of two; the second may be 0."""

    D1: int
    D2: int

    @classmethod
    def of(cls, width: int) -> "SplitWidth":
        """The largest power of two in `width`, and the rest."""
        wide = 1 << (width.bit_length() - 1)
        return cls(wide, width - wide)


def tma_descriptors(x: Tensor, tokens: int, widths: tuple[int, ...]) -> list[Any]:
    """Descriptors of x [B, T, H, D] for the tensor memory accelerator: tiles of `tokens` by each width; None for 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, strides = list(x.shape), list(x.stride())
    return [TensorDescriptor(x, shape, strides, [1, tokens, 1, width]) if width else None for width in widths]


def tma_descriptors_of_two(x: Tensor, y: Tensor, tokens: int) -> list[Any]:
    """Descriptors of tiles of `tokens` by the two parts of x's heads, and by y's heads."""
    return [*tma_descriptors(x, tokens, SplitWidth.of(x.shape[-1])), *tma_descriptors(y, tokens, (y.shape[-1],))]


def tma_readable(x: Tensor) -> Tensor:
    """x, or a copy if the tensor memory accelerator cannot read it, because addresses are no multiples of 16 bytes."""
    unaligned = any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    fits = x.stride(-1) == 1 and not unaligned and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(*heads: Tensor) -> list[int]:
    """The strides of batch, token and head of each tensor [B, T, H, D], or of batch and token of [B, T, D]."""
    assert all(x.stride(-1) == 1 for x in heads), "the elements of a head must be adjacent"
    return [stride for x in heads for stride in x.stride()[:-1]]
