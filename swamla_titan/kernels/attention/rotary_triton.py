"""Triton kernels of rotary embedding between linear layers and attention, forward and backward."""

from swamla_titan.kernels.triton import jit, tl

ROWS = tl.constexpr(32)  # queries and keys per program


@jit
def rotate_heads(
    qkv_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, rows, angles, groups,
    PER_KEY: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BACK: tl.constexpr,
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
        to = qkv_ptr + at
    else:
        first = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
        to = apart
    kind = qkv_ptr.dtype.element_ty
    tl.store(to, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(to + HALF, (second * cos + first * sin).to(kind), mask=mask)


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
