"""Attention kernels, causal or without a mask, that also return the log-sum-exp of the scores: cuDNN's, and plain.

"cudnn" is the fastest kernel on an H100 for MLA's heads: queries and keys of width 192, values of 128. "plain" computes
the same in plain PyTorch, for any device and dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.kernels.device import Limit

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
