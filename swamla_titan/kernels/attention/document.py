"""Causal attention within documents as one operator of Triton kernels (CUDA): for MLA with a document mask.

torch.compile keeps the operator in its graph as it is. Output and gradients are deterministic.
"""

from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

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
from swamla_titan.kernels.flops import attention_flops, causal_pairs
from swamla_titan.kernels.limits import DOCUMENT_V_WIDTHS, DOCUMENT_WIDTHS

TIMED_WIDTHS = (192, 128)  # of queries and keys, and of values, at which it was timed (documents of 500 tokens)


def why_not_document_kernel(device: torch.device, dtype: torch.dtype, width: int, v_width: int) -> Limit | None:
    """Why `document_attention` cannot take heads of these widths in this dtype on this device, or None."""
    if why := why_no_kernels(device):
        return why
    fits = width in DOCUMENT_WIDTHS and v_width in DOCUMENT_V_WIDTHS and dtype in (torch.bfloat16, torch.float16)
    return None if fits else Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")


def document_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key^T) value over the keys of the query's document up to the query itself.

    query and key [B, T, H, D] with D one of DOCUMENT_WIDTHS, value [B, T, H, E] with E one of DOCUMENT_V_WIDTHS, in 16
    bits, elements adjacent in memory, heads at addresses that are multiples of 16 bytes -> [B, T, H, E], contiguous.
    starts and ends [B, T] int32, contiguous: the index of the first token of each token's document, and that after its
    last.
    """
    out: Tensor = _forward(query, key, value, starts, ends, scale)[0]
    return out


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, E] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    from swamla_titan.kernels.attention import document_triton as kernels

    batch, length, heads, width = query.shape
    # The kernels would read out of bounds otherwise.
    assert key.shape == query.shape
    assert value.shape[:3] == query.shape[:3]
    for bounds in (starts, ends):
        assert bounds.shape == (batch, length)
        assert bounds.is_contiguous()
        assert bounds.dtype == torch.int32
    key, value = tma_readable(key), tma_readable(value)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tiles, split, v_width = forward_tiles(), SplitWidth.of(width), value.shape[-1]
    with torch.cuda.device_of(query):  # Triton launches on the current one
        kernels.document_forward[(-(-length // tiles.queries), heads, batch)](
            *(
                *tma_descriptors(key, tiles.keys, split),
                *tma_descriptors(value, tiles.keys, (v_width,)),
                query,
                out,
                lse,
                starts,
            ),
            *(*strides(query), *strides(out), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **tiles.constants(),
        )
    return out, lse


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    from swamla_titan.kernels.attention import document_triton as kernels

    grad_out, query, key, value = (tma_readable(each) for each in (grad_out, query, key, value))
    batch, length, heads, width = query.shape
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    query_tiles, key_tiles = backward_tiles()
    split, v_width = SplitWidth.of(width), value.shape[-1]
    with torch.cuda.device_of(query):
        kernels.document_grad_query[(-(-length // query_tiles.queries), heads, batch)](
            *(*tma_descriptors(key, query_tiles.keys, split), *tma_descriptors(value, query_tiles.keys, (v_width,))),
            *(query, out, grad_out, grad_query, lse, delta, starts),
            *(*strides(query), *strides(out), *strides(grad_out), *strides(grad_query), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **query_tiles.constants(),
        )
        kernels.document_grad_key_value[(-(-length // key_tiles.keys), heads, batch)](
            *(
                *tma_descriptors(query, key_tiles.queries, split),
                *tma_descriptors(grad_out, key_tiles.queries, (v_width,)),
            ),
            *(key, value, grad_key, grad_value, lse, delta, starts, ends),
            *(*strides(key), *strides(value), *strides(grad_key), *strides(grad_value), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **key_tiles.constants(),
        )
    return grad_query, grad_key, grad_value


_forward = torch.library.custom_op("swamla_titan::document_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("swamla_titan::document_attention_backward", run_backward, mutates_args=())


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(value.shape), query.new_empty(batch, heads, length, dtype=torch.float32)


@_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # lse has none, and torch would materialize it as zeros
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # lse is for the backward pass only and is not returned to callers, so it has no gradient.
    if grad_out is None:
        return (None,) * 6
    gradients = torch.ops.swamla_titan.document_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.swamla_titan.document_attention)
def _forward_flops(query: Size, key: Size, value: Size, *rest: Any, **out: Any) -> int:
    return attention_flops(query, value[3], causal_pairs(query[1]))


@register_flop_formula(torch.ops.swamla_titan.document_attention_backward)
def _backward_flops(grad_out: Size, query: Size, key: Size, value: Size, *rest: Any, **out: Any) -> int:
    return 2 * attention_flops(query, value[3], causal_pairs(query[1]))


# The fastest on an H100 of those that benchmarks/attention_tiles.py tries, at head widths of 192 and 128.
_FORWARD = Tiles(128, 32, 8, 3)
_BACKWARD = Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 3)


def forward_tiles() -> Tiles:
    """The tiles of the forward pass."""
    return _FORWARD


def backward_tiles() -> tuple[Tiles, Tiles]:
    """The tiles of the backward kernels: that of queries, and that of keys and values."""
    return _BACKWARD
