"""Sliding-window attention with sinks and documents as one operator, by Triton kernels or Hopper's (CUDA).

torch.compile keeps the operator in its graph as it is. Output and gradients are deterministic.
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention import hopper_window
from swamla_titan.kernels.attention import window_triton as kernels
from swamla_titan.kernels.attention.masks import attention_flops, window_pairs
from swamla_titan.kernels.device import (
    Limit,
    SplitWidth,
    Tiles,
    dtype_name,
    strides,
    tma_descriptors,
    tma_readable,
    why_no_kernels,
)
from swamla_titan.kernels.limits import WINDOW_SINKS, WINDOW_WIDTHS
from swamla_titan.kernels.operator import differentiate


def why_not_window_kernel(device: torch.device, dtype: torch.dtype, width: int, sink: int) -> Limit | None:
    """Why `window_attention` cannot take heads of this width in this dtype on this device, or None."""
    if why := why_no_kernels(device):
        return why
    if width in WINDOW_WIDTHS and dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None if sink <= WINDOW_SINKS else Limit(f"takes no more than {WINDOW_SINKS} sinks")
    return Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    window: int,
    sink: int,
    scale: float,
    kernel: str = "triton",
) -> Tensor:
    """softmax(scale * query key^T) value over the keys that are visible by `sees` of kernels/attention/masks.py.

    query [B, T, H, D], key and value [B, T, G, D] with H a multiple of G, D one of WINDOW_WIDTHS and its elements
    adjacent in memory, heads at addresses that are multiples of 16 bytes -> [B, T, H, D], contiguous, in query's dtype;
    matmuls of float32 are exact, never TF32. At most WINDOW_SINKS sinks.
    `starts` [B, T] int32, contiguous: the index at which each token's document begins; None: one document per sequence.
    `kernel`: "triton", or "cuda", which is hopper_window.py.
    """
    out: Tensor = _forward(query, key, value, starts, window, sink, scale, kernel)[0]
    return out


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    window: int,
    sink: int,
    scale: float,
    by: str = "triton",
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    batch, length, heads, width = query.shape
    # The kernels would read out of bounds otherwise.
    assert key.shape == value.shape == (batch, length, key.shape[2], width)
    assert heads % key.shape[2] == 0
    assert width in WINDOW_WIDTHS
    assert window >= 1
    assert starts is None or (starts.shape == (batch, length) and starts.is_contiguous())
    assert starts is None or starts.dtype == torch.int32
    if by == "cuda":
        return hopper_window.run_forward(query, key, value, starts, window, sink, scale)
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tiles, split = forward_tiles(query.dtype, width), _split(width, query.dtype)
    rule = _rule(query, key, starts, window, sink)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        kernels.window_forward[(-(-length // tiles.queries), heads, batch)](
            *(*tma_descriptors(key, tiles.keys, split), *tma_descriptors(value, tiles.keys, split)),
            *(query, key, value, out, lse, starts),
            *(*strides(query, key, value, out), heads, length, scale),
            **rule,
            **split._asdict(),
            **tiles.constants(),
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
    by: str,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of query, key and value into `gradients`, tensors of their shapes.

    Their strides are multiples of 16 bytes but for the last.
    """
    if by == "cuda":
        return hopper_window.run_backward(grad_out, query, key, value, starts, out, lse, window, sink, scale, gradients)
    grad_out = tma_readable(grad_out)
    batch, length, heads, width = query.shape
    grad_query, grad_key, grad_value = gradients
    delta = torch.empty_like(lse)
    tiles, key_tiles = backward_tiles(query.dtype, width)
    split = _split(width, query.dtype)
    rule = _rule(query, key, starts, window, sink)
    query_tiles = -(-length // tiles.queries)
    step = max(tiles.keys, key_tiles.keys)
    far_tiles = {"FAR_BM": tiles.queries, "STEP": step}
    far = query.new_empty(batch, heads, query_tiles, 2, sink, width, dtype=torch.float32)
    key_grid = -(-length // key_tiles.keys), key.shape[2], batch
    sums = query.new_empty(batch, key.shape[2], key_grid[0], 2, sink, width, dtype=torch.float32)
    with torch.cuda.device_of(query):
        kernels.window_grad_query[(query_tiles, heads, batch)](
            *(*tma_descriptors(key, tiles.keys, split), *tma_descriptors(value, tiles.keys, split)),
            *(query, key, value, out, grad_out, grad_query, lse, delta, far, starts),
            *(*strides(query, key, value, out, grad_out, grad_query), heads, length, scale),
            **rule,
            **split._asdict(),
            **tiles.constants(),
            STEP=step,
        )
        if sink:
            kernels.window_sum_far[key_grid](
                *(far, sums, starts, heads, length, query_tiles),
                **rule,
                **far_tiles,
                D=width,
                BN=key_tiles.keys,
            )
        kernels.window_grad_key_value[key_grid](
            *(*tma_descriptors(query, key_tiles.queries, split), *tma_descriptors(grad_out, key_tiles.queries, split)),
            *(key, value, grad_key, grad_value, lse, delta, sums, starts),
            *(*strides(key, value, grad_key, grad_value), heads, length, scale),
            **rule,
            **split._asdict(),
            **key_tiles.constants(),
            **far_tiles,
        )


_forward = torch.library.custom_op("swamla_titan::window_attention", run_forward, mutates_args=())


@_forward.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("swamla_titan::window_attention_backward", mutates_args=())
def _backward(
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
    by: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    run_backward(grad_out, query, key, value, starts, out, lse, window, sink, scale, by, gradients)
    return gradients


def _flops(query: Size, window: int, sink: int, **_: Any) -> int:
    return attention_flops(query, query[3], window_pairs(query[1], window, sink))


differentiate(_forward, _backward, ("out", "lse"), _flops)


_STEP = 64  # of windows that reach across a sequence, so that few lengths of prompts compile a kernel of their own

# The fastest on an H100 of those that benchmarks/attention_tiles.py tries, by head width, in 16 bits. Small programs
# win: each waits for memory most of the time, and up to four share a multiprocessor if its registers suffice.
_FORWARD = {64: Tiles(64, 64, 4, 2, 128), 96: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 3)}
_BACKWARD = {
    64: (Tiles(64, 32, 4, 3, 128), Tiles(32, 64, 4, 2, 168)),
    96: (Tiles(64, 32, 4, 2, 128), Tiles(64, 64, 4, 2)),
    128: (Tiles(64, 64, 4, 2, 168), Tiles(32, 64, 4, 2)),
}


def forward_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """The tiles of the forward pass."""
    return Tiles(64, 32, 8, 1) if dtype == torch.float32 else _FORWARD[width]


def backward_tiles(dtype: torch.dtype, width: int) -> tuple[Tiles, Tiles]:
    """The tiles of the backward kernels: that of queries, and that of keys and values."""
    return (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)) if dtype == torch.float32 else _BACKWARD[width]


def _rule(query: Tensor, key: Tensor, starts: Tensor | None, window: int, sink: int) -> dict[str, Any]:
    """The constexpr arguments that say which keys a query sees."""
    return {
        "GROUP": query.shape[2] // key.shape[2],
        "WINDOW": min(window, -(-query.shape[1] // _STEP) * _STEP),
        "SINK": sink,
        "DOCUMENTS": starts is not None,
    }


def _split(width: int, dtype: torch.dtype) -> SplitWidth:
    """A head's width in two parts; in float32 a tile 128 wide would not fit into the registers, two of 64 do."""
    return SplitWidth(64, 64) if dtype == torch.float32 and width == 128 else SplitWidth.of(width)
