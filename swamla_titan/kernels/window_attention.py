"""Sliding-window attention with sinks and documents as one operator, by the Triton kernels beside it (CUDA).

torch.compile takes it into a graph as it is. Value and gradients are the same in every run.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.kernels.limits import WINDOW_SINKS, WINDOW_WIDTHS, WINDOW_WIDTHS_FLOAT32


class Tiles(NamedTuple):
    """Rows of queries and of keys that meet at a time, and what runs one such program."""

    queries: int
    keys: int
    warps: int
    stages: int


def window_kernel_takes(device: torch.device, dtype: torch.dtype, width: int, sink: int) -> bool:
    """Whether `window_attention` computes heads of this width in this dtype on this device."""
    widths = {torch.bfloat16: WINDOW_WIDTHS, torch.float16: WINDOW_WIDTHS, torch.float32: WINDOW_WIDTHS_FLOAT32}
    fits = width in widths.get(dtype, ()) and sink <= WINDOW_SINKS
    return device.type == "cuda" and fits and has_triton()


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> Tensor:
    """softmax(scale * query key^T) value over the keys that kernels/masks.py's rule `sees` names.

    query [B, T, H, D], key and value [B, T, G, D] with H a multiple of G, D one of WINDOW_WIDTHS and its elements
    adjacent in memory -> [B, T, H, D], contiguous, in query's dtype; products of float32 are exact, never TF32.
    `starts` [B, T] int32, contiguous: the index at which each token's document begins; None: one document a row.
    """
    out: Tensor = _forward(query, key, value, starts, window, sink, scale)[0]
    return out


@torch.library.custom_op("swamla_titan::window_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    from swamla_titan.kernels import window_triton as kernels

    batch, length, heads, width = query.shape
    # Else it would read what is not there.
    assert key.shape == value.shape == (batch, length, key.shape[2], width)
    assert heads % key.shape[2] == 0
    assert width in WINDOW_WIDTHS
    assert window >= 1
    assert starts is None or (starts.shape == (batch, length) and starts.is_contiguous())
    assert starts is None or starts.dtype == torch.int32
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tiles = forward_tiles(query.dtype, width)
    kernels.forward[(-(-length // tiles.queries), heads, batch)](
        *(query, key, value, out, lse, starts),
        *(*_strides(query), *_strides(key), *_strides(value), *_strides(out)),
        *(heads, length, scale),
        **_constants(query, key, starts, window, sink, tiles),
    )
    return out, lse


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    from swamla_titan.kernels import window_triton as kernels

    batch, length, heads, width = query.shape
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    tiles, tiles_of_keys = backward_tiles(query.dtype, width)
    rows = -(-length // tiles.queries)
    far = query.new_empty(batch, heads, rows, 2, sink, width, dtype=torch.float32)
    kernels.grad_query[(rows, heads, batch)](
        *(query, key, value, out, grad_out, grad_query, lse, delta, far, starts),
        *(*_strides(query), *_strides(key), *_strides(value)),
        *(*_strides(out), *_strides(grad_out), *_strides(grad_query)),
        *(heads, length, scale),
        **_constants(query, key, starts, window, sink, tiles),
    )
    kernels.grad_key_value[(-(-length // tiles.keys), key.shape[2], batch)](
        *(query, key, value, grad_out, grad_key, grad_value, lse, delta, far, starts),
        *(*_strides(query), *_strides(key), *_strides(value)),
        *(*_strides(grad_out), *_strides(grad_key), *_strides(grad_value)),
        *(heads, length, rows, scale),
        **_constants(query, key, starts, window, sink, tiles_of_keys),
    )
    return grad_query, grad_key, grad_value


@_backward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, ctx.window, ctx.sink, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, starts, *output)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # The lse is for the backward alone and leaves this file nowhere, so its gradient is none or zeros.
    query, key, value, starts, out, lse = ctx.saved_tensors
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    gradients = torch.ops.swamla_titan.window_attention_backward(
        grad_out, query, key, value, starts, out, lse, ctx.window, ctx.sink, ctx.scale
    )
    return (*gradients, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)


def forward_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For the forward pass."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 1)
    return Tiles(128, 64, 4 if width == 64 else 8, 3)


def backward_tiles(dtype: torch.dtype, width: int) -> tuple[Tiles, Tiles]:
    """For the queries' pass of the backward, and for that of the keys and values.

    Of the same rows, since what is near to a tile of queries follows from both numbers. Registers that sm_90 code
    spills decide the warps.
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2), Tiles(64, 64, 8 if width == 128 else 4, 2)


def _strides(x: Tensor) -> tuple[int, int, int]:
    assert x.stride(-1) == 1, "the elements of a head must be adjacent"
    return x.stride(0), x.stride(1), x.stride(2)


def _constants(
    query: Tensor, key: Tensor, starts: Tensor | None, window: int, sink: int, tiles: Tiles
) -> dict[str, Any]:
    from swamla_titan.kernels.window_triton import FAR

    width = query.shape[-1]
    assert tiles.queries % tiles.keys == 0
    return {
        "GROUP": query.shape[2] // key.shape[2],
        "WINDOW": min(window, query.shape[1]),
        "SINK": sink,
        "DOCUMENTS": starts is not None,
        "D1": 64 if width == 96 else width,
        "D2": 32 if width == 96 else 0,
        "BM": tiles.queries,
        "BN": tiles.keys,
        "NARROW": FAR,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
