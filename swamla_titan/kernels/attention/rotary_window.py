"""Sliding-window attention between its linear layers as one operator: split, rotary embedding, attention (CUDA).

Compiled by torch, the backward pass would write the gradients of queries, keys and values, rotate them in one kernel
and concatenate them in another. Here the values' gradients are written directly into the gradient of the fused
projection, and the others by the kernel that rotates them back.
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention.masks import attention_flops, window_pairs
from swamla_titan.kernels.attention.window import run_backward, run_forward
from swamla_titan.kernels.device import power_of_two
from swamla_titan.kernels.operator import differentiate
from swamla_titan.kernels.triton import jit, tl

_ROWS = 32  # queries and keys per program


def rotary_window_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    window: int,
    sink: int,
    scale: float,
    kernel: str = "triton",
) -> Tensor:
    """`window_attention` of rotated queries and keys from a fused projection.

    qkv [B, T, G, H/G + 2, D], contiguous: the queries of a group of heads, then its key and its value. cos and sin
    [1 or B, T, 1, D/2] in float32 rotate element i with i + D/2, as model/layers.py does. -> [B, T, H, D] in qkv's
    dtype; the rest is as in `window_attention`.
    """
    out: Tensor = _forward(qkv, cos, sin, starts, window, sink, scale, kernel)[0]
    return out


@torch.library.custom_op("swamla_titan::rotary_window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    window: int,
    sink: int,
    scale: float,
    by: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse as in `window_attention`, and rotated queries [B, T, H, D] and keys [B, T, G, D]."""
    query, key = _empty_query_key(qkv)
    with torch.cuda.device_of(qkv):  # Triton launches on the current one
        _rotate(qkv, query, key, cos, sin, back=False)
        out, lse = run_forward(query, key, qkv[..., -1, :], starts, window, sink, scale, by)
    return out, lse, query, key


@_forward.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key = _empty_query_key(qkv)
    batch, length, heads, _ = query.shape
    return torch.empty_like(query), query.new_empty(batch, heads, length, dtype=torch.float32), query, key


@torch.library.custom_op("swamla_titan::rotary_window_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    sink: int,
    scale: float,
    by: str = "triton",
) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    gradients = grad_query, grad_key, grad_qkv[..., -1, :]
    with torch.cuda.device_of(qkv):
        rule = window, sink, scale, by
        run_backward(grad_out, query, key, qkv[..., -1, :], starts, out, lse, *rule, gradients)
        _rotate(grad_qkv, grad_query, grad_key, cos, sin, back=True)
    return grad_qkv


def _flops(qkv: Size, window: int, sink: int, **_: Any) -> int:
    batch, length, groups, members, width = qkv
    query = Size((batch, length, groups * (members - 2), width))
    return attention_flops(query, width, window_pairs(length, window, sink))


differentiate(_forward, _backward, ("out", "lse", "query", "key"), _flops)


def _empty_query_key(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, groups, members, width = qkv.shape
    return (
        qkv.new_empty(batch, length, groups * (members - 2), width),
        qkv.new_empty(batch, length, groups, width),
    )


def _rotate(qkv: Tensor, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Rotate queries and keys out of the fused `qkv`; or `back` into it by the inverse rotation, beside its values."""
    batch, length, groups, members, width = qkv.shape
    for each in (qkv, query, key, cos, sin):  # the kernel would read out of bounds otherwise
        assert each.is_contiguous()
    assert cos.shape == sin.shape == (cos.shape[0], length, 1, width // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape[0] in (1, batch)
    rows = batch * length * groups * (members - 1)
    rotate_heads[(-(-rows // _ROWS),)](
        *(qkv, query, key, cos, sin, rows, length * cos.shape[0], groups),
        PER_KEY=members - 2,
        HALF=width // 2,
        PADDED_HALF=power_of_two(width // 2),
        ROWS=_ROWS,
        BACK=back,
        num_warps=4,
    )


@jit
def rotate_heads(
    qkv_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, rows, angles, groups,
    PER_KEY: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """qkv [tokens, groups, PER_KEY + 2, 2 HALF] -> q [tokens, groups * PER_KEY, 2 HALF], k [tokens, groups, 2 HALF].

        qkv, one group   [ q 0 | q 1 | ... | k | v ]     a program rotates ROWS of all q and k, each by its token's
                            v     v          v           angles; v is skipped
        q, k             [ q 0 | q 1 | ... ] [ k ]

    BACK: from q and k into qkv, by the inverse rotation. cos and sin [angles, HALF]: token t has row t % angles. `rows`
    counts queries and keys of all tokens.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    # Queries and keys alone are counted: PER_KEY + 1 of a group. In qkv a group has PER_KEY + 2, so v is stepped over.
    member = row % (PER_KEY + 1)
    group = row // (PER_KEY + 1) % groups
    token = row // (PER_KEY + 1) // groups
    column = tl.arange(0, PADDED_HALF)[None, :]
    mask = inside[:, None] & (column < HALF)
    angle = (token % angles)[:, None] * HALF + column
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    # Rows are fewer than 2**31, elements may not be.
    token, group = token.to(tl.int64), group.to(tl.int64)
    at = ((token * groups + group) * (PER_KEY + 2) + member)[:, None] * (2 * HALF) + column
    is_key = (member == PER_KEY)[:, None]
    q_at = (token * groups * PER_KEY + group * PER_KEY + member)[:, None] * (2 * HALF) + column
    k_at = (token * groups + group)[:, None] * (2 * HALF) + column
    # One tile has queries and keys. So each row has the address of its own tensor, and one load serves both.
    apart = tl.where(is_key, k_ptr + k_at, q_ptr + q_at)
    if BACK:
        first = tl.load(apart, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(apart + HALF, mask=mask, other=0.0).to(tl.float32)
        sin = -sin
        to = qkv_ptr + at
    else:
        first = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
        to = apart
    kind = qkv_ptr.dtype.element_ty
    # In float32 until here, so each element is rounded once.
    tl.store(to, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(to + HALF, (second * cos + first * sin).to(kind), mask=mask)
