"""MLA between its linear layers as one operator: rotary embedding, expansion of the rotary key, attention (CUDA).

Compiled by torch, the backward pass would copy the gradients of queries and of values, and sum the rotary key's in a
kernel of its own. Here the queries' gradients are rotated back in place, and one kernel reads the others once.
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention import document as document_attention
from swamla_titan.kernels.attention import rotary_triton as kernels
from swamla_titan.kernels.attention.causal import KERNELS
from swamla_titan.kernels.device import power_of_two
from swamla_titan.kernels.flops import attention_flops, causal_pairs
from swamla_titan.kernels.operator import differentiate

_HEADS_PER_TILE = 16


def latent_attention(
    query: Tensor,
    keys_values: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    kernel: str = "cudnn",
) -> Tensor:
    """softmax(scale * rotated query key^T, causal) value, within documents if `starts` and `ends` are given.

    query [B, T, H, nope + rope] and keys_values [B, T, H, nope + v], contiguous, both with the part without position
    first; rope_key [B, T, rope] -> [B, T, H, v] in query's dtype. A head's key is its own nope part and the rotated
    rope_key, which all heads share. cos and sin [1 or B, T, 1, rope/2] in float32 rotate element i with i + rope/2, as
    model/layers.py does. `kernel`, a name in KERNELS (causal.py), computes sequences of one document; with `starts` and
    `ends` document.py's kernels do. Sequences of one token, which cuDNN does not take, use "plain".
    """
    if query.shape[1] == 1:
        kernel = "plain"
    out: Tensor = _forward(query, keys_values, rope_key, cos, sin, scale, starts, ends, kernel)[0]
    return out


@torch.library.custom_op("swamla_titan::latent_attention", mutates_args=())
def _forward(
    query: Tensor,
    keys_values: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    starts: Tensor | None,
    ends: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse [B, H, T] in float32, rotated queries and keys [B, T, H, nope + rope]."""
    rotated, key = torch.empty_like(query), torch.empty_like(query)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        _make_heads(query, keys_values, rope_key, cos, sin, rotated, key)
    value = _values(rotated, keys_values, rope_key)
    if starts is not None and ends is not None:
        return *document_attention.run_forward(rotated, key, value, starts, ends, scale), rotated, key
    heads = [x.transpose(1, 2) for x in (rotated, key, value)]
    out, lse = KERNELS[kernel].forward(heads[0], heads[1], heads[2], scale, True)
    return out.transpose(1, 2).contiguous(), lse.contiguous(), rotated, key


@_forward.register_fake
def _(query: Tensor, keys_values: Tensor, rope_key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_empty(_values(query, keys_values, rope_key).shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    return out, lse, torch.empty_like(query), torch.empty_like(query)


@torch.library.custom_op("swamla_titan::latent_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    keys_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, rope_dim = grad_out.contiguous(), 2 * cos.shape[-1]
    value = keys_values[..., query.shape[-1] - rope_dim :]
    if starts is not None and ends is not None:
        gradients = document_attention.run_backward(grad_out, query, key, value, starts, ends, out, lse, scale)
    else:
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        gradients = KERNELS[kernel].backward(grad_out, query, key, value, out, lse, scale, True)
        gradients = gradients[0].transpose(1, 2), gradients[1].transpose(1, 2), gradients[2].transpose(1, 2)
    grad_query, grad_key, grad_value = (x.contiguous() for x in gradients)
    grad_keys_values = torch.empty_like(keys_values)
    grad_rope_key = cos.new_empty(*grad_query.shape[:2], rope_dim, dtype=grad_query.dtype)
    with torch.cuda.device_of(query):
        _gradients_of_heads(grad_query, grad_key, grad_value, cos, sin, grad_keys_values, grad_rope_key)
    return grad_query, grad_keys_values, grad_rope_key


@_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, keys_values: Tensor, cos: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rope_key = key.new_empty(*key.shape[:2], 2 * cos.shape[-1])
    return torch.empty_like(query), torch.empty_like(keys_values), grad_rope_key


def _flops(query: Size, keys_values: Size, cos: Size, **_: Any) -> int:
    value_dim = keys_values[3] - (query[3] - 2 * cos[3])
    return attention_flops(query, value_dim, causal_pairs(query[1]))


differentiate(_forward, _backward, ("out", "lse", "query", "key"), _flops)  # queries after their rotation


def _values(query: Tensor, keys_values: Tensor, rope_key: Tensor) -> Tensor:
    """The values [B, T, H, v] in keys_values, after each head's part of the key."""
    return keys_values[..., query.shape[-1] - rope_key.shape[-1] :]


def _make_heads(
    query: Tensor, keys_values: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor, rotated: Tensor, key: Tensor
) -> None:
    tokens, sizes = _sizes(query, keys_values, cos, sin)
    if rope_key.stride(-1) != 1 or rope_key.stride(0) != rope_key.shape[1] * rope_key.stride(1):
        rope_key = rope_key.contiguous()
    kernels.make_heads[(tokens,)](
        *(query, keys_values, rope_key, cos, sin, rotated, key, rope_key.stride(1), cos.shape[0] * cos.shape[1]),
        **sizes,
        num_warps=4,
    )


def _gradients_of_heads(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    grad_keys_values: Tensor,
    grad_rope_key: Tensor,
) -> None:
    tokens, sizes = _sizes(grad_query, grad_keys_values, cos, sin)
    kernels.gradients_of_heads[(tokens,)](
        *(grad_query, grad_key, grad_value, cos, sin, grad_keys_values, grad_rope_key, cos.shape[0] * cos.shape[1]),
        **sizes,
        PADDED_VALUE=power_of_two(sizes["VALUE"]),
        num_warps=4,
    )


def _sizes(query: Tensor, keys_values: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, dict[str, int]]:
    """The number of tokens, and the kernels' constexpr arguments."""
    batch, length, heads, width = query.shape
    assert query.is_contiguous()
    assert keys_values.is_contiguous()
    for angles in (cos, sin):  # the kernels would read out of bounds otherwise
        assert angles.is_contiguous()
        assert angles.dtype == torch.float32
        assert angles.shape[:3] in ((1, length, 1), (batch, length, 1))
    half = cos.shape[-1]
    nope = width - 2 * half
    sizes = {
        "HEADS": heads,
        "TILE": min(power_of_two(heads), _HEADS_PER_TILE),
        "NOPE": nope,
        "PADDED_NOPE": power_of_two(nope),
        "HALF": half,
        "PADDED_HALF": power_of_two(half),
        "VALUE": keys_values.shape[-1] - nope,
    }
    return batch * length, sizes
