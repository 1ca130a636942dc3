"""Causal attention of chunks of a sequence over all its keys, by kernels that are causal or have no mask.

A chunk at [a, a + c) sees all keys before it, and its own keys causally. Those are two calls of a fast kernel, whose
results are merged exactly: with the log-sum-exp of each call's scores, the softmax over both is

    out = out_own + w (out_past - out_own),   w = sigmoid(lse_past - lse_own),   lse = log(e^lse_own + e^lse_past)

Gradients need no merging: given the merged out and lse, the backward pass of attention is a sum over keys, to which
each call adds its own keys. All of it is one custom operator, which torch.compile keeps in its graph as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from swamla_titan.kernels.attention.causal import KERNELS
from swamla_titan.kernels.flops import attention_flops, causal_pairs


def chunked_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float, kernel: str
) -> Tensor:
    """softmax(scale * query key^T, causal) value for queries that are chunks of the sequence.

    query [B, Q, H, D] holds len(starts) chunks of equal length; chunk j's tokens are at starts[j], starts[j] + 1, ...
    of the sequence; key [B, T, H, D] and value [B, T, H, E] hold all of it -> [B, Q, H, E]. `kernel` is a name in
    KERNELS.
    """
    out: Tensor = _chunked(query, key, value, list(starts), scale, kernel)[0]
    return out


def _heads_first(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens [start, end) of x [B, T, H, D] as [B, H, end - start, D]."""
    return x[:, start:end].transpose(1, 2)


@torch.library.custom_op("swamla_titan::chunked_causal_attention", mutates_args=())
def _chunked(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """out [B, Q, H, E] and lse [B, H, Q]."""
    forward = KERNELS[kernel].forward
    length = query.shape[1] // len(starts)
    outs, lses = [], []
    for j, start in enumerate(starts):
        chunk = _heads_first(query, j * length, (j + 1) * length)

        def over(first: int, end: int, causal: bool, chunk: Tensor = chunk) -> tuple[Tensor, Tensor]:
            return forward(chunk, _heads_first(key, first, end), _heads_first(value, first, end), scale, causal)

        # Causal over the chunk's own keys, then merged with the keys before, all of which it sees.
        out, lse = over(start, start + length, True)
        if start > 0:
            past_out, past_lse = over(0, start, False)
            weight = (past_lse - lse).sigmoid()[..., None]
            out = torch.lerp(out.to(lse.dtype), past_out.to(lse.dtype), weight).to(query.dtype)
            lse = torch.logaddexp(lse, past_lse)
        outs.append(out.transpose(1, 2))
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


@_chunked.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("swamla_titan::chunked_causal_attention_backward", mutates_args=())
def _chunked_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: list[int],
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = KERNELS[kernel].backward
    length = query.shape[1] // len(starts)
    grad_queries = []
    grad_key, grad_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    for j, start in enumerate(starts):
        own = j * length, (j + 1) * length
        upstream, chunk, chunk_out = (_heads_first(x, *own) for x in (grad_out, query, out))
        chunk_lse = lse[:, :, own[0] : own[1]]
        grad_chunk = None
        # The chunk's own keys, and those before it: with the merged out and lse each call's gradients are summands.
        for first, end, causal in ((start, start + length, True), (0, start, False)):
            if first == end:
                continue
            keys, values = _heads_first(key, first, end), _heads_first(value, first, end)
            gradients = backward(upstream, chunk, keys, values, chunk_out, chunk_lse, scale, causal)
            grad_chunk = gradients[0] if grad_chunk is None else grad_chunk + gradients[0]
            grad_key[:, first:end] += gradients[1].transpose(1, 2)
            grad_value[:, first:end] += gradients[2].transpose(1, 2)
        assert grad_chunk is not None
        grad_queries.append(grad_chunk.transpose(1, 2))
    return torch.cat(grad_queries, dim=1), grad_key, grad_value


@_chunked_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: list[int],
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.starts, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(query, key, value, *output)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # lse is for the backward pass only and is not returned to callers, so its gradient is none or zeros.
    gradients = torch.ops.swamla_titan.chunked_causal_attention_backward(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.starts, ctx.scale, ctx.kernel
    )
    return (*gradients, None, None, None)


_chunked.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.swamla_titan.chunked_causal_attention)
def _forward_flops(query: Size, key: Size, value: Size, starts: list[int], *rest: Any, **out: Any) -> int:
    return attention_flops(query, value[3], _pairs(query[1], starts))


@register_flop_formula(torch.ops.swamla_titan.chunked_causal_attention_backward)
def _backward_flops(grad_out: Size, query: Size, *rest: Any, **out: Any) -> int:
    *_, starts, _scale, _kernel = rest
    return 2 * attention_flops(query, grad_out[3], _pairs(query[1], starts))


def _pairs(queries: int, starts: Sequence[int]) -> int:
    length = queries // len(starts)
    return sum(start * length + causal_pairs(length) for start in starts)
