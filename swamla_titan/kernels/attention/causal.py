"""Attention kernels, causal or without a mask, that also return the log-sum-exp of the scores: cuDNN's, and plain.

"cudnn" is the fastest kernel on an H100 for MLA's heads: queries and keys of width 192, values of 128. "plain" computes
the same in plain PyTorch, for any device and dtype.

They also compute causal attention of chunks of a sequence over all its keys. A chunk at [a, a + c) sees all keys before
it, and its own keys causally. Those are two calls of a fast kernel, whose results are merged exactly: with the
log-sum-exp of each call's scores, the softmax over both is

    out = out_own + w (out_past - out_own),   w = sigmoid(lse_past - lse_own),   lse = log(e^lse_own + e^lse_past)

Gradients need no merging: given the merged out and lse, the backward pass of attention is a sum over keys, to which
each call adds its own keys. All of it is one custom operator, which torch.compile keeps in its graph as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention.masks import attention_flops, chunk_pairs
from swamla_titan.kernels.device import Limit
from swamla_titan.kernels.operator import differentiate

# cuDNN's deterministic backward takes a workspace that outgrows the GPU's memory from about here on.
CUDNN_DETERMINISTIC_MAX_LEN = 16384


class Kernel(NamedTuple):
    """Forward and backward pass of attention, causal or over all keys; all tensors are [B, H, length, width].

    forward(query, key, value, scale, causal) -> out [B, H, Q, E] and lse [B, H, Q], the logarithm of the sum of
    exp(scale query key^T) over the visible keys, in float32 (float64 for float64); `causal` needs as many keys
    as queries.
    backward(grad_out, query, key, value, out, lse, scale, causal) -> gradients of query, key and value; `out` and `lse`
    may come from more keys than `key` holds.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool],
        tuple[Tensor, Tensor, Tensor],
    ]


def why_not_cudnn(queries: int, keys: int, is_masked: bool = False) -> str | None:
    """Why cuDNN's attention cannot take these lengths, or None; torch itself checks widths and dtypes.

    These are cases that torch does not rule out: cuDNN would end the run with an error instead of torch falling back to
    the next backend.
    """
    if is_masked:
        return "a mask"  # cuDNN fails for some shapes ("no execution plans support the graph")
    if min(queries, keys) < 2:
        return "a sequence of one token"
    if queries >= CUDNN_DETERMINISTIC_MAX_LEN and torch.are_deterministic_algorithms_enabled():
        return f"deterministic algorithms at {CUDNN_DETERMINISTIC_MAX_LEN} tokens or more"
    return None


def why_not_cudnn_heads(
    device: torch.device, dtype: torch.dtype, seq_len: int, chunk: int, qk_width: int, v_width: int
) -> Limit | None:
    """Why cuDNN's attention cannot take chunks and heads of these sizes, forward and backward, or None.

    Depends on torch's current settings, which may switch cuDNN off or ask for deterministic algorithms.
    """
    if device.type != "cuda":
        return Limit("needs a GPU")
    if why := why_not_cudnn(seq_len, chunk):
        return Limit(why)

    def heads(width: int) -> Tensor:
        return torch.empty(1, 1, chunk, width, dtype=dtype, device=device, requires_grad=True)

    params = torch.backends.cuda.SDPAParams(heads(qk_width), heads(qk_width), heads(v_width), None, 0.0, False, False)
    return None if torch.backends.cuda.can_use_cudnn_attention(params) else Limit("not by cuDNN")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = query @ key.transpose(-2, -1) * scale
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    wide = _wide(query.dtype)
    scores = _scores(query.to(wide), key.to(wide), scale, causal)
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ value.to(wide)).to(value.dtype), lse


def _plain_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = query.dtype, _wide(query.dtype)
    grad_out, query, key, value, out = (x.to(wide) for x in (grad_out, query, key, value, out))
    weights = (_scores(query, key, scale, causal) - lse[..., None]).exp()
    delta = (grad_out * out).sum(dim=-1, keepdim=True)  # the sum over all keys of weight * its gradient
    grad_scores = weights * (grad_out @ value.transpose(-2, -1) - delta) * scale
    gradients = grad_scores @ key, grad_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad_out
    grad_query, grad_key, grad_value = (x.to(dtype) for x in gradients)
    return grad_query, grad_key, grad_value


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    results: Any = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return results[0], results[1].view(query.shape[:3])  # its lse is [B, H, Q, 1]


def _cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # the random state of dropout, which is off
    results: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    return results[0], results[1], results[2]


KERNELS = {"cudnn": Kernel(_cudnn_forward, _cudnn_backward), "plain": Kernel(_plain_forward, _plain_backward)}


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
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float, by: str
) -> tuple[Tensor, Tensor]:
    """out [B, Q, H, E] and lse [B, H, Q]."""
    forward = KERNELS[by].forward
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
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
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
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backward, grad_out = KERNELS[by].backward, grad_out.contiguous()
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


def _flops(query: Size, value: Size, starts: list[int], **_: Any) -> int:
    return attention_flops(query, value[3], chunk_pairs(query[1], starts))


differentiate(_chunked, _chunked_backward, ("out", "lse"), _flops)
