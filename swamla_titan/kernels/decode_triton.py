"""Triton kernels of a decoded token: linear layers of few tokens, attention to a ring of slots, and to latents.

Of each, memory is what takes time: weights and caches are read once. With PDL (programmatic dependent launch, Hopper)
a kernel begins while the one before it ends: it reads weights, which no kernel writes, and waits before the rest.
"""

from swamla_titan.kernels.triton import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)


@jit
def linear_of_one(
    x_ptr, gain_ptr, weight_ptr, residual_ptr, out_ptr, eps,
    N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [K], weight [N, K] -> out [N]: weight (x / rms(x) * gain) + residual, each part where it is asked for.

                        weight                x
        program 0   BN [ BK | BK | ... ]  *  [ BK | BK | ... ]  ->  BN of out
        program 1   BN [ BK | BK | ... ]  *  [ BK | BK | ... ]  ->  BN of out

    GROUP: the weight is of gates and up projections, GROUP of each in turn, and out [N] is silu(gate) * up.
    The second axis of the grid is that of tokens, with rows of x, residual and out.
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = column if GROUP == 0 else column // GROUP * 2 * GROUP + column % GROUP
    inside = (column < N)[:, None]
    weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    # The first tile is on its way before the kernel waits for x.
    first = tl.load(weight_ptrs, mask=inside & (k < K)[None, :], other=0.0)
    if GROUP:
        first_up = tl.load(weight_ptrs + GROUP * K, mask=inside & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_ptr += token * K
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    squares = x * x
    if NORM:
        x *= tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    total = first.to(tl.float32) * x[None, :]
    if GROUP:
        total_up = first_up.to(tl.float32) * x[None, :]
    for begin in range(BK, K, BK):
        at = begin + k
        w = tl.load(weight_ptrs + begin, mask=inside & (at < K)[None, :], other=0.0)
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        squares += x * x
        if NORM:
            x *= tl.load(gain_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
        if GROUP:
            w = tl.load(weight_ptrs + GROUP * K + begin, mask=inside & (at < K)[None, :], other=0.0)
            total_up += w.to(tl.float32) * x[None, :]
    out = tl.sum(total, axis=1)
    rms = tl.sqrt(tl.sum(squares, axis=0) / K + eps)
    if NORM:
        out /= rms
    if GROUP:
        up = tl.sum(total_up, axis=1)
        if NORM:
            up /= rms
        out = out * tl.sigmoid(out) * up
    if RESIDUAL:
        out += tl.load(residual_ptr + token * N + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + column, out.to(out_ptr.dtype.element_ty), mask=column < N)


@jit
def linear_of_few(
    x_ptr, gain_ptr, weight_ptr, residual_ptr, out_ptr, eps, tokens,
    N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for `tokens` rows of x, BM of them a program, by tensor cores.

                        x                       weight, transposed
        program 0,0  BM [ BK | BK | ... ]   *   [ BK | BK | ... ] BN   ->  BM x BN of out
        program 1,0  BM [ BK | BK | ... ]   *   [ BK | BK | ... ] BN   ->  BM x BN of out

    1 / rms(x) is a factor of a row of x, so it is applied to the result.
    """
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = column if GROUP == 0 else column // GROUP * 2 * GROUP + column % GROUP
    is_token, inside = (token < tokens)[:, None], (column < N)[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + row.to(tl.int64)[None, :] * K + k[:, None]
    kind = weight_ptr.dtype.element_ty
    squares = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    total_up = tl.zeros((BM, BN), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for begin in range(0, K, BK):
        at = begin + k
        x = tl.load(x_ptrs + begin, mask=is_token & (at < K)[None, :], other=0.0)
        w = tl.load(weight_ptrs + begin, mask=inside & (at < K)[:, None], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            gain = tl.load(gain_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            x = (wide * gain[None, :]).to(kind)
        total = tl.dot(x, w, total, input_precision="ieee")
        if GROUP:
            w = tl.load(weight_ptrs + GROUP * K + begin, mask=inside & (at < K)[:, None], other=0.0)
            total_up = tl.dot(x, w, total_up, input_precision="ieee")
    if NORM:
        rms = tl.sqrt(squares / K + eps)[:, None]
        total /= rms
        total_up /= rms
    if GROUP:
        total = total * tl.sigmoid(total) * total_up
    at = token.to(tl.int64)[:, None] * N + column[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=is_token & inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_token & inside)


@jit
def rms_norm_rows(x_ptr, gain_ptr, out_ptr, eps, K: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """x [rows, K] -> x / rms(x) * gain, a row a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BK)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * K + k
    x = tl.load(x_ptr + at, mask=k < K, other=0.0).to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, axis=0) / K + eps) * gain
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=k < K)


@jit
def _rotated(first, second, cos, sin, kind):
    """Halves of heads after the rotation, rounded as the cache holds them."""
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@jit
def _normed(first, second, first_gain, second_gain, eps, D: tl.constexpr, kind):
    """Halves of heads [rows, HALF] behind RMSNorm, rounded to `kind`."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    rms = tl.sqrt(squares / D + eps)[:, None]
    first, second = first / rms * first_gain[None, :], second / rms * second_gain[None, :]
    return first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)


@jit
def ring_attention(
    qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, starts_ptr, length_ptr, keys_ptr, values_ptr, out_ptr, scale,
    eps, groups, PER_KEY: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BN: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token's queries of one key head, qkv [B, groups, PER_KEY + 2, 2 HALF], attend to a cache's slots.

        keys    [ SINK | ring of WINDOW        ]      visible: those in the window, and sinks that have left it
                         BN   BN   BN   ...
        qkv     [ q 0 | q 1 | ... | k | v ]   ->  out [B, groups * PER_KEY, 2 HALF];  k, v  ->  a slot of the ring,
                                                  and of the sinks while the sequence is no longer than these

    keys and values [B, SINK + WINDOW, groups, 2 HALF]. The new token is taken from qkv; its slot still has the token
    that leaves the window. Heads are read in halves, which the rotation pairs.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int32)
    position = length - tl.load(starts_ptr + batch).to(tl.int32)
    half, query = tl.arange(0, PADDED), tl.arange(0, QUERIES)
    in_half = half < HALF
    cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)
    kind = keys_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    qkv_ptr += (batch * groups + group) * (PER_KEY + 2) * 2 * HALF
    is_query = (query < PER_KEY)[:, None] & in_half[None, :]
    q_ptrs = qkv_ptr + query[:, None] * 2 * HALF + half[None, :]
    q1 = tl.load(q_ptrs, mask=is_query, other=0.0).to(tl.float32)
    q2 = tl.load(q_ptrs + HALF, mask=is_query, other=0.0).to(tl.float32)
    one = tl.zeros((1, PADDED), tl.int32) + half[None, :]
    k_ptrs = qkv_ptr + PER_KEY * 2 * HALF + one
    k1 = tl.load(k_ptrs, mask=one < HALF, other=0.0).to(tl.float32)
    k2 = tl.load(k_ptrs + HALF, mask=one < HALF, other=0.0).to(tl.float32)
    v1 = tl.load(k_ptrs + 2 * HALF, mask=one < HALF, other=0.0)
    v2 = tl.load(k_ptrs + 3 * HALF, mask=one < HALF, other=0.0)
    if QK_NORM:
        gain1 = tl.load(q_gain_ptr + half, mask=in_half, other=0.0).to(tl.float32)
        gain2 = tl.load(q_gain_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        q1, q2 = _normed(q1, q2, gain1, gain2, eps, 2 * HALF, kind)
        gain1 = tl.load(k_gain_ptr + half, mask=in_half, other=0.0).to(tl.float32)
        gain2 = tl.load(k_gain_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        k1, k2 = _normed(k1, k2, gain1, gain2, eps, 2 * HALF, kind)
    q1, q2 = _rotated(q1, q2, cos[None, :], sin[None, :], kind)
    k1, k2 = _rotated(k1, k2, cos[None, :], sin[None, :], kind)

    # The new token sees itself: the softmax begins with it.
    scale *= LOG2E
    with_itself = tl.sum(q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32), axis=1)
    largest = with_itself * scale
    denominator = tl.full((QUERIES,), 1.0, tl.float32)
    mixed1 = tl.zeros((QUERIES, PADDED), tl.float32) + v1.to(tl.float32)
    mixed2 = tl.zeros((QUERIES, PADDED), tl.float32) + v2.to(tl.float32)
    of_head = (batch * (SINK + WINDOW) * groups + group) * 2 * HALF
    stride = groups * 2 * HALF  # from slot to slot
    newest = length % WINDOW
    for begin in range(0, SINK + WINDOW, BN):
        slot = begin + tl.arange(0, BN)
        age = (newest - (slot - SINK) + WINDOW) % WINDOW  # of ring slots
        in_ring = (slot >= SINK) & (slot < SINK + WINDOW) & (age > 0) & (age <= position)
        seen = in_ring | ((slot < SINK) & (position - slot >= WINDOW))
        at = of_head + slot.to(tl.int64)[:, None] * stride + half[None, :]
        mask = seen[:, None] & in_half[None, :]
        keys1 = tl.load(keys_ptr + at, mask=mask, other=0.0)
        keys2 = tl.load(keys_ptr + at + HALF, mask=mask, other=0.0)
        scores = tl.dot(q1, tl.trans(keys1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(keys2), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        weights, shrink = tl.exp2(scores - now[:, None]), tl.exp2(largest - now)
        denominator = denominator * shrink + tl.sum(weights, axis=1)
        values1 = tl.load(values_ptr + at, mask=mask, other=0.0)
        values2 = tl.load(values_ptr + at + HALF, mask=mask, other=0.0)
        mixed1 = tl.dot(weights.to(kind), values1, mixed1 * shrink[:, None], input_precision="ieee")
        mixed2 = tl.dot(weights.to(kind), values2, mixed2 * shrink[:, None], input_precision="ieee")
        largest = now
    out_ptrs = out_ptr + ((batch * groups + group) * PER_KEY + query)[:, None] * 2 * HALF + half[None, :]
    out_kind = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (mixed1 / denominator[:, None]).to(out_kind), mask=is_query)
    tl.store(out_ptrs + HALF, (mixed2 / denominator[:, None]).to(out_kind), mask=is_query)

    for each in tl.static_range(2):  # into the ring, and among the sinks
        slot = SINK + newest if each == 0 else position
        mask = (one < HALF) & ((each == 0) | (position < SINK))
        at = of_head + slot.to(tl.int64) * stride + one
        tl.store(keys_ptr + at, k1, mask=mask)
        tl.store(keys_ptr + at + HALF, k2, mask=mask)
        tl.store(values_ptr + at, v1, mask=mask)
        tl.store(values_ptr + at + HALF, v2, mask=mask)


@jit
def latent_queries(
    query_ptr, up_ptr, out_ptr, tokens, query_stride, heads, NOPE: tl.constexpr, PADDED_NOPE: tl.constexpr,
    QUERY: tl.constexpr, UP: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries that meet latents: of a head, query [tokens, NOPE] times up [NOPE, RANK] -> out [tokens, heads, RANK].

        query  BM [ head 0: NOPE | rope | head 1 ... ]   times   up of the head  [ NOPE keys   ]  BR of RANK
                                                                                 [ v values    ]

    query: heads of QUERY elements, tokens `query_stride` apart. up [heads, UP, RANK].
    """
    head = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    n = tl.arange(0, PADDED_NOPE)
    up_ptrs = up_ptr + (head * UP + n).to(tl.int64)[:, None] * RANK + r[None, :]
    up = tl.load(up_ptrs, mask=(n < NOPE)[:, None] & (r < RANK)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    query_ptrs = query_ptr + token.to(tl.int64)[:, None] * query_stride + head * QUERY + n[None, :]
    query = tl.load(query_ptrs, mask=(token < tokens)[:, None] & (n < NOPE)[None, :], other=0.0)
    out = tl.dot(query, up, input_precision="ieee")
    out_ptrs = out_ptr + (token.to(tl.int64)[:, None] * heads + head) * RANK + r[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (r < RANK)[None, :])


@jit
def latent_attention(
    query_ptr, latent_query_ptr, new_ptr, gain_ptr, cos_ptr, sin_ptr, starts_ptr, length_ptr, latents_ptr,
    rope_keys_ptr, mixed_ptr, largest_ptr, denominator_ptr, scale, eps, query_stride, new_stride, room, chunk,
    HEADS: tl.constexpr, BH: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token's heads attend to a part of its sequence's latents, which each program reads once for BH heads.

        latents, rope_keys   [ part 0: chunk tokens | part 1 | ... ]     program (part, heads, sequence)
                               BN  BN  BN  ...
        -> mixed [B, parts, HEADS, RANK], not divided by the softmax's denominator, and that and its largest score
           [B, parts, HEADS], float32

    The program of part 0 adds the new token, of which `new` is [latent before its norm | rotary key]: it norms and
    rotates it, and stores it in the cache.
    """
    part, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int32)
    start = tl.load(starts_ptr + batch).to(tl.int32)
    position = length - start
    head = block * BH + tl.arange(0, BH)
    r, half = tl.arange(0, PADDED_RANK), tl.arange(0, PADDED)
    is_head, in_rank, in_half = (head < HEADS)[:, None], r < RANK, half < HALF
    cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)
    gain = tl.load(gain_ptr + r, mask=in_rank, other=0.0).to(tl.float32)
    kind = latents_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    of_head = (batch * HEADS + head)[:, None] * RANK + r[None, :]
    query = tl.load(latent_query_ptr + of_head, mask=is_head & in_rank[None, :], other=0.0)
    q_ptrs = query_ptr + batch * query_stride + (head * (NOPE + 2 * HALF) + NOPE)[:, None] + half[None, :]
    q1 = tl.load(q_ptrs, mask=is_head & in_half[None, :], other=0.0).to(tl.float32)
    q2 = tl.load(q_ptrs + HALF, mask=is_head & in_half[None, :], other=0.0).to(tl.float32)
    q1, q2 = _rotated(q1, q2, cos[None, :], sin[None, :], kind)

    scale *= LOG2E
    largest = tl.full((BH,), float("-inf"), tl.float32)
    denominator = tl.zeros((BH,), tl.float32)
    mixed = tl.zeros((BH, PADDED_RANK), tl.float32)
    if part == 0:
        new_ptr += batch * new_stride
        latent = tl.load(new_ptr + r, mask=in_rank, other=0.0).to(tl.float32)
        latent = (latent / tl.sqrt(tl.sum(latent * latent, axis=0) / RANK + eps) * gain).to(kind)
        k1 = tl.load(new_ptr + RANK + half, mask=in_half, other=0.0).to(tl.float32)
        k2 = tl.load(new_ptr + RANK + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        k1, k2 = _rotated(k1, k2, cos, sin, kind)
        if block == 0:
            at = batch * room + length
            tl.store(latents_ptr + at * RANK + r, latent, mask=in_rank)
            tl.store(rope_keys_ptr + at * 2 * HALF + half, k1, mask=in_half)
            tl.store(rope_keys_ptr + at * 2 * HALF + HALF + half, k2, mask=in_half)
        wide = latent.to(tl.float32)[None, :]
        largest = tl.sum(query.to(tl.float32) * wide, axis=1)
        largest += tl.sum(q1.to(tl.float32) * k1.to(tl.float32)[None, :], axis=1)
        largest += tl.sum(q2.to(tl.float32) * k2.to(tl.float32)[None, :], axis=1)
        largest *= scale
        denominator += 1
        mixed += wide
    first = tl.maximum(part * chunk, start // BN * BN)
    for begin in range(first, tl.minimum(part * chunk + chunk, length), BN):
        token = begin + tl.arange(0, BN)
        seen = (token >= start) & (token < tl.minimum(part * chunk + chunk, length))
        at = (batch * room + token)[:, None]
        latents = tl.load(latents_ptr + at * RANK + r[None, :], mask=seen[:, None] & in_rank[None, :], other=0.0)
        key_ptrs = rope_keys_ptr + at * 2 * HALF + half[None, :]
        keys1 = tl.load(key_ptrs, mask=seen[:, None] & in_half[None, :], other=0.0)
        keys2 = tl.load(key_ptrs + HALF, mask=seen[:, None] & in_half[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(latents), input_precision="ieee")
        scores = tl.dot(q1, tl.trans(keys1), scores, input_precision="ieee")
        scores = tl.dot(q2, tl.trans(keys2), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        weights, shrink = tl.exp2(scores - now[:, None]), tl.exp2(largest - now)
        denominator = denominator * shrink + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(kind), latents, mixed * shrink[:, None], input_precision="ieee")
        largest = now
    at = (batch * tl.num_programs(0) + part) * HEADS + head
    tl.store(largest_ptr + at, largest, mask=head < HEADS)
    tl.store(denominator_ptr + at, denominator, mask=head < HEADS)
    tl.store(mixed_ptr + at[:, None] * RANK + r[None, :], mixed, mask=is_head & in_rank[None, :])


@jit
def latent_values(
    mixed_ptr, largest_ptr, denominator_ptr, up_ptr, out_ptr, tokens, heads, PARTS: tl.constexpr, NOPE: tl.constexpr,
    VALUE: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What latent_attention gives for the parts -> out [tokens, heads, VALUE]: their sum, through the head's values.

    mixed of a head   part 0: BM [ RANK ]  +  part 1: BM [ RANK ]  + ...   times   up of the head, BV of VALUE
    """
    head = tl.program_id(0)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    r = tl.arange(0, PADDED_RANK)
    up_ptrs = up_ptr + (head * (NOPE + VALUE) + NOPE + v).to(tl.int64)[:, None] * RANK + r[None, :]
    up = tl.load(up_ptrs, mask=(v < VALUE)[:, None] & (r < RANK)[None, :], other=0.0)  # [BV, PADDED_RANK]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    is_token = token < tokens
    at = token.to(tl.int64) * PARTS * heads + head  # of part 0
    largest = tl.full((BM,), float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        largest = tl.maximum(largest, tl.load(largest_ptr + at + part * heads, mask=is_token, other=0.0))
    denominator = tl.zeros((BM,), tl.float32)
    mixed = tl.zeros((BM, PADDED_RANK), tl.float32)
    for part in tl.static_range(PARTS):
        share = tl.exp2(tl.load(largest_ptr + at + part * heads, mask=is_token, other=0.0) - largest)
        denominator += share * tl.load(denominator_ptr + at + part * heads, mask=is_token, other=1.0)
        mixed_ptrs = mixed_ptr + (at + part * heads)[:, None] * RANK + r[None, :]
        mixed += share[:, None] * tl.load(mixed_ptrs, mask=is_token[:, None] & (r < RANK)[None, :], other=0.0)
    mixed = (mixed / denominator[:, None]).to(up.dtype)
    if BM == 1:
        out = tl.sum(up.to(tl.float32) * mixed.to(tl.float32), axis=1)[None, :]
    else:
        out = tl.dot(mixed, tl.trans(up), input_precision="ieee")
    out_ptrs = out_ptr + (token.to(tl.int64)[:, None] * heads + head) * VALUE + v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & (v < VALUE)[None, :])
