"""Triton kernels of sliding-window attention with sinks and documents: forward, and backward in two passes.

Tiles of BM queries meet tiles of BN keys. Of the keys that a tile of queries sees, the newest lie in a stretch that
ends with the tile itself (the "near" ones, from `_near` on); before it there are only the sink keys of one document,
that of the tile's first query, for a document that began later lies in the stretch as a whole. Those few "far" keys are
a narrow tile of their own, so the work per query does not grow with the row.

In the backward pass, queries collect their gradient first; each tile of queries then also leaves what it adds to the
gradients of its far keys, and the tile of keys that holds those sums it up, in order: no atomic additions, so the
gradients are the same in every run. Heads of 96 are multiplied as 64 + 32, since Triton's tiles are powers of two.
"""

import triton
import triton.language as tl

FAR = 16  # far keys at a time, the least that a tensor core's product takes
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Instead of minus infinity, of which the running maximum of a row that has seen nothing yet would make NaN.
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def _tile(base, stride, rows, seq_len, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of rows, zeros where there are none: [len(rows), WIDTH]."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows >= 0) & (rows < seq_len)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(base + offsets, mask=inside[:, None], other=0.0)


@triton.jit
def _put(base, stride, rows, seq_len, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=(rows < seq_len)[:, None])


@triton.jit
def _product(a1, a2, b1, b2, SPLIT: tl.constexpr):
    """a b^T over both parts of the head's width, in float32."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if SPLIT:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def _near(first_query, document, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Where the near keys of the tile that begins with `first_query` begin, a multiple of BN.

    `document` is where the first query's document begins.
    """
    return tl.maximum(first_query - WINDOW + 1, document) // BN * BN


@triton.jit
def _sees(query, key, start, WINDOW: tl.constexpr, SINK: tl.constexpr):
    """The rule of kernels/masks.py."""
    seen = (query - key < WINDOW) | (key - start < SINK)
    return seen & (key <= query) & (key >= start)


@triton.jit
def _attend(
    highest, total, out1, out2, q1, q2, keys, values, key_stride, value_stride, key, query, start, below, seq_len,
    scale_log2,
    WINDOW: tl.constexpr, SINK: tl.constexpr, MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax (arXiv:2205.14135): the keys `key` that are < `below`."""
    k1 = _tile(keys, key_stride, key, seq_len, 0, D1)
    k2 = k1
    if D2 > 0:
        k2 = _tile(keys, key_stride, key, seq_len, D1, D2)
    scores = _product(q1, q2, k1, k2, D2 > 0) * scale_log2
    if MASKED:
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK) & (key < below)[None, :]
        scores = tl.where(seen, scores, NEVER)
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    shrink = tl.exp2(highest - new_highest)
    weights = tl.exp2(scores - new_highest[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    total = total * shrink + tl.sum(weights, 1)
    v1 = _tile(values, value_stride, key, seq_len, 0, D1)
    weights = weights.to(v1.dtype)
    out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision="ieee")
    if D2 > 0:
        v2 = _tile(values, value_stride, key, seq_len, D1, D2)
        out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision="ieee")
    return new_highest, total, out1, out2


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head. Grid: [tiles of queries, heads, batch]."""
    first = tl.program_id(0) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tl.arange(0, BM)
    last = tl.minimum(first + BM, seq_len)
    document, newest = 0, 0  # where the documents of the first and the last query begin
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
        document = tl.load(starts_ptr + first)
        newest = tl.load(starts_ptr + last - 1)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    q1 = _tile(q_ptr, q_token, query, seq_len, 0, D1)
    q2 = q1
    if D2 > 0:
        q2 = _tile(q_ptr, q_token, query, seq_len, D1, D2)
    highest = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out1 = tl.zeros([BM, D1], tl.float32)
    out2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E

    near = _near(first, document, WINDOW, BN)
    if near > document:
        for sink in range(0, SINK, NARROW):
            key = document + sink + tl.arange(0, NARROW)
            highest, total, out1, out2 = _attend(
                highest, total, out1, out2, q1, q2, k_ptr, v_ptr, k_token, v_token, key, query, start, near, seq_len,
                scale_log2, WINDOW, SINK, True, D1, D2,
            )  # fmt: skip
    # Keys that every query of the tile sees need no mask: inside the last one's window, not after the first one.
    clear = (tl.maximum(first + BM - WINDOW, newest) + BN - 1) // BN * BN
    clear = tl.minimum(tl.maximum(clear, near), first)
    for begin in range(near, clear, BN):
        key = begin + tl.arange(0, BN)
        highest, total, out1, out2 = _attend(
            highest, total, out1, out2, q1, q2, k_ptr, v_ptr, k_token, v_token, key, query, start, seq_len, seq_len,
            scale_log2, WINDOW, SINK, True, D1, D2,
        )  # fmt: skip
    for begin in range(clear, first, BN):
        key = begin + tl.arange(0, BN)
        highest, total, out1, out2 = _attend(
            highest, total, out1, out2, q1, q2, k_ptr, v_ptr, k_token, v_token, key, query, start, seq_len, seq_len,
            scale_log2, WINDOW, SINK, False, D1, D2,
        )  # fmt: skip
    for begin in range(first, last, BN):
        key = begin + tl.arange(0, BN)
        highest, total, out1, out2 = _attend(
            highest, total, out1, out2, q1, q2, k_ptr, v_ptr, k_token, v_token, key, query, start, seq_len, seq_len,
            scale_log2, WINDOW, SINK, True, D1, D2,
        )  # fmt: skip

    total = tl.where(query < seq_len, total, 1.0)
    out_ptr += batch * out_batch + head * out_head
    _put(out_ptr, out_token, query, seq_len, out1 / total[:, None], 0, D1)
    if D2 > 0:
        _put(out_ptr, out_token, query, seq_len, out2 / total[:, None], D1, D2)
    lse_ptr += (batch * heads + head) * seq_len
    tl.store(lse_ptr + query, (highest + tl.log2(total)) * LN_2, mask=query < seq_len)


@triton.jit
def _grad_query(
    dq1, dq2, q1, q2, do1, do2, lse_log2, delta, keys, values, key_stride, value_stride, key, query, start, below,
    seq_len, scale_log2,
    WINDOW: tl.constexpr, SINK: tl.constexpr, MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """What the keys `key` < `below` add to the queries' gradients; also the weights and the scores' gradients."""
    k1 = _tile(keys, key_stride, key, seq_len, 0, D1)
    v1 = _tile(values, value_stride, key, seq_len, 0, D1)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = _tile(keys, key_stride, key, seq_len, D1, D2)
        v2 = _tile(values, value_stride, key, seq_len, D1, D2)
    weights = tl.exp2(_product(q1, q2, k1, k2, D2 > 0) * scale_log2 - lse_log2[:, None])
    if MASKED:
        seen = _sees(query[:, None], key[None, :], start[:, None], WINDOW, SINK) & (key < below)[None, :]
        weights = tl.where(seen, weights, 0.0)
    grad = (weights * (_product(do1, do2, v1, v2, D2 > 0) - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    return dq1, dq2, weights.to(k1.dtype), grad


@triton.jit
def grad_query(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, far_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, do_batch, do_token, do_head, dq_batch, dq_token, dq_head,
    heads, seq_len, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries of one head; delta [B, H, T], the sum over a row of out * its gradient; and

    far [B, H, tiles, 2, SINK, D], what the tile adds to the gradients of its far keys and values, where it has any.
    Grid as in `forward`.
    """
    tile = tl.program_id(0)
    first = tile * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tl.arange(0, BM)
    last = tl.minimum(first + BM, seq_len)
    document, newest = 0, 0
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
        start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
        document = tl.load(starts_ptr + first)
        newest = tl.load(starts_ptr + last - 1)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    out_ptr += batch * out_batch + head * out_head
    do_ptr += batch * do_batch + head * do_head
    q1 = _tile(q_ptr, q_token, query, seq_len, 0, D1)
    do1 = _tile(do_ptr, do_token, query, seq_len, 0, D1)
    delta = tl.sum(_tile(out_ptr, out_token, query, seq_len, 0, D1).to(tl.float32) * do1.to(tl.float32), 1)
    q2, do2 = q1, do1
    if D2 > 0:
        q2 = _tile(q_ptr, q_token, query, seq_len, D1, D2)
        do2 = _tile(do_ptr, do_token, query, seq_len, D1, D2)
        delta += tl.sum(_tile(out_ptr, out_token, query, seq_len, D1, D2).to(tl.float32) * do2.to(tl.float32), 1)
    row = (batch * heads + head) * seq_len
    tl.store(delta_ptr + row + query, delta, mask=query < seq_len)
    lse_log2 = tl.load(lse_ptr + row + query, mask=query < seq_len, other=0.0) * LOG2_E
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E

    near = _near(first, document, WINDOW, BN)
    if near > document:
        far_ptr += ((batch * heads + head) * tl.num_programs(0) + tile) * 2 * SINK * (D1 + D2)
        for sink in range(0, SINK, NARROW):
            place = sink + tl.arange(0, NARROW)
            dq1, dq2, weights, grad = _grad_query(
                dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k_ptr, v_ptr, k_token, v_token, document + place, query,
                start, near, seq_len, scale_log2, WINDOW, SINK, True, D1, D2,
            )  # fmt: skip
            dk1 = tl.dot(tl.trans(grad), q1, input_precision="ieee") * scale
            dv1 = tl.dot(tl.trans(weights), do1, input_precision="ieee")
            _put(far_ptr, D1 + D2, place, SINK, dk1, 0, D1)
            _put(far_ptr + SINK * (D1 + D2), D1 + D2, place, SINK, dv1, 0, D1)
            if D2 > 0:
                dk2 = tl.dot(tl.trans(grad), q2, input_precision="ieee") * scale
                dv2 = tl.dot(tl.trans(weights), do2, input_precision="ieee")
                _put(far_ptr, D1 + D2, place, SINK, dk2, D1, D2)
                _put(far_ptr + SINK * (D1 + D2), D1 + D2, place, SINK, dv2, D1, D2)
    clear = (tl.maximum(first + BM - WINDOW, newest) + BN - 1) // BN * BN
    clear = tl.minimum(tl.maximum(clear, near), first)
    for begin in range(near, clear, BN):
        key = begin + tl.arange(0, BN)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k_ptr, v_ptr, k_token, v_token, key, query,
            start, seq_len, seq_len, scale_log2, WINDOW, SINK, True, D1, D2,
        )  # fmt: skip
    for begin in range(clear, first, BN):
        key = begin + tl.arange(0, BN)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k_ptr, v_ptr, k_token, v_token, key, query,
            start, seq_len, seq_len, scale_log2, WINDOW, SINK, False, D1, D2,
        )  # fmt: skip
    for begin in range(first, last, BN):
        key = begin + tl.arange(0, BN)
        dq1, dq2, _w, _g = _grad_query(
            dq1, dq2, q1, q2, do1, do2, lse_log2, delta, k_ptr, v_ptr, k_token, v_token, key, query,
            start, seq_len, seq_len, scale_log2, WINDOW, SINK, True, D1, D2,
        )  # fmt: skip
    dq_ptr += batch * dq_batch + head * dq_head
    _put(dq_ptr, dq_token, query, seq_len, dq1 * scale, 0, D1)
    if D2 > 0:
        _put(dq_ptr, dq_token, query, seq_len, dq2 * scale, D1, D2)


@triton.jit
def _far_sum(far_ptr, place, SINK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(far_ptr + place[:, None] * D + columns[None, :], mask=(place < SINK)[:, None], other=0.0)


@triton.jit
def grad_key_value(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, far_ptr, starts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    do_batch, do_token, do_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    heads, seq_len, tiles, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, DOCUMENTS: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one key head. Grid: [tiles of keys, key heads, batch].

    `tiles` is the number of tiles of queries in a row.
    """
    first = tl.program_id(0) * BN
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = first + tl.arange(0, BN)
    if DOCUMENTS:
        starts_ptr += batch * seq_len
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    k1 = _tile(k_ptr, k_token, key, seq_len, 0, D1)
    v1 = _tile(v_ptr, v_token, key, seq_len, 0, D1)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = _tile(k_ptr, k_token, key, seq_len, D1, D2)
        v2 = _tile(v_ptr, v_token, key, seq_len, D1, D2)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dv1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E
    end = tl.minimum(seq_len, first + BN + WINDOW - 1)  # of the queries to which these keys are near
    for member in range(0, GROUP):
        head = group * GROUP + member
        queries = q_ptr + batch * q_batch + head * q_head
        upstream = do_ptr + batch * do_batch + head * do_head
        row = (batch * heads + head) * seq_len
        for begin in range(first // BM * BM, end, BM):
            query = begin + tl.arange(0, BM)
            start = tl.zeros([BM], tl.int32)
            document = 0
            if DOCUMENTS:
                start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
                document = tl.load(starts_ptr + begin)
            q1 = _tile(queries, q_token, query, seq_len, 0, D1)
            do1 = _tile(upstream, do_token, query, seq_len, 0, D1)
            q2, do2 = q1, do1
            if D2 > 0:
                q2 = _tile(queries, q_token, query, seq_len, D1, D2)
                do2 = _tile(upstream, do_token, query, seq_len, D1, D2)
            lse_log2 = tl.load(lse_ptr + row + query, mask=query < seq_len, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + row + query, mask=query < seq_len, other=0.0)
            weights = tl.exp2(_product(k1, k2, q1, q2, D2 > 0) * scale_log2 - lse_log2[None, :])  # [BN, BM]
            seen = _sees(query[None, :], key[:, None], start[None, :], WINDOW, SINK)
            seen = seen & (query < seq_len)[None, :] & (key >= _near(begin, document, WINDOW, BN))[:, None]
            weights = tl.where(seen, weights, 0.0)
            grad = weights * (_product(v1, v2, do1, do2, D2 > 0) - delta[None, :])
            weights, grad = weights.to(do1.dtype), grad.to(q1.dtype)
            dv1 = tl.dot(weights, do1, dv1, input_precision="ieee")
            dk1 = tl.dot(grad, q1, dk1, input_precision="ieee")
            if D2 > 0:
                dv2 = tl.dot(weights, do2, dv2, input_precision="ieee")
                dk2 = tl.dot(grad, q2, dk2, input_precision="ieee")
    dk1 *= scale
    dk2 *= scale

    # Far queries of these keys belong to the document of the last of them, and follow after this tile.
    document = 0
    if DOCUMENTS:
        document = tl.load(starts_ptr + tl.minimum(first + BN, seq_len) - 1)
    if SINK > 0:  # noqa: SIM102  known when the program is compiled, unlike the rest
        if (document + SINK > first) & (first + BN < seq_len):
            D: tl.constexpr = D1 + D2
            for sink in range(0, SINK, NARROW):
                place = sink + tl.arange(0, NARROW)
                far_k1 = tl.zeros([NARROW, D1], tl.float32)
                far_v1 = tl.zeros([NARROW, D1], tl.float32)
                far_k2 = tl.zeros([NARROW, D2 if D2 > 0 else 16], tl.float32)
                far_v2 = tl.zeros([NARROW, D2 if D2 > 0 else 16], tl.float32)
                for member in range(0, GROUP):
                    row = (batch * heads + group * GROUP + member) * tiles
                    for tile in range((first + BN) // BM, tiles):
                        theirs = 0
                        if DOCUMENTS:
                            theirs = tl.load(starts_ptr + tile * BM)
                        if (theirs == document) & (_near(tile * BM, theirs, WINDOW, BN) > document):
                            left = far_ptr + (row + tile) * 2 * SINK * D
                            far_k1 += _far_sum(left, place, SINK, 0, D1, D)
                            far_v1 += _far_sum(left + SINK * D, place, SINK, 0, D1, D)
                            if D2 > 0:
                                far_k2 += _far_sum(left, place, SINK, D1, D2, D)
                                far_v2 += _far_sum(left + SINK * D, place, SINK, D1, D2, D)
                is_it = (key[:, None] == (document + place)[None, :]).to(tl.float32)  # [BN, NARROW]
                dk1 = tl.dot(is_it, far_k1, dk1, input_precision="ieee")
                dv1 = tl.dot(is_it, far_v1, dv1, input_precision="ieee")
                if D2 > 0:
                    dk2 = tl.dot(is_it, far_k2, dk2, input_precision="ieee")
                    dv2 = tl.dot(is_it, far_v2, dv2, input_precision="ieee")
    dk_ptr += batch * dk_batch + group * dk_head
    dv_ptr += batch * dv_batch + group * dv_head
    _put(dk_ptr, dk_token, key, seq_len, dk1, 0, D1)
    _put(dv_ptr, dv_token, key, seq_len, dv1, 0, D1)
    if D2 > 0:
        _put(dk_ptr, dk_token, key, seq_len, dk2, D1, D2)
        _put(dv_ptr, dv_token, key, seq_len, dv2, D1, D2)
