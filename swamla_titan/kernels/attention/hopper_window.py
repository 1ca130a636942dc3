"""Sliding-window attention with sinks and documents by CUDA C++ kernels for Hopper (H100, H200).

hopper_window.cu says what each kernel does. The forward pass is one, the backward pass two and a sum over what far
queries add to the gradients of sinks. Output and gradients are deterministic.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from swamla_titan.kernels import cuda
from swamla_titan.kernels.attention import window_triton
from swamla_titan.kernels.cuda import CannotCompile, Kernel, TensorMap
from swamla_titan.kernels.device import Limit, dtype_name, tma_readable, why_no_kernels
from swamla_titan.kernels.limits import WINDOW_SINKS, WINDOW_WIDTHS

_CAPABILITY = (9, 0)
_LOG2_E = 1.4426950408889634
_TILE, _FAR = 64, 16  # tokens of a tile, and far keys at a time


def _bytes(width: int, groups: int, *tiles: int) -> int:
    """Shared memory for so many tiles of each warp group, and in stages for all, and for barriers."""
    own, staged = tiles
    return (groups * own + staged) * -(-width // 64) * 8192 + 256


def _groups(width: int) -> dict[str, int]:
    """Warp groups that compute, by kernel."""
    return {
        "hopper_window_forward": 3 if width < 128 else 2,
        "hopper_window_grad_query": 3 if width < 96 else 2,
        "hopper_window_grad_key": 3 if width < 96 else 2,
    }


def _shared(width: int) -> dict[str, int]:
    """Bytes of shared memory, as hopper_window.cu lays them out."""
    groups, narrow = _groups(width), width == 64
    return {
        "hopper_window_forward": _bytes(width, groups["hopper_window_forward"], 2, 2 * (6 if narrow else 4)),
        "hopper_window_grad_query": _bytes(width, groups["hopper_window_grad_query"], 4, 2 * (6 if narrow else 3)),
        "hopper_window_grad_key": _bytes(width, groups["hopper_window_grad_key"], 4, 2 * (5 if narrow else 3))
        + 512 * (5 if narrow else 3),
    }


def why_not_hopper_window(
    device: torch.device, dtype: torch.dtype, width: int, sink: int, has_documents: bool
) -> Limit | None:
    """Why these kernels cannot take heads of this width in this dtype on this device, or None.

    Compiles them where nothing else is against it.
    """
    if why := why_no_kernels(device):
        return why
    if dtype != torch.bfloat16 or width not in WINDOW_WIDTHS:
        return Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")
    if sink > WINDOW_SINKS:
        return Limit(f"takes no more than {WINDOW_SINKS} sinks")
    if torch.cuda.get_device_capability(device) != _CAPABILITY:
        return Limit("needs compute capability 9.0 (H100, H200)")
    if why := cuda.why_not_compiled():
        return why
    try:
        _cubin(width, has_documents)
    except CannotCompile as error:
        return Limit(str(error))
    return None


@cache
def _cubin(width: int, has_documents: bool) -> bytes:
    folder = Path(__file__).parent
    macros = {"WIDTH": width, "DOCUMENTS": int(has_documents)}
    return cuda.compiled(folder / "hopper_window.cu", (folder / "hopper_instructions.cuh",), macros)


@cache
def _module(device: int, width: int, has_documents: bool) -> ctypes.c_void_p:
    return cuda.load(_cubin(width, has_documents))


@cache
def _kernel(device: int, width: int, has_documents: bool, name: str) -> Kernel:
    """A kernel of hopper_window.cu; `device` is the current one."""
    return Kernel(_module(device, width, has_documents), name, _shared(width)[name])


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(name: str, query: Tensor, heads: int, has_documents: bool, *arguments: object) -> None:
    """Blocks take items, which are tiles of tokens of one of `heads`, in turn."""
    device, width = torch.cuda.current_device(), query.shape[3]
    groups = _groups(width)[name]
    items = query.shape[0] * heads * -(-query.shape[1] // (_TILE * groups))
    kernel = _kernel(device, width, has_documents, name)
    kernel(min(items, _multiprocessors(device)), 128 * (groups + 1), *arguments)


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `run_forward` of window.py, in bf16."""
    batch, length, heads, _ = query.shape
    query, key, value = tma_readable(query), tma_readable(key), tma_readable(value)
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    sizes = batch, heads, heads // key.shape[2], length, _clamped(window, length), sink
    maps = _maps(query, key, value)
    with torch.cuda.device_of(query):
        _launch(
            "hopper_window_forward",
            *(query, heads, starts is not None),
            *(*maps, *_maps(key, value, rows=_FAR), *_maps(out), lse, starts, *sizes, scale * _LOG2_E),
        )
    return out, lse


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    sink: int,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As `run_backward` of window.py, in bf16; rows of `gradients` begin at multiples of 16 bytes."""
    query, key, value, grad_out = tma_readable(query), tma_readable(key), tma_readable(value), tma_readable(grad_out)
    batch, length, heads, width = query.shape
    key_heads, tiles, window = key.shape[2], -(-length // _TILE), _clamped(window, length)
    members = heads // key_heads
    ends = None if starts is None else torch.empty_like(starts)
    lse2, delta = (lse.new_empty(batch, heads, _TILE * tiles) for _ in range(2))
    far = lse.new_empty(batch, heads, tiles, 2, sink, width)
    sums = lse.new_empty(batch, key_heads, tiles, 2, sink, width)
    query_map, grad_map, key_map, value_map, *out_maps = _maps(query, grad_out, key, value, out, *gradients)
    with torch.cuda.device_of(query):
        has_documents = starts is not None
        _launch(
            "hopper_window_grad_query",
            *(query, heads, has_documents),
            *(query_map, grad_map, out_maps[0], key_map, value_map, *_maps(key, value, rows=_FAR), out_maps[1]),
            *(lse, lse2, delta, far, starts, ends, batch, heads, members, length, window, sink, scale),
        )
        if sink:
            window_triton.window_sum_far[(tiles, key_heads, batch)](
                *(far, sums, starts, heads, length, tiles),
                **{"GROUP": members, "WINDOW": window, "SINK": sink, "DOCUMENTS": has_documents},
                **{"D": width, "BN": _TILE, "FAR_BM": _TILE, "STEP": _TILE},
            )
        _launch(
            "hopper_window_grad_key",
            *(query, key_heads, has_documents),
            *(query_map, grad_map, key_map, value_map, *out_maps[2:], lse2, delta, sums, starts, ends),
            *(batch, key_heads, members, length, window, sink, scale),
        )


def _clamped(window: int, length: int) -> int:
    """A window that does not overflow the kernels' integers, and sees as much."""
    return min(window, -(-length // _TILE) * _TILE)


def _maps(*tensors: Tensor, rows: int = _TILE) -> Sequence[TensorMap]:
    return [TensorMap(each, rows) for each in tensors]
