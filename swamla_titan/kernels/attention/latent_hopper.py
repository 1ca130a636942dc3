"""MLA between its linear layers on Hopper as one operator: rotary embedding and attention (CUDA).

Nothing is expanded or copied but what is rotated, a third of queries and the rotary key: hopper.cu reads the other
columns where the linear layers left them, and writes the gradients of keys and values into one tensor.
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention import hopper
from swamla_titan.kernels.attention.hopper import Gradients, Parts
from swamla_titan.kernels.attention.masks import attention_flops, causal_pairs
from swamla_titan.kernels.device import power_of_two
from swamla_titan.kernels.operator import differentiate
from swamla_titan.kernels.triton import jit, tl


def latent_hopper_attention(
    query: Tensor,
    keys_values: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """As latent_attention (latent.py), for rotary widths of hopper.LAST and heads that hopper.py takes."""
    out: Tensor = _forward(query, keys_values, rope_key, cos, sin, scale, starts, ends)[0]
    return out


@torch.library.custom_op("swamla_titan::latent_hopper_attention", mutates_args=())
def _forward(
    query: Tensor,
    keys_values: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    starts: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse [B, H, T] in float32, the rotated parts of queries [B, T, H, rope] and of keys [B, T, 1, rope]."""
    batch, length, heads, width = query.shape
    query_last = query.new_empty(batch, length, heads, hopper.LAST)
    key_last = query.new_empty(batch, length, 1, hopper.LAST)
    if rope_key.stride(-1) != 1 or rope_key.stride(0) != length * rope_key.stride(1):
        rope_key = rope_key.contiguous()
    tokens, about = _about(query, cos, sin)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        rotate_parts[(tokens,)](
            query, rope_key, cos, sin, query_last, key_last, rope_key.stride(1), cos.shape[0] * cos.shape[1], **about
        )
    heads_of = Parts(query, query_last), Parts(keys_values, key_last), keys_values[..., width - hopper.LAST :]
    out, lse = hopper.launch_forward(*heads_of, starts, ends, scale, width)
    return out, lse, query_last, key_last


@_forward.register_fake
def _(query: Tensor, keys_values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads, hopper.V_WIDTH)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    last, shared = (query.new_empty(batch, length, each, hopper.LAST) for each in (heads, 1))
    return out, lse, last, shared


@torch.library.custom_op("swamla_titan::latent_hopper_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    keys_values: Tensor,
    query_last: Tensor,
    key_last: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    first = query.shape[3] - hopper.LAST
    grad_query, grad_keys_values, grad_last = (torch.empty_like(x) for x in (query, keys_values, query_last))
    to = Gradients(grad_query, Parts(grad_keys_values, grad_last), grad_keys_values[..., first:])
    heads = Parts(query, query_last), Parts(keys_values, key_last), keys_values[..., first:]
    hopper.launch_backward(grad_out, *heads, starts, ends, out, lse, scale, to)
    grad_rope_key = query.new_empty(*query.shape[:2], hopper.LAST)
    tokens, about = _about(query, cos, sin)
    with torch.cuda.device_of(query):
        gradients_of_parts[(tokens,)](
            grad_query, grad_last, cos, sin, grad_rope_key, cos.shape[0] * cos.shape[1], **about
        )
    return grad_query, grad_keys_values, grad_rope_key


@_backward.register_fake
def _(grad_out: Tensor, query: Tensor, keys_values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_rope_key = query.new_empty(*query.shape[:2], hopper.LAST)
    return torch.empty_like(query), torch.empty_like(keys_values), grad_rope_key


def _flops(query: Size, keys_values: Size, cos: Size, **_: Any) -> int:
    value_dim = keys_values[3] - (query[3] - 2 * cos[3])
    return attention_flops(query, value_dim, causal_pairs(query[1]))


differentiate(_forward, _backward, ("out", "lse", "query_last", "key_last"), _flops)


def _about(query: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, dict[str, int]]:
    """The number of tokens, and the kernels' constexpr arguments."""
    batch, length, heads, width = query.shape
    assert query.is_contiguous()
    for angles in (cos, sin):  # the kernels would read out of bounds otherwise
        assert angles.is_contiguous()
        assert angles.dtype == torch.float32
        assert angles.shape in ((1, length, 1, hopper.LAST // 2), (batch, length, 1, hopper.LAST // 2))
    constants = {"HEADS": heads, "PADDED_HEADS": power_of_two(heads), "WIDTH": width, "HALF": hopper.LAST // 2}
    return batch * length, constants


@jit
def rotate_parts(
    query_ptr, rope_key_ptr, cos_ptr, sin_ptr, to_query_ptr, to_key_ptr, rope_key_stride, angles,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The rotated parts of one token's queries, [HEADS, 2 HALF], and of its key, [2 HALF].

        query     HEADS heads [ not rotated | rope ]   ->  to_query  HEADS heads [ rotated ]
        rope_key                            [ rope ]   ->  to_key                [ rotated ]

    Tokens of rope_key are `rope_key_stride` apart. cos and sin [angles, HALF]: token t has row t % angles.
    """
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token % angles * HALF + half)
    sin = tl.load(sin_ptr + token % angles * HALF + half)
    kind = to_key_ptr.dtype.element_ty
    first = tl.load(rope_key_ptr + token * rope_key_stride + half).to(tl.float32)
    second = tl.load(rope_key_ptr + token * rope_key_stride + HALF + half).to(tl.float32)
    to_key_ptr += token * (2 * HALF) + half
    tl.store(to_key_ptr, (first * cos - second * sin).to(kind))
    tl.store(to_key_ptr + HALF, (second * cos + first * sin).to(kind))

    head = tl.arange(0, PADDED_HEADS)[:, None]
    inside = head < HEADS
    at = query_ptr + (token * HEADS + head) * WIDTH + WIDTH - 2 * HALF + half[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = to_query_ptr + (token * HEADS + head) * (2 * HALF) + half[None, :]
    tl.store(to, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(to + HALF, (second * cos + first * sin).to(kind), mask=inside)


@jit
def gradients_of_parts(
    grad_query_ptr, grad_last_ptr, cos_ptr, sin_ptr, grad_rope_key_ptr, angles,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gradients of one token's rope parts, from those of its rotated ones: the inverse of `rotate_parts`.

    grad_query  HEADS heads [ not rotated | rope ]  ->  rope rotated back in place
    grad_last   HEADS heads               [ rope ]  ->  grad_rope_key [ rope ]: their sum, in float32, rotated back
    """
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token % angles * HALF + half)
    sin = tl.load(sin_ptr + token % angles * HALF + half)
    kind = grad_rope_key_ptr.dtype.element_ty
    head = tl.arange(0, PADDED_HEADS)[:, None]
    inside = head < HEADS
    # Summed before it is rotated back, because all heads have the token's angles: one rotation instead of HEADS.
    at = grad_last_ptr + (token * HEADS + head) * (2 * HALF) + half[None, :]
    first = tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), axis=0)
    second = tl.sum(tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32), axis=0)
    grad_rope_key_ptr += token * (2 * HALF) + half
    tl.store(grad_rope_key_ptr, (first * cos + second * sin).to(kind))
    tl.store(grad_rope_key_ptr + HALF, (second * cos - first * sin).to(kind))

    at = grad_query_ptr + (token * HEADS + head) * WIDTH + WIDTH - 2 * HALF + half[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos + second * sin).to(kind), mask=inside)
    tl.store(at + HALF, (second * cos - first * sin).to(kind), mask=inside)
