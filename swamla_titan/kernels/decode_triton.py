"""Triton kernels of a decoded token: linear layers of one token, attention to a ring of slots, and to latents.

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

    GROUP: the weight is of gates and up projections, GROUP of each in turn, and out [N] is silu(gate) * up. out may be
    residual.
    """
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
        out += tl.load(residual_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < N)


@jit
def rms_norm_rows(x_ptr, gain_ptr, out_ptr, eps, x_stride, K: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """x [rows, K], rows `x_stride` apart -> x / rms(x) * gain, a row a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BK)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, axis=0) / K + eps) * gain
    tl.store(out_ptr + row * K + k, out.to(out_ptr.dtype.element_ty), mask=k < K)


@jit
def _rotated(first, second, cos, sin, kind):
    """Halves of heads after the rotation, rounded as the cache holds them."""
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@jit
def _rotated_head(head_ptr, gain_ptr, cos, sin, half, eps, HALF: tl.constexpr, NORM: tl.constexpr, kind):
    """The halves of a query or key [2 HALF], normed if that is asked for, rotated, and rounded to `kind`."""
    in_half = half < HALF
    first = tl.load(head_ptr + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(head_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    if NORM:
        rms = tl.sqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF) + eps)
        first = first / rms * tl.load(gain_ptr + half, mask=in_half, other=0.0).to(tl.float32)
        second = second / rms * tl.load(gain_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    first, second = _rotated(first, second, cos, sin, kind)
    return first.to(tl.float32), second.to(tl.float32)


@jit
def _slots(keys_ptr, values_ptr, slot, seen, half, stride, HALF: tl.constexpr):
    """Halves of the keys and values of some slots, [slots, PADDED] each, zeros where they are not seen."""
    at = slot.to(tl.int64)[:, None] * stride + half[None, :]
    mask = seen[:, None] & (half < HALF)[None, :]
    keys1 = tl.load(keys_ptr + at, mask=mask, other=0.0)
    keys2 = tl.load(keys_ptr + at + HALF, mask=mask, other=0.0)
    values1 = tl.load(values_ptr + at, mask=mask, other=0.0)
    values2 = tl.load(values_ptr + at + HALF, mask=mask, other=0.0)
    return keys1, keys2, values1, values2


@jit
def _attend(q1, q2, keys1, keys2, values1, values2, seen, largest, denominator, mixed1, mixed2):
    """The softmax so far and some slots more: its largest score, denominator and numerators."""
    scores = tl.sum(q1[None, :] * keys1.to(tl.float32) + q2[None, :] * keys2.to(tl.float32), axis=1)
    scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=0))
    weights, shrink = tl.exp2(scores - now), tl.exp2(largest - now)
    mixed1 = mixed1 * shrink + tl.sum(weights[:, None] * values1.to(tl.float32), axis=0)
    mixed2 = mixed2 * shrink + tl.sum(weights[:, None] * values2.to(tl.float32), axis=0)
    return now, denominator * shrink + tl.sum(weights, axis=0), mixed1, mixed2


@jit
def ring_attention(
    qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, starts_ptr, length_ptr, keys_ptr, values_ptr, out_ptr, scale,
    eps, groups, PER_KEY: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, SINKS: tl.constexpr, BN: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token's queries of one key head, qkv [B, groups, PER_KEY + 2, 2 HALF], attend to a cache's slots.

        keys    [ SINK | ring of WINDOW        ]      visible: those in the window, and sinks that have left it
                         BN   BN   BN   ...
        qkv     [ q 0 | q 1 | ... | k | v ]   ->  out [B, groups * PER_KEY, 2 HALF];  k, v  ->  a slot of the ring,
                                                  and of the sinks while the sequence is no longer than these

    keys and values [B, SINK + WINDOW, groups, 2 HALF]. The new token is taken from qkv; its slot still has the token
    that leaves the window. Heads are read in halves, which the rotation pairs. Sinks and the first BN slots of the ring
    are on their way before the kernel waits for qkv. SINKS and PADDED are powers of two from SINK and HALF on. For few
    programs: with 256 slots of 8 warps one takes all of a multiprocessor's registers.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int32)
    position = length - tl.load(starts_ptr + batch).to(tl.int32)
    newest, stride = length % WINDOW, groups * 2 * HALF  # from slot to slot
    half = tl.arange(0, PADDED)
    keys_ptr += (batch * (SINK + WINDOW) * groups + group) * 2 * HALF
    values_ptr += (batch * (SINK + WINDOW) * groups + group) * 2 * HALF
    ring = tl.arange(0, BN)
    age = (newest - ring + WINDOW) % WINDOW
    seen = (ring < WINDOW) & (age > 0) & (age <= position)
    keys1, keys2, values1, values2 = _slots(keys_ptr, values_ptr, SINK + ring, seen, half, stride, HALF)
    sink = tl.arange(0, SINKS)
    sink_seen = (sink < SINK) & (position - sink >= WINDOW)
    if SINK:
        sink_k1, sink_k2, sink_v1, sink_v2 = _slots(keys_ptr, values_ptr, sink, sink_seen, half, stride, HALF)
    cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0)
    kind = keys_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    qkv_ptr += (batch * groups + group) * (PER_KEY + 2) * 2 * HALF
    out_ptr += (batch * groups + group) * PER_KEY * 2 * HALF + half
    new_ptr = qkv_ptr + PER_KEY * 2 * HALF
    k1, k2 = _rotated_head(new_ptr, k_gain_ptr, cos, sin, half, eps, HALF, QK_NORM, kind)
    v1 = tl.load(new_ptr + 2 * HALF + half, mask=half < HALF, other=0.0)
    v2 = tl.load(new_ptr + 3 * HALF + half, mask=half < HALF, other=0.0)
    for query in range(PER_KEY):
        q1, q2 = _rotated_head(qkv_ptr + query * 2 * HALF, q_gain_ptr, cos, sin, half, eps, HALF, QK_NORM, kind)
        q1, q2 = q1 * (scale * LOG2E), q2 * (scale * LOG2E)
        # The new token sees itself: the softmax begins with it.
        largest = tl.sum(q1 * k1 + q2 * k2, axis=0)
        denominator, mixed1, mixed2 = largest * 0 + 1, v1.to(tl.float32), v2.to(tl.float32)
        largest, denominator, mixed1, mixed2 = _attend(
            q1, q2, keys1, keys2, values1, values2, seen, largest, denominator, mixed1, mixed2
        )
        if SINK:
            largest, denominator, mixed1, mixed2 = _attend(
                q1, q2, sink_k1, sink_k2, sink_v1, sink_v2, sink_seen, largest, denominator, mixed1, mixed2
            )
        for begin in range(BN, WINDOW, BN):
            slot = begin + ring
            age = (newest - slot + WINDOW) % WINDOW
            more = (slot < WINDOW) & (age > 0) & (age <= position)
            more_k1, more_k2, more_v1, more_v2 = _slots(keys_ptr, values_ptr, SINK + slot, more, half, stride, HALF)
            largest, denominator, mixed1, mixed2 = _attend(
                q1, q2, more_k1, more_k2, more_v1, more_v2, more, largest, denominator, mixed1, mixed2
            )
        out_ptrs = out_ptr + query * 2 * HALF
        tl.store(out_ptrs, (mixed1 / denominator).to(out_ptr.dtype.element_ty), mask=half < HALF)
        tl.store(out_ptrs + HALF, (mixed2 / denominator).to(out_ptr.dtype.element_ty), mask=half < HALF)

    for each in tl.static_range(2):  # into the ring, and among the sinks
        slot = SINK + newest if each == 0 else position
        mask = (half < HALF) & ((each == 0) | (position < SINK))
        at = slot.to(tl.int64) * stride + half
        tl.store(keys_ptr + at, k1.to(kind), mask=mask)
        tl.store(keys_ptr + at + HALF, k2.to(kind), mask=mask)
        tl.store(values_ptr + at, v1, mask=mask)
        tl.store(values_ptr + at + HALF, v2, mask=mask)


@jit
def _normed(first, second, first_gain, second_gain, eps, D: tl.constexpr, kind):
    """Halves of heads [rows, HALF] behind RMSNorm, rounded to `kind`."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    rms = tl.sqrt(squares / D + eps)[:, None]
    first, second = first / rms * first_gain[None, :], second / rms * second_gain[None, :]
    return first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)


@jit
def ring_attention_of_many(
    qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, starts_ptr, length_ptr, keys_ptr, values_ptr, out_ptr, scale,
    eps, groups, PER_KEY: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BN: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """The same for so many programs that they share multiprocessors: by tensor cores, and with tiles read ahead.

        scores  [ QUERIES x BN ]  =  q [ QUERIES x PADDED ] times the halves of BN keys, transposed, and so on by tiles

    QUERIES is PER_KEY up to what a tensor core takes.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int32)
    position = length - tl.load(starts_ptr + batch).to(tl.int32)
    half, query = tl.arange(0, PADDED), tl.arange(0, QUERIES)
    in_half = half < HALF
    cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)
    kind = keys_ptr.dtype.element_ty

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
def _latents(
    latents_ptr, keys_ptr, begin, start, end, r, half, BN: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr
):
    """The latents of BN tokens from `begin` on, halves of their rotary keys, and which of them are seen."""
    token = begin + tl.arange(0, BN)
    seen = (token >= start) & (token < end)
    at = token.to(tl.int64)[:, None]
    latents = tl.load(latents_ptr + at * RANK + r[None, :], mask=seen[:, None] & (r < RANK)[None, :], other=0.0)
    mask, at = seen[:, None] & (half < HALF)[None, :], at * 2 * HALF + half[None, :]
    keys1 = tl.load(keys_ptr + at, mask=mask, other=0.0)
    keys2 = tl.load(keys_ptr + at + HALF, mask=mask, other=0.0)
    return latents, keys1, keys2, seen


@jit
def _attend_to_latents(query, q1, q2, latents, keys1, keys2, seen, scale, largest, denominator, mixed):
    """The softmax of BH heads so far, and some tokens more."""
    scores = tl.dot(query, tl.trans(latents), input_precision="ieee")
    scores = tl.dot(q1, tl.trans(keys1), scores, input_precision="ieee")
    scores = tl.dot(q2, tl.trans(keys2), scores, input_precision="ieee")
    scores = tl.where(seen[None, :], scores * scale, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1))
    weights, shrink = tl.exp2(scores - now[:, None]), tl.exp2(largest - now)
    mixed = tl.dot(weights.to(latents.dtype), latents, mixed * shrink[:, None], input_precision="ieee")
    return now, denominator * shrink + tl.sum(weights, axis=1), mixed


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
    rotates it, and stores it in the cache. The first BN tokens of a part are on their way before the kernel waits.
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
    end = tl.minimum(part * chunk + chunk, length)
    first = tl.maximum(part * chunk, start // BN * BN)
    latents_of, keys_of = latents_ptr + batch * room * RANK, rope_keys_ptr + batch * room * 2 * HALF
    latents, keys1, keys2, seen = _latents(latents_of, keys_of, first, start, end, r, half, BN, RANK, HALF)
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
    if first < end:
        largest, denominator, mixed = _attend_to_latents(
            query, q1, q2, latents, keys1, keys2, seen, scale, largest, denominator, mixed
        )
    for begin in range(first + BN, end, BN):
        latents, keys1, keys2, seen = _latents(latents_of, keys_of, begin, start, end, r, half, BN, RANK, HALF)
        largest, denominator, mixed = _attend_to_latents(
            query, q1, q2, latents, keys1, keys2, seen, scale, largest, denominator, mixed
        )
    at = (batch * tl.num_programs(0) + part) * HEADS + head
    tl.store(largest_ptr + at, largest, mask=head < HEADS)
    tl.store(denominator_ptr + at, denominator, mask=head < HEADS)
    tl.store(mixed_ptr + at[:, None] * RANK + r[None, :], mixed, mask=is_head & in_rank[None, :])


@jit
def latent_values(
    mixed_ptr, largest_ptr, denominator_ptr, up_ptr, out_ptr, tokens, parts, heads, PARTS: tl.constexpr,
    NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BM: tl.constexpr,
    BV: tl.constexpr, PDL: tl.constexpr,
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
    if BM == 1:
        part = tl.arange(0, PARTS)
        at = (tl.program_id(2).to(tl.int64) * parts + part) * heads + head
        is_part = part < parts
        share = tl.load(largest_ptr + at, mask=is_part, other=float("-inf"))
        share = tl.exp2(share - tl.max(share, axis=0))
        denominator = tl.sum(share * tl.load(denominator_ptr + at, mask=is_part, other=0.0), axis=0)
        mixed_ptrs = mixed_ptr + at[:, None] * RANK + r[None, :]
        parts_of = tl.load(mixed_ptrs, mask=is_part[:, None] & (r < RANK)[None, :], other=0.0)
        mixed = (tl.sum(share[:, None] * parts_of, axis=0) / denominator).to(up.dtype)
        out = tl.sum(up.to(tl.float32) * mixed.to(tl.float32)[None, :], axis=1)[None, :]
    else:
        is_token = token < tokens
        at = token.to(tl.int64) * parts * heads + head  # of part 0
        largest = tl.full((BM,), float("-inf"), tl.float32)
        for part in range(parts):
            largest = tl.maximum(largest, tl.load(largest_ptr + at + part * heads, mask=is_token, other=0.0))
        denominator = tl.zeros((BM,), tl.float32)
        mixed = tl.zeros((BM, PADDED_RANK), tl.float32)
        for part in range(parts):
            share = tl.exp2(tl.load(largest_ptr + at + part * heads, mask=is_token, other=0.0) - largest)
            denominator += share * tl.load(denominator_ptr + at + part * heads, mask=is_token, other=1.0)
            mixed_ptrs = mixed_ptr + (at + part * heads)[:, None] * RANK + r[None, :]
            mixed += share[:, None] * tl.load(mixed_ptrs, mask=is_token[:, None] & (r < RANK)[None, :], other=0.0)
        out = tl.dot((mixed / denominator[:, None]).to(up.dtype), tl.trans(up), input_precision="ieee")
    out_ptrs = out_ptr + (token.to(tl.int64)[:, None] * heads + head) * VALUE + v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (v < VALUE)[None, :])


@jit
def sample_rows(
    logits_ptr, seed_ptr, out_ptr, size, stride, factor, top_k, top_p, SIZE: tl.constexpr, GREEDY: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """logits [B, size], rows `stride` apart -> out [B], one token of each row, a row a program.

        row  [ logits * factor ]  ->  exp  ->  of the top_k largest  ->  of those that reach top_p of the sum
                                  ->  over an exponential variable each  ->  the index of the largest

    The smallest value that stays is found by bisection of the bits of non-negative floats, which are in their order; of
    values equal to it the first stay, as many as there is room for. SIZE is the power of two from `size` on.
    """
    row = tl.program_id(0)
    column = tl.arange(0, SIZE)
    inside = column < size
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))  # of a NaN argmax may give a column behind the row
    if GREEDY:
        tl.store(out_ptr + row, tl.minimum(tl.argmax(x, axis=0), size - 1).to(tl.int64))
    else:
        x = x * factor
        p = tl.exp(x - tl.max(x, axis=0))
        if TOP_K:
            bits = p.to(tl.int32, bitcast=True)
            low, high = 0, 0x3F800001  # that of 0, and the one after that of 1
            for _ in range(31):
                middle = (low + high) // 2
                is_enough = tl.sum((bits >= middle).to(tl.int32), axis=0) >= top_k
                low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
            room = top_k - tl.sum((bits > low).to(tl.int32), axis=0)
            equal = bits == low
            stays = (bits > low) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
            p = tl.where(stays, p, 0.0)
        if TOP_P:
            bits = p.to(tl.int32, bitcast=True)
            wanted = tl.sum(p, axis=0) * top_p
            low, high = 0, 0x3F800001
            for _ in range(31):
                middle = (low + high) // 2
                is_enough = tl.sum(tl.where(bits >= middle, p, 0.0), axis=0) >= wanted
                low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
            above = tl.sum(tl.where(bits > low, p, 0.0), axis=0)
            equal = bits == low
            before = above + (tl.cumsum(equal.to(tl.int32), axis=0) - 1).to(tl.float32) * p
            stays = (bits > low) | (equal & (before < wanted))
            p = tl.where(stays, p, 0.0)
        uniform = tl.rand(tl.load(seed_ptr), row * SIZE + column)
        noise = -tl.log(tl.maximum(uniform, 1e-10))
        race = tl.where(inside & (p > 0), p / tl.maximum(noise, 1e-10), -1.0)
        tl.store(out_ptr + row, tl.argmax(race, axis=0).to(tl.int64))
