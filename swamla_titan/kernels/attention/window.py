"""Sliding-window attention with sinks and documents as one operator, by the Triton kernels beside it (CUDA).

torch.compile takes it into a graph as it is. Value and gradients are the same in every run.
"""

from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from swamla_titan.kernels.device import Parts, Tiles, descriptors, named, readable, strides, why_no_kernels
from swamla_titan.kernels.flops import attention_flops, window_pairs
from swamla_titan.kernels.limits import WINDOW_SINKS, WINDOW_WIDTHS


def why_not_window_kernel(device: torch.device, dtype: torch.dtype, width: int, sink: int) -> str | None:
    """What keeps `window_attention` from heads of this width in this dtype on this device, or None."""
    if why := why_no_kernels(device):
        return why
    if width in WINDOW_WIDTHS and dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None if sink <= WINDOW_SINKS else f"takes no more than {WINDOW_SINKS} sinks"
    return f"takes no heads as wide as these in {named(dtype)}"


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> Tensor:
    """softmax(scale * query key^T) value over the keys that kernels/attention/masks.py's rule `sees` names.

    query [B, T, H, D], key and value [B, T, G, D] with H a multiple of G, D one of WINDOW_WIDTHS and its elements
    adjacent in memory, heads at addresses that are multiples of 16 bytes -> [B, T, H, D], contiguous, in query's dtype;
    matmuls of float32 are exact, never TF32. At most WINDOW_SINKS sinks.
    `starts` [B, T] int32, contiguous: the index at which each token's document begins; None: one document a sequence.
    """
    out: Tensor = _forward(query, key, value, starts, window, sink, scale)[0]
    return out


@torch.library.custom_op("swamla_titan::window_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    with torch.cuda.device_of(query):  # Triton launches on the current one
        return run_forward(query, key, value, starts, window, sink, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    with torch.cuda.device_of(query):
        run_backward(grad_out, query, key, value, starts, out, lse, window, sink, scale, gradients)
    return gradients


@_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # that of lse would be a tensor of zeros
    query, key, value, starts, ctx.window, ctx.sink, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, starts, *output)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # The lse is for the backward alone and leaves this file nowhere, so its gradient is none or zeros.
    if grad_out is None:
        return (None,) * 7
    query, key, value, starts, out, lse = ctx.saved_tensors
    gradients = torch.ops.swamla_titan.window_attention_backward(
        grad_out, query, key, value, starts, out, lse, ctx.window, ctx.sink, ctx.scale
    )
    return (*gradients, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.swamla_titan.window_attention)
def _forward_flops(query: Size, *rest: Any, **out: Any) -> int:
    *_, window, sink, _scale = rest
    return attention_flops(query, query[3], window_pairs(query[1], window, sink))


@register_flop_formula(torch.ops.swamla_titan.window_attention_backward)
def _backward_flops(grad_out: Size, query: Size, *rest: Any, **out: Any) -> int:
    *_, window, sink, _scale = rest
    return 2 * attention_flops(query, query[3], window_pairs(query[1], window, sink))


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, window: int, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`_forward` for those who make an operator of more than that."""
    from swamla_titan.kernels.attention import window_triton as kernels

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
    tiles, cut = forward_tiles(query.dtype, width), _cut(width, query.dtype)
    rule = _rule(query, key, starts, window, sink)
    kernels.window_forward[(-(-length // tiles.queries), heads, batch)](
        *(*descriptors(key, tiles.keys, cut), *descriptors(value, tiles.keys, cut)),
        *(query, key, value, out, lse, starts),
        *(*strides(query), *strides(key), *strides(value), *strides(out)),
        *(heads, length, scale),
        **rule,
        **cut._asdict(),
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
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value into tensors of their shapes, whatever their strides."""
    from swamla_titan.kernels.attention import window_triton as kernels

    grad_out = readable(grad_out)
    batch, length, heads, width = query.shape
    grad_query, grad_key, grad_value = gradients
    delta = torch.empty_like(lse)
    tiles, tiles_of_keys = backward_tiles(query.dtype, width)
    cut = _cut(width, query.dtype)
    rule = _rule(query, key, starts, window, sink)
    rows = -(-length // tiles.queries)
    step = max(tiles.keys, tiles_of_keys.keys)
    far_tiles = {"FAR_BM": tiles.queries, "STEP": step}
    far = query.new_empty(batch, heads, rows, 2, sink, width, dtype=torch.float32)
    kernels.window_grad_query[(rows, heads, batch)](
        *(*descriptors(key, tiles.keys, cut), *descriptors(value, tiles.keys, cut)),
        *(query, key, value, out, grad_out, grad_query, lse, delta, far, starts),
        *(*strides(query), *strides(key), *strides(value)),
        *(*strides(out), *strides(grad_out), *strides(grad_query)),
        *(heads, length, scale),
        **rule,
        **cut._asdict(),
        **tiles.constants(),
        STEP=step,
    )
    key_grid = -(-length // tiles_of_keys.keys), key.shape[2], batch
    sums = query.new_empty(batch, key.shape[2], key_grid[0], 2, sink, width, dtype=torch.float32)
    if sink:
        kernels.window_sum_far[key_grid](
            *(far, sums, starts, heads, length, rows),
            **rule,
            **far_tiles,
            D=width,
            BN=tiles_of_keys.keys,
        )
    kernels.window_grad_key_value[key_grid](
        *(*descriptors(query, tiles_of_keys.queries, cut), *descriptors(grad_out, tiles_of_keys.queries, cut)),
        *(key, value, grad_key, grad_value, lse, delta, sums, starts),
        *(*strides(key), *strides(value), *strides(grad_key), *strides(grad_value)),
        *(heads, length, scale),
        **rule,
        **cut._asdict(),
        **tiles_of_keys.constants(),
        **far_tiles,
    )


# The fastest on an H100 of those that benchmarks/attention_tiles.py tries, for heads of each width in 16 bits. Small
# programs win: each waits for memory most of the time, and up to four share a processor if they leave it registers.
_FORWARD = {64: Tiles(64, 64, 4, 2, 128), 96: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 3)}
_BACKWARD = {
    64: (Tiles(64, 32, 4, 3, 128), Tiles(32, 64, 4, 2, 168)),
    96: (Tiles(64, 32, 4, 2, 128), Tiles(64, 64, 4, 2)),
    128: (Tiles(64, 64, 4, 2, 168), Tiles(32, 64, 4, 2)),
}


def forward_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For the forward pass."""
    return Tiles(64, 32, 8, 1) if dtype == torch.float32 else _FORWARD[width]


def backward_tiles(dtype: torch.dtype, width: int) -> tuple[Tiles, Tiles]:
    """For the queries' pass of the backward, and for that of the keys and values."""
    return (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)) if dtype == torch.float32 else _BACKWARD[width]


def _rule(query: Tensor, key: Tensor, starts: Tensor | None, window: int, sink: int) -> dict[str, Any]:
    return {
        "GROUP": query.shape[2] // key.shape[2],
        "WINDOW": min(window, query.shape[1]),
        "SINK": sink,
        "DOCUMENTS": starts is not None,
    }


def _cut(width: int, dtype: torch.dtype) -> Parts:
    """In float32 one part of 128 would not fit into the registers; two of 64 do."""
    return Parts(64, 64) if dtype == torch.float32 and width == 128 else Parts.of(width)
