"""Triton kernels of a decoded token: linear layers of one token, attention to a ring of slots, and to latents.

Of each, memory is what takes time: weights and caches are read once. With PDL (programmatic dependent launch, Hopper)
a kernel begins while the one before it ends: it reads weights, which no kernel writes, and waits before the rest.
"""

from swamla_titan.kernels.triton import jit, tl

# ruff: noqa: RUF005 # Triton does not unpack tuples
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _prefetch_rows(weight_ptr, row, is_wanted, begin, WIDTH: tl.constexpr, K: tl.constexpr):
    """Read WIDTH elements from `begin` on of some rows of weight [N, K] into the L2; nothing waits for them.

    They are 16 bytes or a multiple.
    """
    ptrs = weight_ptr + row.to(tl.int64) * K + begin
    size = WIDTH * weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;  // threads beyond the pointers have copies of them
        setp.lt.u32 p, t, $3;
        setp.ne.and.s32 p, $4, 0, p;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r,r",
        [ptrs.to(tl.int64), size, ptrs.numel, is_wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def linear_of_one(
    x_ptr, gain_ptr, weight_ptr, residual_ptr, out_ptr, eps,
    N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [K], weight [N, K] -> out [N]: weight (x / rms(x) * gain) + residual, each part where it is asked for.

                        weight                x
        program 0   BN [ BK | BK | ... ]  *  [ BK | BK | ... ]  ->  BN of out
        program 1   BN [ BK | BK | ... ]  *  [ BK | BK | ... ]  ->  BN of out

    GROUP: the weight is of gates and up projections, GROUP of each in turn, and out [N] is silu(gate) * up. out may be
    residual. The first HELD tiles are on their way before the kernel waits for x, and with AHEAD the others are on
    theirs to the L2.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = column if GROUP == 0 else column // GROUP * 2 * GROUP + column % GROUP
    inside = (column < N)[:, None]
    weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    held, held_up = (), ()
    for tile in tl.static_range(HELD):
        mask = inside & (tile * BK + k < K)[None, :]
        held = held + (tl.load(weight_ptrs + tile * BK, mask=mask, other=0.0),)
        if GROUP:
            held_up = held_up + (tl.load(weight_ptrs + GROUP * K + tile * BK, mask=mask, other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD and HELD * BK < K:
            _prefetch_rows(weight_ptr, row, column < N, HELD * BK, K - HELD * BK, K)
            if GROUP:
                _prefetch_rows(weight_ptr, row + GROUP, column < N, HELD * BK, K - HELD * BK, K)
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BN, BK), tl.float32)
    total_up = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for tile in tl.static_range((K + BK - 1) // BK):
        at = tile * BK + k
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(gain_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        mask = inside & (at < K)[None, :]
        w = held[tile] if tile < HELD else tl.load(weight_ptrs + tile * BK, mask=mask, other=0.0)
        total += w.to(tl.float32) * x[None, :]
        if GROUP:
            w = held_up[tile] if tile < HELD else tl.load(weight_ptrs + GROUP * K + tile * BK, mask=mask, other=0.0)
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
def linear_of_many(
    x, weight, out_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N, K] -> x weight^T in parts [K / CHUNK, M, N], each the sum over CHUNK of K.

        x     BM [ part 0: CHUNK | part 1 | ... ]   times    weight, transposed  BN [ part 0: CHUNK | part 1 | ... ]
                   BK  BK  ...                                                        BK  BK  ...

    x and weight are descriptors of tiles, and K is theirs. GROUP: the weight is of gates and up projections, GROUP of
    each in turn, and BN divides it; out [1, M, N] is silu(gate) * up.
    """
    column, part, token = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2) * BM
    row = column if GROUP == 0 else column // GROUP * 2 * GROUP + column % GROUP
    begin = part * CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BM, BN), tl.float32)
    total_up = tl.zeros((BM, BN), tl.float32)
    for at in range(begin, begin + CHUNK, BK):
        tile = x.load([token, at])
        total = tl.dot(tile, tl.trans(weight.load([row, at])), total, input_precision="ieee")
        if GROUP:
            total_up = tl.dot(tile, tl.trans(weight.load([row + GROUP, at])), total_up, input_precision="ieee")
    if GROUP:
        total = total * tl.sigmoid(total) * total_up
    token += tl.arange(0, BM)
    column += tl.arange(0, BN)
    out_ptrs = out_ptr + (part * M + token).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(token < M)[:, None] & (column < N)[None, :])


@jit
def rms_norm_rows(
    x_ptr, added_ptr, gain_ptr, out_ptr, eps, x_stride, K: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [rows, K], rows `x_stride` apart -> x / rms(x) * gain, a row a program.

        program 0   x [ K ]  + added 0 [ K ] + added 1 [ K ] + ...  ->  x [ K ]  / rms, * gain [ K ]  ->  out [ K ]
        program 1   x [ K ]  + ...

    With PARTS x += added[0] + added[1] + ... first, of [PARTS, rows, K].
    """
    k = tl.arange(0, BK)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if PARTS:
        total = tl.zeros((BK,), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(added_ptr + (part * tl.num_programs(0) + row) * K + k, mask=k < K, other=0.0)
        # Rounded before it is normed, because that is the stream that later kernels read.
        kept = (x + total).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + k, kept, mask=k < K)
        x = kept.to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, axis=0) / K + eps) * gain
    tl.store(out_ptr + row * K + k, out.to(out_ptr.dtype.element_ty), mask=k < K)


@jit
def _rotated_head(
    head_ptr, gain_ptr, cos_ptr, sin_ptr, d, eps, HALF: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, kind
):
    """A query or key [2 HALF], normed if that is asked for, rotated, rounded to `kind`: its PARTS in float32.

    cos and sin [HALF]. The rotation pairs an element with that HALF further.
    """
    D: tl.constexpr = 2 * HALF
    W: tl.constexpr = D // PARTS
    rms = 1.0
    if NORM:
        squares = tl.zeros((W,), tl.float32)
        for part in tl.static_range(PARTS):
            x = tl.load(head_ptr + part * W + d).to(tl.float32)
            squares += x * x
        rms = tl.sqrt(tl.sum(squares, axis=0) / D + eps)
    rotated = ()
    for part in tl.static_range(PARTS):
        at = part * W + d
        other = (at + HALF) % D
        x, y = tl.load(head_ptr + at).to(tl.float32), tl.load(head_ptr + other).to(tl.float32)
        if NORM:
            x = (x / rms * tl.load(gain_ptr + at).to(tl.float32)).to(kind).to(tl.float32)
            y = (y / rms * tl.load(gain_ptr + other).to(tl.float32)).to(kind).to(tl.float32)
        cos, sin = tl.load(cos_ptr + at % HALF), tl.load(sin_ptr + at % HALF)
        rotated = rotated + ((x * cos + y * tl.where(at < HALF, -sin, sin)).to(kind).to(tl.float32),)
    return rotated


@jit
def _slots(slots_ptr, slot, seen, d, PARTS: tl.constexpr):
    """Some slots of keys or values of one head, in PARTS of their width; zeros where they are not seen."""
    W: tl.constexpr = d.shape[0]
    found = ()
    for part in tl.static_range(PARTS):
        at = slot[:, None] * (W * PARTS) + part * W + d[None, :]
        found = found + (tl.load(slots_ptr + at, mask=seen[:, None], other=0.0),)
    return found


@jit
def _scores(query, keys, seen, PARTS: tl.constexpr):
    """query . key of some slots, -inf where they are not seen."""
    total = query[0][None, :] * keys[0].to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += query[part][None, :] * keys[part].to(tl.float32)
    return tl.where(seen, tl.sum(total, axis=1), float("-inf"))


@jit
def _attend(query, keys, values, seen, largest, denominator, mixed, PARTS: tl.constexpr):
    """The softmax of each lane so far, and a slot more for each: its largest score, denominator and numerators."""
    scores = _scores(query, keys, seen, PARTS)
    now = tl.maximum(largest, scores)
    weights, shrink = tl.exp2(scores - now), tl.exp2(largest - now)
    summed = ()
    for part in tl.static_range(PARTS):
        summed = summed + (mixed[part] * shrink[:, None] + weights[:, None] * values[part].to(tl.float32),)
    return now, denominator * shrink + weights, summed


@jit
def ring_attention(
    qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, starts_ptr, length_ptr, keys_ptr, values_ptr, out_ptr, scale,
    eps, groups, PER_KEY: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, SINKS: tl.constexpr, BN: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr,
    QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token's queries of one key head, qkv [B, groups, PER_KEY + 2, 2 HALF], attend to a cache's slots.

        keys    [ SINK | ring of WINDOW        ]      visible: those in the window, and sinks that have left it
                         BN   BN   BN   ...
        qkv     [ q 0 | q 1 | ... | k | v ]   ->  out [B, groups * PER_KEY, 2 HALF];  k, v  ->  a slot of the ring,
                                                  and of the sinks while the sequence is no longer than these

    keys and values [B, groups, SINK + WINDOW, 2 HALF]. The new token is taken from qkv; its slot still has the token
    that leaves the window. Heads are read in PARTS whose width is a power of two. Each of BN lanes has a softmax of its
    own, over slots that are BN apart, and these meet at the end, so that threads seldom wait for each other. HELD:
    sinks and the first BN slots are on their way before the kernel waits for qkv. SINKS is a power of two from SINK on.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    D: tl.constexpr = 2 * HALF
    W: tl.constexpr = D // PARTS
    length = tl.load(length_ptr).to(tl.int32)
    position = length - tl.load(starts_ptr + batch).to(tl.int32)
    newest = length % WINDOW
    keys_ptr += (batch * groups + group) * (SINK + WINDOW) * D
    values_ptr += (batch * groups + group) * (SINK + WINDOW) * D
    d, ring = tl.arange(0, W), tl.arange(0, BN)
    sink = tl.arange(0, SINKS)
    sink_seen = (sink < SINK) & (position - sink >= WINDOW)
    if HELD:
        age = (newest - ring + WINDOW) % WINDOW
        seen = (ring < WINDOW) & (age > 0) & (age <= position)
        keys, values = _slots(keys_ptr, SINK + ring, seen, d, PARTS), _slots(values_ptr, SINK + ring, seen, d, PARTS)
        if SINK:
            sink_keys = _slots(keys_ptr, sink, sink_seen, d, PARTS)
            sink_values = _slots(values_ptr, sink, sink_seen, d, PARTS)
    kind = keys_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    qkv_ptr += (batch * groups + group) * (PER_KEY + 2) * D
    out_ptr += (batch * groups + group) * PER_KEY * D
    cos_ptr += position * HALF
    sin_ptr += position * HALF
    own_key = _rotated_head(qkv_ptr + PER_KEY * D, k_gain_ptr, cos_ptr, sin_ptr, d, eps, HALF, PARTS, QK_NORM, kind)
    own_value = ()
    for part in tl.static_range(PARTS):
        own_value = own_value + (tl.load(qkv_ptr + (PER_KEY + 1) * D + part * W + d),)
    for each in tl.static_range(2):  # into the ring, and among the sinks: slots that are not seen
        own_slot = SINK + newest if each == 0 else position
        stays = (d < W) & ((each == 0) | (position < SINK))
        for part in tl.static_range(PARTS):
            at = own_slot * D + part * W + d
            tl.store(keys_ptr + at, own_key[part].to(kind), mask=stays)
            tl.store(values_ptr + at, own_value[part], mask=stays)
    for each in range(PER_KEY):
        query = _rotated_head(qkv_ptr + each * D, q_gain_ptr, cos_ptr, sin_ptr, d, eps, HALF, PARTS, QK_NORM, kind)
        own, scaled = 0.0, ()
        for part in tl.static_range(PARTS):
            scaled = scaled + (query[part] * (scale * LOG2E),)
            own += tl.sum(scaled[part] * own_key[part], axis=0)
        largest = tl.full((BN,), -1e30, tl.float32)  # finite, so that no difference is of two infinite ones
        denominator, mixed = tl.zeros((BN,), tl.float32), ()
        for _ in tl.static_range(PARTS):
            mixed = mixed + (tl.zeros((BN, W), tl.float32),)
        if HELD:
            largest, denominator, mixed = _attend(scaled, keys, values, seen, largest, denominator, mixed, PARTS)
        for begin in tl.range(BN if HELD else 0, WINDOW, BN, num_stages=STAGES):
            slot = begin + ring
            age = (newest - slot + WINDOW) % WINDOW
            more = (slot < WINDOW) & (age > 0) & (age <= position)
            more_keys = _slots(keys_ptr, SINK + slot, more, d, PARTS)
            more_values = _slots(values_ptr, SINK + slot, more, d, PARTS)
            largest, denominator, mixed = _attend(
                scaled, more_keys, more_values, more, largest, denominator, mixed, PARTS
            )
        top = tl.maximum(tl.max(largest, axis=0), own)
        if SINK:
            if not HELD:
                sink_keys = _slots(keys_ptr, sink, sink_seen, d, PARTS)
                sink_values = _slots(values_ptr, sink, sink_seen, d, PARTS)
            sink_scores = _scores(scaled, sink_keys, sink_seen, PARTS)
            top = tl.maximum(top, tl.max(sink_scores, axis=0))
            sink_weights = tl.exp2(sink_scores - top)
        share, own_weight = tl.exp2(largest - top), tl.exp2(own - top)
        total = tl.sum(share * denominator, axis=0) + own_weight
        if SINK:
            total += tl.sum(sink_weights, axis=0)
        for part in tl.static_range(PARTS):
            out = tl.sum(share[:, None] * mixed[part], axis=0) + own_weight * own_value[part].to(tl.float32)
            if SINK:
                out += tl.sum(sink_weights[:, None] * sink_values[part].to(tl.float32), axis=0)
            tl.store(out_ptr + each * D + part * W + d, (out / total).to(out_ptr.dtype.element_ty))


@jit
def _rotated(first, second, cos, sin, kind):
    """Halves of heads after the rotation, rounded as the cache holds them."""
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


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
    # The weight is on its way before the kernel waits for the query, which the kernel before writes.
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
    rope_keys_ptr, mixed_ptr, largest_ptr, denominator_ptr, scale, eps, query_stride, new_stride, room,
    HEADS: tl.constexpr, BH: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token's heads attend to a part of its sequence's latents, which each program reads once for BH heads.

        latents, rope_keys   [ part 0: some tiles of BN | part 1 | ... ]     program (part, heads, sequence)
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
    chunk = tl.cdiv(tl.cdiv(length, BN), tl.num_programs(0)) * BN  # tokens of a part
    end = tl.minimum(part * chunk + chunk, length)
    first = tl.maximum(part * chunk, start // BN * BN)  # tiles of nothing but padding are not read
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
        # The new token sees itself: the softmax begins with it. It is taken from here and not from the cache, because
        # the programs of other heads do not wait for the one that stores it.
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
    if first < end:  # a part without tokens gives a denominator of 0
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
        part = tl.arange(0, PARTS)
        at = (token.to(tl.int64)[:, None] * parts + part[None, :]) * heads + head  # [BM, PARTS]
        is_part = is_token[:, None] & (part < parts)[None, :]
        share = tl.load(largest_ptr + at, mask=is_part, other=float("-inf"))
        share = tl.exp2(share - tl.maximum(tl.max(share, axis=1), -1e30)[:, None])
        denominator = tl.sum(share * tl.load(denominator_ptr + at, mask=is_part, other=1.0), axis=1)
        denominator = tl.where(is_token, denominator, 1.0)
        mixed = tl.zeros((BM, PADDED_RANK), tl.float32)
        for each in tl.static_range(PARTS):
            of_part = tl.sum(tl.where(part[None, :] == each, share, 0.0), axis=1)
            mixed_ptrs = mixed_ptr + ((token.to(tl.int64) * parts + each) * heads + head)[:, None] * RANK + r[None, :]
            mask = (is_token & (token * 0 + each < parts))[:, None] & (r < RANK)[None, :]
            mixed += of_part[:, None] * tl.load(mixed_ptrs, mask=mask, other=0.0)
        out = tl.dot((mixed / denominator[:, None]).to(up.dtype), tl.trans(up), input_precision="ieee")
    out_ptrs = out_ptr + (token.to(tl.int64)[:, None] * heads + head) * VALUE + v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (v < VALUE)[None, :])


@jit
def _valid(logits_ptrs, inside):
    """Logits in float32, -inf outside, and for NaN, of which argmax may give a column behind the row."""
    x = tl.load(logits_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@jit
def largest_of_parts(logits_ptr, value_ptr, index_ptr, size, stride, BN: tl.constexpr, PARTS: tl.constexpr):
    """The largest of BN logits of a row, and its column: [B, size], rows `stride` apart -> two of [B, PARTS]."""
    part, row = tl.program_id(0), tl.program_id(1)
    column = part * BN + tl.arange(0, BN)
    x = _valid(logits_ptr + row.to(tl.int64) * stride + column, column < size)
    value, index = tl.max(x, axis=0, return_indices=True)
    tl.store(value_ptr + row * PARTS + part, value)
    tl.store(index_ptr + row * PARTS + part, tl.minimum(part * BN + index, size - 1))


@jit
def largest_of_rows(value_ptr, index_ptr, out_ptr, PARTS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """The column of the largest of PARTS values; of equals the first: two of [B, PARTS] -> out [B]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.arange(0, PADDED)
    value = tl.load(value_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    best = tl.minimum(tl.argmax(value, axis=0), PARTS - 1)
    tl.store(out_ptr + row, tl.load(index_ptr + row * PARTS + best).to(tl.int64))


@jit
def sample_rows(
    logits_ptr, seed_ptr, out_ptr, size, stride, factor, top_k, top_p, SIZE: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
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
    x = _valid(logits_ptr + row.to(tl.int64) * stride + column, inside) * factor
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
