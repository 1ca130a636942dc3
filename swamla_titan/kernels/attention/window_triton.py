"""Triton kernels of sliding-window attention with sinks and documents: forward, and backward in two passes.

A tile of BM queries reads tiles of BN keys. The latest keys that it sees are in one interval that ends with the tile
itself (the "near" keys, from `_near` on). Before that interval it sees only sinks, and those of one document, that of
its first query, because a document that begins later lies in the interval as a whole. These few "far" keys are a narrow
tile of their own, so the work per query does not grow with the sequence:

            document                   near       first   last
    keys    [ sinks | . . . . . . . . | BN | BN | BN | BN ]       . not read: no query of the tile sees them
    queries                                      [   BM   ]
              far: FAR keys at a time   near: up to `sinks_end` masked by window and sinks, then by the window alone

Nearly everywhere no sink is near, and `sinks_end` is `near`.

In the backward pass, `window_grad_query` computes the gradients of queries, and writes each tile's contribution to the
gradients of its far keys and values; `window_sum_far` adds these up, in order; `window_grad_key_value` adds the
contributions of near queries. Without atomic additions, so that gradients are deterministic. Heads of 96 are multiplied
as 64 + 32, because Triton's tiles are powers of two; those of 128 in float32 as 64 + 64, because of the registers.
"""

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
from swamla_titan.kernels.triton import jit, tl

SUM_TILES = tl.constexpr(16)  # tiles of queries whose contributions are loaded and summed at a time, in
SUM_ELEMENTS = tl.constexpr(256)  # blocks of so many elements
FAR = tl.constexpr(16)  # far keys at a time: the smallest tile that a tensor core takes


@jit
def _near(first_query, document, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """The first near key, a multiple of STEP, of the tile of queries from `first_query` on.

    `document` is where the first query's document begins.
    """
    return tl.maximum(first_query - WINDOW + 1, document) // STEP * STEP


@jit
def _phases(
    first, last, near, document,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Split the near keys of queries first ... last - 1, in steps of BN.

    Before `sinks_end`, the first result, a key can be a sink that is outside the window of one of these queries; from
    the second result on the window alone decides. A document that begins within the tile of queries has its sinks in
    their window, if the window is at least as wide as the tile.
    """
    sinks_end = tl.minimum(document + SINK, last)
    if WINDOW < BM:
        sinks_end = last
    sinks_end = (sinks_end + BN - 1) // BN * BN
    sinks_end = tl.where((sinks_end > near) & (last - document > WINDOW) & (SINK > 0), sinks_end, near)
    return sinks_end, tl.maximum(sinks_end, _near(first, document, WINDOW, BN))


@jit
def _sees(query, key, start, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """`sees` of kernels/attention/masks.py; SINK 0: without sinks."""
    seen = (query - key).to(tl.uint32) < WINDOW  # one comparison for both ends: negative values wrap to large ones
    if SINK > 0:
        seen = seen | ((key - start < SINK) & (key <= query))
    if DOCUMENTS:
        seen = seen & (key >= start)
    return seen


@jit
def _attend(
    highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2: tl.constexpr
):  # fmt: skip
    """One step of the running softmax (arXiv:2205.14135) over the keys that are `seen` [BM, keys].

    A query that has seen no key yet accumulates garbage, which its first visible key multiplies by zero.
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


@jit
def window_forward(
    k_wide, k_narrow, v_wide, v_narrow, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries of one head. Grid: [tiles of queries, heads, batch].

    k, v    [ far ]     [ BN | BN | BN | BN ]    of the head's group, read in turn, with a running softmax
    q, out                         [   BM   ]    first ... last: read, and written, once
    """
    first = tl.program_id(0) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // GROUP
    query = first + tl.arange(0, BM)
    last = tl.minimum(first + BM, seq_len)
    document = 0  # where the first query's begins
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
            index = sink + tl.arange(0, FAR)
            key = document + index
            seen = (start == document)[:, None] & ((index < SINK) & (key < near))[None, :]
            k1, k2 = load_parts_at(k_ptr, k_token, key, seq_len, D1, D2)
            v1, v2 = load_parts_at(v_ptr, v_token, key, seq_len, D1, D2)
            highest, total, out1, out2 = _attend(
                highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2
            )
    sinks_end, window_from = _phases(first, last, near, document, WINDOW, SINK, BM, BN)
    for begin in range(near, sinks_end, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        highest, total, out1, out2 = _attend(highest, total, out1, out2, q1, q2, k1, k2, v1, v2, seen, scale_log2, D2)
    for begin in range(window_from, last, BN):
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


@jit
def _grad_query(dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2: tl.constexpr):
    """Add the keys' contribution to the queries' gradients; also return weights and gradients of scores."""
    weights = tl.exp2(matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2 - lse_log2[:, None])
    weights = tl.where(seen, weights, 0.0)
    grad = (weights * (matmul_of_parts(do1, do2, v1, v2, D2 > 0) - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    return dq1, dq2, weights.to(k1.dtype), grad


@jit
def window_grad_query(
    k_wide, k_narrow, v_wide, v_narrow,
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, far_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, do_batch, do_token, do_head, dq_batch, dq_token, dq_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head, its delta, and its contributions to far keys' gradients.

        k, v             [ far ]     [ BN | BN | BN | BN ]    of the head's group, read in turn
        q, out, do, dq                          [   BM   ]    first ... last: read, or written, once
        far              [ tile ]                             written where the tile has far keys

    delta [B, H, T] is the sum over a head of out * its gradient; far is [B, H, tiles, 2, SINK, D], 2 for keys and
    values. Grid as in `window_forward`.
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
            index = sink + tl.arange(0, FAR)
            key = document + index
            seen = (start == document)[:, None] & ((index < SINK) & (key < near))[None, :]
            k1, k2 = load_parts_at(k_ptr, k_token, key, seq_len, D1, D2)
            v1, v2 = load_parts_at(v_ptr, v_token, key, seq_len, D1, D2)
            dq1, dq2, weights, grad = _grad_query(
                dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2
            )
            # Written and not added to dk and dv, because other tiles of queries see the same sinks at the same time.
            dk1 = tl.dot(tl.trans(grad), q1, input_precision="ieee") * scale
            dv1 = tl.dot(tl.trans(weights), do1, input_precision="ieee")
            store_part(far_ptr, D1 + D2, index, SINK, dk1, 0, D1)
            store_part(far_ptr + SINK * (D1 + D2), D1 + D2, index, SINK, dv1, 0, D1)
            if D2 > 0:
                dk2 = tl.dot(tl.trans(grad), q2, input_precision="ieee") * scale
                dv2 = tl.dot(tl.trans(weights), do2, input_precision="ieee")
                store_part(far_ptr, D1 + D2, index, SINK, dk2, D1, D2)
                store_part(far_ptr + SINK * (D1 + D2), D1 + D2, index, SINK, dv2, D1, D2)
    sinks_end, window_from = _phases(first, last, near, document, WINDOW, SINK, BM, BN)
    for begin in range(near, sinks_end, BN):
        key = begin + tl.arange(0, BN)
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK, DOCUMENTS)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, group, BN, D1, D2)
        v1, v2 = load_parts(v_wide, v_narrow, batch, begin, group, BN, D1, D2)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k1, k2, v1, v2, seen, scale_log2, D2
        )
    for begin in range(window_from, last, BN):
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


@jit
def _grad_key_value(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_wide, q_narrow, do_wide, do_narrow, lse_ptr, delta_ptr, starts_ptr,
    batch, head, begin, key, seq_len, scale_log2,
    WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add the contribution of queries begin ... begin + BM to gradients of keys and values; SINK 0: no key is a sink.

    Queries from `seq_len` on add nothing, because the gradient of their output is loaded as zeros.
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
    if SINK > 0:  # without queries to which these keys are far: `window_sum_far` sums their contributions
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


@jit
def _has_far(first, newest, seq_len, SINK: tl.constexpr, BN: tl.constexpr):
    """Whether the tile of keys from `first` on may hold sinks that are far keys of some query.

    Such queries come after the tile, in the document of its last key, which begins at `newest`.
    """
    return (newest + SINK > first) & (first + BN < seq_len)


@jit
def window_sum_far(
    far_ptr, sums_ptr, starts_ptr, heads, seq_len, tiles,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum what `far` has for the sinks in one tile of keys: sums [B, key heads, tiles of keys, 2, SINK, D].

        far   [ tile 0 | ... | tile t | tile t+1 | ... ]    of the group's heads, of tiles of queries in the document
                                [__ summed in order __ ]    of the tile's last key
        sums  [ tile of keys ]   <- SUM_ELEMENTS at a time

    Grid as in `window_grad_key_value`; a tile of keys without sinks that are far writes nothing.
    """
    first = tl.program_id(0) * BN
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    newest = 0
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        newest = tl.load(starts_ptr + tl.minimum(first + BN, seq_len) - 1)
    if _has_far(first, newest, seq_len, SINK, BN):
        sums_ptr += ((batch * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)) * 2 * SINK * D
        for begin in range(0, 2 * SINK * D, SUM_ELEMENTS):  # of the gradients of keys, then of values
            element = begin + tl.arange(0, SUM_ELEMENTS)
            total = tl.zeros([SUM_ELEMENTS], tl.float32)
            for member in range(0, GROUP):
                row = (batch * heads + group * GROUP + member) * tiles
                # Tiles of queries that do not come after these keys cannot have them as far keys.
                for first_tile in range((first + BN) // FAR_BM, tiles, SUM_TILES):
                    tile = first_tile + tl.arange(0, SUM_TILES)
                    has_far = (tile < tiles) & (_near(tile * FAR_BM, newest, WINDOW, STEP) > newest)
                    if DOCUMENTS:
                        has_far = has_far & (tl.load(starts_ptr + tile * FAR_BM, mask=tile < tiles, other=-1) == newest)
                    values = far_ptr + ((row + tile) * 2 * SINK * D)[:, None] + element[None, :]
                    mask = has_far[:, None] & (element < 2 * SINK * D)[None, :]
                    total += tl.sum(tl.load(values, mask=mask, other=0.0), 0)
            tl.store(sums_ptr + element, total, mask=element < 2 * SINK * D)


@jit
def _far_sum(sums_ptr, index, SINK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of the sums for the sinks `index`; zeros where that is no sink's."""
    columns = FIRST + tl.arange(0, WIDTH)
    is_sink = ((index >= 0) & (index < SINK))[:, None]
    return tl.load(sums_ptr + index[:, None] * D + columns[None, :], mask=is_sink, other=0.0)


@jit
def window_grad_key_value(
    q_wide, q_narrow, do_wide, do_narrow, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, sums_ptr, starts_ptr,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR_BM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one key head. Grid: [tiles of keys, key heads, batch].

        k, v, dk, dv       [   BN   ]                   first: read, or written, once
        q, do, lse, delta  [ BM | BM | BM | BM ]        of the queries to which the keys are near, of each head of the
        sums               [ tile ]                     group in turn; then the sum over queries to which they are far

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
    end = tl.minimum(seq_len, first + BN + WINDOW - 1)  # of the queries that have these keys in their window
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
        # With sinks among the keys, later queries may see them as near keys, so the mask needs documents and sinks;
        # otherwise the window alone decides.
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
            index = key - newest
            dk1 += _far_sum(sums_ptr, index, SINK, 0, D1, D)
            dv1 += _far_sum(sums_ptr + SINK * D, index, SINK, 0, D1, D)
            if D2 > 0:
                dk2 += _far_sum(sums_ptr, index, SINK, D1, D2, D)
                dv2 += _far_sum(sums_ptr + SINK * D, index, SINK, D1, D2, D)
    dk_ptr += batch * dk_batch + group * dk_head
    dv_ptr += batch * dv_batch + group * dv_head
    store_part(dk_ptr, dk_token, key, seq_len, dk1, 0, D1)
    store_part(dv_ptr, dv_token, key, seq_len, dv1, 0, D1)
    if D2 > 0:
        store_part(dk_ptr, dk_token, key, seq_len, dk2, D1, D2)
        store_part(dv_ptr, dv_token, key, seq_len, dv2, D1, D2)
