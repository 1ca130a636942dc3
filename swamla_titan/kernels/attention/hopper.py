"""Causal attention, also within documents, by CUDA C++ kernels for Hopper (H100, H200): for MLA.

Some warps copy by the tensor memory accelerator while others multiply by asynchronous warp group instructions; Triton
3.6 splits no kernel so on Hopper. hopper.cu says what each of the four kernels does. Output and gradients are
deterministic: the gradients of the scores go through memory, in 16 bits, instead of adding up those of the queries by
atomics. Some heads at a time bound that workspace.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from swamla_titan.kernels import cuda
from swamla_titan.kernels.attention.masks import attention_flops, causal_pairs
from swamla_titan.kernels.cuda import CannotCompile, Kernel, TensorMap
from swamla_titan.kernels.device import Limit, dtype_name, tma_readable, why_no_kernels
from swamla_titan.kernels.operator import differentiate

TIMED_WIDTHS = (192, 128)  # of queries and keys, and of values, at which it was timed
QK_WIDTHS, V_WIDTH = (128, 192), 128
WORKSPACE_BYTES = 5 * 2**28  # 16 sequences of 2,048 tokens, 16 heads, at once; at 256 MiB it is 15% slower there
_CACHED_BYTES = 22 * 10**6  # of keys and values, in the L2 cache
LAST = 64  # columns of queries and keys that may lie elsewhere
_CAPABILITY = (9, 0)
_LOG2_E = 1.4426950408889634

_THREADS, _ROW_THREADS = 384, 256
# Bytes of shared memory, as hopper.cu lays them out, by the width of queries and keys.
_OUT = 8 * 2048 + 256  # results of 8 warps, and barriers


def _shared(width: int) -> dict[str, int]:
    both = width + V_WIDTH
    return {
        "hopper_forward": 256 * (width + 2 * both) + _OUT,
        "hopper_row_sums": 0,
        "hopper_backward_keys": 256 * both + 2 * (128 * both + 512) + _OUT,
        "hopper_backward_queries": 3 * (4 * 8192 + 128 * width) + _OUT,
    }


def longest_sequence() -> int:
    """Tokens of the longest sequence that a head's workspace of the backward pass has room for."""
    tiles = 1
    while _heads_at_once(1, tiles + 1)[1] <= WORKSPACE_BYTES:
        tiles += 1
    return 64 * tiles


def why_not_hopper_kernel(
    device: torch.device, dtype: torch.dtype, width: int, v_width: int, has_documents: bool
) -> Limit | None:
    """Why `hopper_attention` cannot take heads of these widths in this dtype on this device, or None.

    Compiles the kernel where nothing else is against it.
    """
    if why := why_no_kernels(device):
        return why
    if dtype != torch.bfloat16 or width not in QK_WIDTHS or v_width != V_WIDTH:
        return Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")
    if torch.cuda.get_device_capability(device) != _CAPABILITY:
        return Limit("needs compute capability 9.0 (H100, H200)")
    if why := cuda.why_not_compiled():
        return why
    return _why_not_compiled(width, has_documents)


@cache
def _why_not_compiled(width: int, has_documents: bool) -> Limit | None:
    try:
        _cubin(width, has_documents)
    except CannotCompile as error:
        return Limit(str(error))
    return None


@cache
def _cubin(width: int, has_documents: bool) -> bytes:
    folder = Path(__file__).parent
    macros = {"QK_WIDTH": width, "DOCUMENTS": int(has_documents)}
    return cuda.compiled(folder / "hopper.cu", (folder / "hopper_instructions.cuh",), macros)


@cache
def _module(device: int, width: int, has_documents: bool) -> ctypes.c_void_p:
    return cuda.load(_cubin(width, has_documents))


@cache
def _kernel(device: int, width: int, has_documents: bool, name: str) -> Kernel:
    """A kernel of hopper.cu; `device` is the current one."""
    return Kernel(_module(device, width, has_documents), name, _shared(width)[name])


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def hopper_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """softmax(scale * query key^T) value over the keys up to the query itself, of its document if there are `starts`.

    query and key [B, T, H, D] with D one of QK_WIDTHS, value [B, T, H, 128], in bf16 -> [B, T, H, 128], contiguous.
    starts and ends [B, T] int32, contiguous, both or none: the index of the first token of each token's document, and
    that after its last.
    """
    out: Tensor = _forward(query, key, value, starts, ends, scale)[0]
    return out


class Parts(NamedTuple):
    """Queries or keys in two parts: all columns but 64 are the first of `first` [B, T, H, ...].

    `last` [B, T, H or 1, 64] are the others, of all heads if there is one.
    """

    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Parts":
        """Those of x [B, T, H, D]."""
        x = tma_readable(x)
        return cls(x, x[..., -LAST:])

    def maps(self, rows: int) -> tuple[TensorMap, TensorMap]:
        """For tiles of so many tokens."""
        return TensorMap(self.first, rows), TensorMap(self.last, rows)


class Gradients(NamedTuple):
    """Where the gradients go: query [B, T, H, D], contiguous; of keys their parts, and of values, [B, T, H, ...].

    The last three may be views, whose heads lie one after the other.
    """

    query: Tensor
    key: Parts
    value: Tensor


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, ends: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, 128] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    return launch_forward(Parts.of(query), Parts.of(key), tma_readable(value), starts, ends, scale, query.shape[3])


def launch_forward(
    query: Parts, key: Parts, value: Tensor, starts: Tensor | None, ends: Tensor | None, scale: float, width: int
) -> tuple[Tensor, Tensor]:
    """run_forward of queries and keys in parts, which together are `width` wide."""
    _validate(query, key, value, starts, ends, width)
    batch, length, heads, _ = value.shape
    out = value.new_empty(batch, length, heads, V_WIDTH)
    lse = value.new_empty(batch, heads, length, dtype=torch.float32)
    next_tile = torch.zeros(1, dtype=torch.int32, device=value.device)
    with torch.cuda.device_of(value):
        device = torch.cuda.current_device()
        tiles = batch * heads * -(-length // 128)
        _kernel(device, width, starts is not None, "hopper_forward")(
            min(tiles, _multiprocessors(device)),
            _THREADS,
            *(*query.maps(128), *key.maps(128), TensorMap(value, 128), out, lse, starts, next_tile, _own_last(key)),
            *(batch, heads, length, scale * _LOG2_E, _heads_in_cache(batch * heads, length, width)),
        )
    return out, lse


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    heads = Parts.of(query), Parts.of(key), tma_readable(value)
    to = Gradients(grad_query, Parts.of(grad_key), grad_value)
    launch_backward(grad_out, *heads, starts, ends, out, lse, scale, to)
    return grad_query, grad_key, grad_value


def launch_backward(
    grad_out: Tensor,
    query: Parts,
    key: Parts,
    value: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    to: Gradients,
) -> None:
    """run_backward of queries and keys in parts."""
    batch, length, heads, width = to.query.shape
    _validate(query, key, value, starts, ends, width)
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    tiles = -(-length // 64)
    lse2, delta = (lse.new_empty(batch, heads, 64 * tiles) for _ in range(2))
    at_once, a_head = _heads_at_once(batch * heads, tiles)
    workspace = torch.empty(at_once * a_head, dtype=torch.uint8, device=value.device)
    written = to.key.first, to.key.last, to.value
    with torch.cuda.device_of(value):
        kernels = [
            _kernel(torch.cuda.current_device(), width, starts is not None, name)
            for name in ("hopper_row_sums", "hopper_backward_keys", "hopper_backward_queries")
        ]
        kernels[0](
            -(-batch * heads * 64 * tiles // (_ROW_THREADS // 16)),
            _ROW_THREADS,
            *(out, grad_out, lse, lse2, delta, batch, heads, length, 64 * tiles),
        )
        maps = *query.maps(64), TensorMap(grad_out, 64), *key.maps(128), TensorMap(value, 128)
        key_maps = key.maps(64)
        for first in range(0, batch * heads, at_once):
            here = min(at_once, batch * heads - first)
            about = _own_last(key), first, here, 1, heads, length  # heads one after the other
            kernels[1](
                -(-length // 128) * here,
                _THREADS,
                *(*maps, lse2, delta, ends, *written, *(each.stride(2) for each in written), workspace),
                *(*about, 64 * tiles, scale, scale * _LOG2_E),
            )
            kernels[2](-(-length // 256) * here, _THREADS, *key_maps, starts, workspace, to.query, *about, scale)


def _own_last(key: Parts) -> int:
    """Whether each head has a last part of its own: 1, or 0."""
    return int(key.last.shape[2] == key.first.shape[2])


def _heads_in_cache(heads: int, length: int, width: int) -> int:
    """Heads whose queries are taken in turn, because the L2 cache keeps the keys and values of so many."""
    return max(1, min(heads, _CACHED_BYTES // (length * 2 * (width + V_WIDTH))))


def _heads_at_once(heads: int, tiles: int) -> tuple[int, int]:
    """Heads of all sequences in one launch, and bytes of each one's workspace."""
    a_head = tiles * (tiles + 1) // 2 * 64 * 64 * 2
    launches = -(-heads // max(1, WORKSPACE_BYTES // a_head))
    return -(-heads // launches), a_head


def _validate(query: Parts, key: Parts, value: Tensor, starts: Tensor | None, ends: Tensor | None, width: int) -> None:
    """What the kernels would read out of bounds otherwise."""
    batch, length, heads, v_width = value.shape
    assert v_width == V_WIDTH
    for x in (*query, *key, value):
        assert x.dtype == torch.bfloat16
    for parts, others in ((query, (heads,)), (key, (1, heads))):
        assert parts.first.shape[:3] == (batch, length, heads)
        assert parts.first.shape[3] >= width - LAST
        assert parts.last.shape in [(batch, length, each, LAST) for each in others]
    assert (starts is None) == (ends is None)
    for bounds in (starts, ends):
        if bounds is not None:
            assert bounds.shape == (batch, length)
            assert bounds.is_contiguous()
            assert bounds.dtype == torch.int32


_forward = torch.library.custom_op("swamla_titan::hopper_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("swamla_titan::hopper_attention_backward", run_backward, mutates_args=())


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(value.shape), query.new_empty(batch, heads, length, dtype=torch.float32)


def _flops(query: Size, value: Size, **_: Any) -> int:
    return attention_flops(query, value[3], causal_pairs(query[1]))


differentiate(_forward, _backward, ("out", "lse"), _flops)
