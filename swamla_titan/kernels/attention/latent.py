"""MLA between its linear layers as one operator: rotary embedding, expansion of the rotary key, attention (CUDA).

Compiled by torch, the backward pass would copy the gradients of queries and of values, and sum the rotary key's in a
kernel of its own. Here the queries' gradients are rotated back in place, and one kernel reads the others once.
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention import document as document_attention
from swamla_titan.kernels.attention.causal import KERNELS
from swamla_titan.kernels.attention.masks import attention_flops, causal_pairs
from swamla_titan.kernels.device import power_of_two
from swamla_titan.kernels.operator import differentiate
from swamla_titan.kernels.triton import jit, tl

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
    by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse [B, H, T] in float32, rotated queries and keys [B, T, H, nope + rope]."""
    rotated, key = torch.empty_like(query), torch.empty_like(query)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        _make_heads(query, keys_values, rope_key, cos, sin, rotated, key)
    value = _values(rotated, keys_values, rope_key)
    if starts is not None and ends is not None:
        return *document_attention.run_forward(rotated, key, value, starts, ends, scale), rotated, key
    heads = [x.transpose(1, 2) for x in (rotated, key, value)]
    out, lse = KERNELS[by].forward(heads[0], heads[1], heads[2], scale, True)
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
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, rope_dim = grad_out.contiguous(), 2 * cos.shape[-1]
    value = keys_values[..., query.shape[-1] - rope_dim :]
    if starts is not None and ends is not None:
        gradients = document_attention.run_backward(grad_out, query, key, value, starts, ends, out, lse, scale)
    else:
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        gradients = KERNELS[by].backward(grad_out, query, key, value, out, lse, scale, True)
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
    make_heads[(tokens,)](
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
    gradients_of_heads[(tokens,)](
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


@jit
def make_heads(
    query_ptr, keys_values_ptr, rope_key_ptr, cos_ptr, sin_ptr, to_query_ptr, to_key_ptr,
    rope_key_stride, angles, HEADS: tl.constexpr, TILE: tl.constexpr, NOPE: tl.constexpr, PADDED_NOPE: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Rotated queries and expanded keys of one token, [HEADS, NOPE + 2 HALF] each.

        query        TILE heads [ nope | rope ]   ->  to_query [ nope | rotated ]
        keys_values  TILE heads [ nope | value ]  ->  to_key   [ nope | rotated rope_key ]
        rope_key     [ rope ], one for all heads      (value is read by the attention kernel where it is)

    Tokens of rope_key are `rope_key_stride` apart. cos and sin [angles, HALF]: token t has row t % angles.
    """
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, PADDED_HALF)
    in_half = half < HALF
    cos = tl.load(cos_ptr + token % angles * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + token % angles * HALF + half, mask=in_half, other=0.0)
    rope_key_ptr += token * rope_key_stride + half
    shared_first = tl.load(rope_key_ptr, mask=in_half, other=0.0).to(tl.float32)
    shared_second = tl.load(rope_key_ptr + HALF, mask=in_half, other=0.0).to(tl.float32)
    kind = to_key_ptr.dtype.element_ty
    key_first = (shared_first * cos - shared_second * sin).to(kind)
    key_second = (shared_second * cos + shared_first * sin).to(kind)

    nope = tl.arange(0, PADDED_NOPE)[None, :]
    query_ptr += token * (HEADS * (NOPE + 2 * HALF))
    to_query_ptr += token * (HEADS * (NOPE + 2 * HALF))
    to_key_ptr += token * (HEADS * (NOPE + 2 * HALF))
    keys_values_ptr += token * (HEADS * (NOPE + VALUE))
    # Tiles of heads, because all heads of a token at once would not fit into the registers.
    for start in range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        in_nope = (head < HEADS) & (nope < NOPE)
        in_rope = (head < HEADS) & in_half[None, :]
        at = head * (NOPE + 2 * HALF) + nope
        tl.store(to_query_ptr + at, tl.load(query_ptr + at, mask=in_nope), mask=in_nope)
        key = tl.load(keys_values_ptr + head * (NOPE + VALUE) + nope, mask=in_nope)
        tl.store(to_key_ptr + at, key, mask=in_nope)

        rope = head * (NOPE + 2 * HALF) + NOPE + half[None, :]
        first = tl.load(query_ptr + rope, mask=in_rope, other=0.0).to(tl.float32)
        second = tl.load(query_ptr + rope + HALF, mask=in_rope, other=0.0).to(tl.float32)
        tl.store(to_query_ptr + rope, (first * cos - second * sin).to(kind), mask=in_rope)
        tl.store(to_query_ptr + rope + HALF, (second * cos + first * sin).to(kind), mask=in_rope)
        tl.store(to_key_ptr + rope, tl.broadcast_to(key_first[None, :], (TILE, PADDED_HALF)), mask=in_rope)
        tl.store(to_key_ptr + rope + HALF, tl.broadcast_to(key_second[None, :], (TILE, PADDED_HALF)), mask=in_rope)


@jit
def gradients_of_heads(
    grad_query_ptr, grad_key_ptr, grad_value_ptr, cos_ptr, sin_ptr, grad_keys_values_ptr, grad_rope_key_ptr,
    angles, HEADS: tl.constexpr, TILE: tl.constexpr, NOPE: tl.constexpr, PADDED_NOPE: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, VALUE: tl.constexpr, PADDED_VALUE: tl.constexpr,
):  # fmt: skip
    """The gradients of one token's projections, from those of queries, keys and values: the inverse of `make_heads`.

    grad_query  TILE heads [ nope | rope ]  ->  rope rotated back in place
    grad_key    TILE heads [ nope | rope ]  ->  grad_keys_values [ nope | .     ], and the sum of rope over heads
    grad_value  TILE heads [ value ]        ->  grad_keys_values [ .    | value ]
                                                grad_rope_key    [ rope ]: that sum, in float32, rotated back
    """
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, PADDED_HALF)
    in_half = half < HALF
    cos = tl.load(cos_ptr + token % angles * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + token % angles * HALF + half, mask=in_half, other=0.0)
    kind = grad_keys_values_ptr.dtype.element_ty

    nope = tl.arange(0, PADDED_NOPE)[None, :]
    column = tl.arange(0, PADDED_VALUE)[None, :]
    grad_query_ptr += token * (HEADS * (NOPE + 2 * HALF))
    grad_key_ptr += token * (HEADS * (NOPE + 2 * HALF))
    grad_value_ptr += token * (HEADS * VALUE)
    grad_keys_values_ptr += token * (HEADS * (NOPE + VALUE))
    sum_first = tl.zeros((PADDED_HALF,), tl.float32)
    sum_second = tl.zeros((PADDED_HALF,), tl.float32)
    # Summed before it is rotated back, because all heads have the token's angles: one rotation instead of HEADS.
    for start in range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        in_nope = (head < HEADS) & (nope < NOPE)
        in_rope = (head < HEADS) & in_half[None, :]
        in_value = (head < HEADS) & (column < VALUE)
        grad_key = tl.load(grad_key_ptr + head * (NOPE + 2 * HALF) + nope, mask=in_nope)
        tl.store(grad_keys_values_ptr + head * (NOPE + VALUE) + nope, grad_key, mask=in_nope)
        grad_value = tl.load(grad_value_ptr + head * VALUE + column, mask=in_value)
        tl.store(grad_keys_values_ptr + head * (NOPE + VALUE) + NOPE + column, grad_value, mask=in_value)

        rope = head * (NOPE + 2 * HALF) + NOPE + half[None, :]
        sum_first += tl.sum(tl.load(grad_key_ptr + rope, mask=in_rope, other=0.0).to(tl.float32), axis=0)
        sum_second += tl.sum(tl.load(grad_key_ptr + rope + HALF, mask=in_rope, other=0.0).to(tl.float32), axis=0)
        first = tl.load(grad_query_ptr + rope, mask=in_rope, other=0.0).to(tl.float32)
        second = tl.load(grad_query_ptr + rope + HALF, mask=in_rope, other=0.0).to(tl.float32)
        tl.store(grad_query_ptr + rope, (first * cos + second * sin).to(kind), mask=in_rope)
        tl.store(grad_query_ptr + rope + HALF, (second * cos - first * sin).to(kind), mask=in_rope)
    grad_rope_key_ptr += token * (2 * HALF) + half
    tl.store(grad_rope_key_ptr, (sum_first * cos + sum_second * sin).to(kind), mask=in_half)
    tl.store(grad_rope_key_ptr + HALF, (sum_second * cos - sum_first * sin).to(kind), mask=in_half)
