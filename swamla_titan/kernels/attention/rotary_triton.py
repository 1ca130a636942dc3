"""Triton kernel that rotates queries and keys on their way out of the tensor they come in with the values, and back."""

import triton
import triton.language as tl

ROWS = tl.constexpr(32)  # heads of a token at a time


@triton.jit
def rotate_heads(
    together_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, rows, angles, groups,
    PER_KEY: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """together [tokens, groups, PER_KEY + 2, 2 HALF] -> q [tokens, groups * PER_KEY, 2 HALF], k [tokens, groups, ...].

    BACK: the other way, by the inverse rotation; the values in `together` are not touched. cos and sin [angles, HALF]:
    token t has row t % angles. `rows` counts queries and keys of all tokens.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    member = row % (PER_KEY + 1)
    group = row // (PER_KEY + 1) % groups
    token = row // (PER_KEY + 1) // groups
    column = tl.arange(0, PADDED_HALF)[None, :]
    mask = inside[:, None] & (column < HALF)
    angle = (token % angles)[:, None] * HALF + column
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    token, group = token.to(tl.int64), group.to(tl.int64)
    at = ((token * groups + group) * (PER_KEY + 2) + member)[:, None] * (2 * HALF) + column
    is_key = (member == PER_KEY)[:, None]
    q_at = (token * groups * PER_KEY + group * PER_KEY + member)[:, None] * (2 * HALF) + column
    k_at = (token * groups + group)[:, None] * (2 * HALF) + column
    apart = tl.where(is_key, k_ptr + k_at, q_ptr + q_at)
    if BACK:
        first = tl.load(apart, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(apart + HALF, mask=mask, other=0.0).to(tl.float32)
        sin = -sin
        to = together_ptr + at
    else:
        first = tl.load(together_ptr + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(together_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
        to = apart
    kind = together_ptr.dtype.element_ty
    tl.store(to, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(to + HALF, (second * cos + first * sin).to(kind), mask=mask)
