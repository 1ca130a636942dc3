"""Triton kernels of sliding-window attention with sinks and documents: forward, and backward in two passes.

Tiles of BM queries meet tiles of BN keys. Of the keys that a tile of queries sees, the newest lie in a stretch that
ends with the tile itself (the "near" ones, from `_near` on); before it there are only the sink keys of one document,
that of the tile's first query, for a document that began later lies in the stretch as a whole. Those few "far" keys are
a narrow tile of their own, so the work per query does not grow with the row. Where no sink can be near, which is
nearly everywhere, the near keys are masked by the window alone.

In the backward pass, queries collect their gradient first; each tile of queries then also leaves what it adds to the
gradients of its far keys. `window_sum_far` adds that up, in order, before the keys and values collect their gradients
from the queries near to them: no atomic additions, so the gradients are the same in every run. Heads of 96 are
multiplied as 64 + 32, since Triton's tiles are powers of two; those of 128 in float32 as 64 + 64, for the registers.
"""

import triton
import triton.language as tl

from swamla_titan.kernels.attention.tiles_triton import (
    LN_2,
    LOG2_E,
    NEVER,
    load_part,
    load_parts,
    load_parts_at,
    matmul_of_parts,
    store_part,
)

AT_ONCE = tl.constexpr(16)  # tiles of queries, and
PART = tl.constexpr(256)  # numbers of each, that are read together to be summed
FAR = tl.constexpr(16)  # far keys at a time, the least that a tensor core takes


@triton.jit
def _near(first_query, document, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Where the near keys of the tile that begins with `first_query` begin, a multiple of STEP.

    `document` is where the first query's document begins.
    """
    return tl.maximum(first_query - WINDOW + 1, document) // STEP * STEP


@triton.jit
def _ways(
    first, last, near, document,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`sinks_end`, to where from `near` on a key can be a sink outside the window of one of first ... last - 1, and

    `start`, from where the window alone decides; both in steps of BN. A document that begins inside a tile of queries
    keeps its sinks inside their window, if that is at least as wide.
    """
    sinks_end = tl.minimum(document + SINK, last)
    if WINDOW < BM:
        sinks_end = last
    sinks_end = (sinks_end + BN - 1) // BN * BN
    sinks_end = tl.where((sinks_end > near) & (last - document > WINDOW) & (SINK > 0), sinks_end, near)
    return sinks_end, tl.maximum(sinks_end, _near(first, document, WINDOW, BN))


@triton.jit
def _sees(query, key, start, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The rule of kernels/attention/masks.py, without its sinks where SINK is 0."""
    seen = (query - key).to(tl.uint32) < WINDOW  # one comparison for both ends: what is negative becomes great
    if SINK > 0:
        seen = seen | ((key - start < SINK) & (key <= query))
    if DOCUMENTS:
        seen = seen & (key >= start)
    return seen


@triton.jit
def _attend(
    highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2: tl.constexpr
):  # fmt: skip
    """One step of the running softmax (arXiv:2205.14135), of the keys that are `seen` [BM, rows of k].

    A row that has not seen any key yet collects nonsense, which its first one multiplies by zero.
    """
    scores = tl.where(seen, matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2, NEVER)
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    shrink = tl.exp2(highest - new_highest)
    weights = tl.exp2(scores - new_highest[:, None])
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v1.dtype)
    out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision="ieee")
    if D2 > 0:
        out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision="ieee")
    return new_highest, total, out1, out2


@triton.jit
def window_forward(
    k_wide, k_narrow, v_wide, v_narrow, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head. Grid: [tiles of queries, heads, batch]."""
    first = tl.program_id(0) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // GROUP
    query = first + tl.arange(0, BM)
    last = tl.minimum(first + BM, seq_len)
    document = 0  # where that of the first query begins
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
        document = tl.load(starts_ptr + first)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    q1, q2 = load_parts_at(q_ptr, q_token, query, seq_len, D1, D2)
    highest = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out1 = tl.zeros([BM, D1], tl.float32)
    out2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E

    near = _near(first, document, WINDOW, BN)
    if near > document:
        for sink in range(0, SINK, FAR):
            place = sink + tl.arange(0, FAR)
            key = document + place
            seen = (start == document)[:, None] & ((place < SINK) & (key < near))[None, :]
            k1, k2 = load_parts_at(k_ptr, k_token, key, seq_len, D1, D2)
            v1, v2 = load_parts_at(v_ptr, v_token, key, seq_len, D1, D2)
            highest, total, out1, out2 = _attend(
                highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2
            )
    sinks_end, from_here = _ways(first, last, near, document, WINDOW, SINK, BM, BN)
    for begin in range(near, sinks_end, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        highest, total, out1, out2 = _attend(highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2)
    for begin in range(from_here, last, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, 0, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        highest, total, out1, out2 = _attend(highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2)

    total = tl.where(query < seq_len, total, 1.0)
    out_ptr += batch * out_batch + head * out_head
    store_part(out_ptr, out_token, query, seq_len, out1 / total[:, None], 0, D1)
    if D2 > 0:
        store_part(out_ptr, out_token, query, seq_len, out2 / total[:, None], D1, D2)
    lse_ptr += (batch * heads + head) * seq_len
    tl.store(lse_ptr + query, (highest + tl.log2(total)) * LN_2, mask=query < seq_len)


@triton.jit
def _grad_query(dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2: tl.constexpr):
    """What the keys add to the queries' gradients; also the weights and the scores' gradients."""
    weights = tl.exp2(matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2 - lse_log2[:, None])
    weights = tl.where(seen, weights, 0.0)
    grad = (weights * (matmul_of_parts(do1, do2, v1, v2, D2 > 0) - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    return dq1, dq2, weights.to(k1.dtype), grad


@triton.jit
def window_grad_query(
    k_wide, k_narrow, v_wide, v_narrow,
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, far_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, do_batch, do_token, do_head, dq_batch, dq_token, dq_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries of one head; delta [B, H, T], the sum over a row of out * its gradient; and

    far [B, H, tiles, 2, SINK, D], what the tile adds to the gradients of its far keys and values, where it has any.
    Grid as in `window_forward`.
    """
    tile = tl.program_id(0)
    first = tile * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // GROUP
    query = first + tl.arange(0, BM)
    last = tl.minimum(first + BM, seq_len)
    document = 0
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
        document = tl.load(starts_ptr + first)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    out_ptr += batch * out_batch + head * out_head
    do_ptr += batch * do_batch + head * do_head
    q1 = load_part(q_ptr, q_token, query, seq_len, 0, D1)
    do1 = load_part(do_ptr, do_token, query, seq_len, 0, D1)
    delta = tl.sum(load_part(out_ptr, out_token, query, seq_len, 0, D1).to(tl.float32) * do1.to(tl.float32), 1)
    q2, do2 = q1, do1
    if D2 > 0:
        q2 = load_part(q_ptr, q_token, query, seq_len, D1, D2)
        do2 = load_part(do_ptr, do_token, query, seq_len, D1, D2)
        delta += tl.sum(load_part(out_ptr, out_token, query, seq_len, D1, D2).to(tl.float32) * do2.to(tl.float32), 1)
    row = (batch * heads + head) * seq_len
    tl.store(delta_ptr + row + query, delta, mask=query < seq_len)
    lse_log2 = tl.load(lse_ptr + row + query, mask=query < seq_len, other=0.0) * LOG2_E
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E

    near = _near(first, document, WINDOW, STEP)
    if near > document:
        far_ptr += ((batch * heads + head) * tl.num_programs(0) + tile) * 2 * SINK * (D1 + D2)
        for sink in range(0, SINK, FAR):
            place = sink + tl.arange(0, FAR)
            key = document + place
            seen = (start == document)[:, None] & ((place < SINK) & (key < near))[None, :]
            k1, k2 = load_parts_at(k_ptr, k_token, key, seq_len, D1, D2)
            v1, v2 = load_parts_at(v_ptr, v_token, key, seq_len, D1, D2)
            dq1, dq2, weights, grad = _grad_query(
                dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2
            )
            dk1 = tl.dot(tl.trans(grad), q1, input_precision="ieee") * scale
            dv1 = tl.dot(tl.trans(weights), do1, input_precision="ieee")
            store_part(far_ptr, D1 + D2, place, SINK, dk1, 0, D1)
            store_part(far_ptr + SINK * (D1 + D2), D1 + D2, place, SINK, dv1, 0, D1)
            if D2 > 0:
                dk2 = tl.dot(tl.trans(grad), q2, input_precision="ieee") * scale
                dv2 = tl.dot(tl.trans(weights), do2, input_precision="ieee")
                store_part(far_ptr, D1 + D2, place, SINK, dk2, D1, D2)
                store_part(far_ptr + SINK * (D1 + D2), D1 + D2, place, SINK, dv2, D1, D2)
    sinks_end, from_here = _ways(first, last, near, document, WINDOW, SINK, BM, BN)
    for begin in range(near, sinks_end, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2
        )
    for begin in range(from_here, last, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, 0, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2
        )
    dq_ptr += batch * dq_batch + head * dq_head
    store_part(dq_ptr, dq_token, query, seq_len, dq1 * scale, 0, D1)
    if D2 > 0:
        store_part(dq_ptr, dq_token, query, seq_len, dq2 * scale, D1, D2)


@triton.jit
def _grad_key_value(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_wide, q_narrow, do_wide, do_narrow, lse_ptr, delta_ptr, starts_ptr,
    batch, head, begin, key, seq_len, scale_log2,
    WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What the queries from `begin` on add to the gradients of the keys and values; SINK 0 where no key is a sink.

    Rows behind `seq_len` add nothing, since the gradient of their output is loaded as zeros.
    """
    query = begin + tl.arange(0, BM)
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
    q1, q2 = load_parts(q_wide, q_narrow, batch, begin, head, BM, D1, D2)
    do1, do2 = load_parts(do_wide, do_narrow, batch, begin, head, BM, D1, D2)
    lse_log2 = tl.load(lse_ptr + query, mask=query < seq_len, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + query, mask=query < seq_len, other=0.0)
    seen = _sees(query[None, :], key[:, None], start[None, :], WINDOW, SINK, DOCUMENTS)
    if SINK > 0:  # the far ones are summed elsewhere
        tile = query // FAR_BM * FAR_BM
        document = tl.zeros([BM], tl.int32)
        if DOCUMENTS:
            document = tl.load(starts_ptr + tile, mask=tile < seq_len, other=0)
        seen = seen & (key[:, None] >= _near(tile, document, WINDOW, STEP)[None, :])
    weights = tl.exp2(matmul_of_parts(k1, k2, q1, q2, D2 > 0) * scale_log2 - lse_log2[None, :])  # [BN, BM]
    weights = tl.where(seen, weights, 0.0)
    grad = weights * (matmul_of_parts(v1, v2, do1, do2, D2 > 0) - delta[None, :])
    weights, grad = weights.to(do1.dtype), grad.to(q1.dtype)
    dv1 = tl.dot(weights, do1, dv1, input_precision="ieee")
    dk1 = tl.dot(grad, q1, dk1, input_precision="ieee")
    if D2 > 0:
        dv2 = tl.dot(weights, do2, dv2, input_precision="ieee")
        dk2 = tl.dot(grad, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv1, dv2


@triton.jit
def _has_far(first, newest, seq_len, SINK: tl.constexpr, BN: tl.constexpr):
    """Whether the tile of keys from `first` on may hold sinks for far queries.

    These belong to the document of the last of its keys, which begins at `newest`, and follow after the tile.
    """
    return (newest + SINK > first) & (first + BN < seq_len)


@triton.jit
def window_sum_far(
    far_ptr, sums_ptr, starts_ptr, heads, seq_len, tiles,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """sums [B, key heads, tiles of keys, 2, SINK, D]: what far queries add to the gradients of a tile's sinks.

    Adds up, in order, what `tiles` tiles of queries left in `far`. Grid as in `window_grad_key_value`; a tile of keys
    without sinks for far queries writes nothing.
    """
    first = tl.program_id(0) * BN
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    newest = 0
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        newest = tl.load(starts_ptr + tl.minimum(first + BN, seq_len) - 1)
    if _has_far(first, newest, seq_len, SINK, BN):
        sums_ptr += ((batch * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)) * 2 * SINK * D
        for part in range(0, 2 * SINK * D, PART):  # of the gradients of keys, then of values
            place = part + tl.arange(0, PART)
            total = tl.zeros([PART], tl.float32)
            for member in range(0, GROUP):
                row = (batch * heads + group * GROUP + member) * tiles
                for some in range((first + BN) // FAR_BM, tiles, AT_ONCE):
                    tile = some + tl.arange(0, AT_ONCE)
                    left = (tile < tiles) & (_near(tile * FAR_BM, newest, WINDOW, STEP) > newest)
                    if DOCUMENTS:
                        left = left & (tl.load(starts_ptr + tile * FAR_BM, mask=tile < tiles, other=-1) == newest)
                    values = far_ptr + ((row + tile) * 2 * SINK * D)[:, None] + place[None, :]
                    mask = left[:, None] & (place < 2 * SINK * D)[None, :]
                    total += tl.sum(tl.load(values, mask=mask, other=0.0), 0)
            tl.store(sums_ptr + place, total, mask=place < 2 * SINK * D)


@triton.jit
def _far_sum(sums_ptr, place, SINK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of the sum for each sink `place`, zeros where that is none."""
    columns = FIRST + tl.arange(0, WIDTH)
    sink = ((place >= 0) & (place < SINK))[:, None]
    return tl.load(sums_ptr + place[:, None] * D + columns[None, :], mask=sink, other=0.0)


@triton.jit
def window_grad_key_value(
    q_wide, q_narrow, do_wide, do_narrow, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, sums_ptr, starts_ptr,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one key head. Grid: [tiles of keys, key heads, batch].

    FAR_BM and STEP are BM and STEP of `window_grad_query`, which decide what is near; STEP is a multiple of both
    passes' BN.
    """
    D: tl.constexpr = D1 + D2
    first = tl.program_id(0) * BN
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = first + tl.arange(0, BN)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    k1, k2 = load_parts_at(k_ptr, k_token, key, seq_len, D1, D2)
    v1, v2 = load_parts_at(v_ptr, v_token, key, seq_len, D1, D2)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dv1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E
    end = tl.minimum(seq_len, first + BN + WINDOW - 1)  # of the queries to which these keys are near
    document, newest = 0, 0  # where the documents of the first and of the last of these keys begin
    if DOCUMENTS:
        document = tl.load(starts_ptr + first)
        newest = tl.load(starts_ptr + tl.minimum(first + BN, seq_len) - 1)
    has_sinks = (SINK > 0) & ((document + SINK > first) | (newest > first))
    for member in range(0, GROUP):
        head = group * GROUP + member
        row = (batch * heads + head) * seq_len
        nearest = first // BM * BM
        sinks_end = tl.where(has_sinks, tl.minimum(seq_len, end + FAR_BM + STEP), nearest)
        for begin in range(nearest, sinks_end, BM):
            dk1, dk2, dv1, dv2 = _grad_key_value(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_wide, q_narrow, do_wide, do_narrow, lse_ptr + row,
                delta_ptr + row, starts_ptr, batch, head, begin, key, seq_len, scale_log2, WINDOW, SINK, DOCUMENTS,
                D1, D2, BM, FAR_BM, STEP,
            )  # fmt: skip
        for begin in range(sinks_end, end, BM):
            dk1, dk2, dv1, dv2 = _grad_key_value(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_wide, q_narrow, do_wide, do_narrow, lse_ptr + row,
                delta_ptr + row, starts_ptr, batch, head, begin, key, seq_len, scale_log2, WINDOW, 0, DOCUMENTS,
                D1, D2, BM, FAR_BM, STEP,
            )  # fmt: skip
    dk1 *= scale
    dk2 *= scale

    if SINK > 0:  # noqa: SIM102  known when the program is compiled, unlike the rest
        if _has_far(first, newest, seq_len, SINK, BN):
            sums_ptr += ((batch * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)) * 2 * SINK * D
            place = key - newest
            dk1 += _far_sum(sums_ptr, place, SINK, 0, D1, D)
            dv1 += _far_sum(sums_ptr + SINK * D, place, SINK, 0, D1, D)
            if D2 > 0:
                dk2 += _far_sum(sums_ptr, place, SINK, D1, D2, D)
                dv2 += _far_sum(sums_ptr + SINK * D, place, SINK, D1, D2, D)
    dk_ptr += batch * dk_batch + group * dk_head
    dv_ptr += batch * dv_batch + group * dv_head
    store_part(dk_ptr, dk_token, key, seq_len, dk1, 0, D1)
    store_part(dv_ptr, dv_token, key, seq_len, dv1, 0, D1)
    if D2 > 0:
        store_part(dk_ptr, dk_token, key, seq_len, dk2, D1, D2)
        store_part(dv_ptr, dv_token, key, seq_len, dv2, D1, D2)
