"""Triton kernels of selective attention (selective.py): what a head selects, attention under that, and the gradients.

Queries come in slabs: `rows` queries from row `row` of their tensors on, which are at `position` of the sequence; the
keys are those of the full sequence. F of a slab is stored once, in [B, room, width], and serves all heads. The gradient
of the logits, summed over heads, has the same shape in float32, and grad_selected replaces it by that of the scores:

             keys 0 ... S            select_keys               a column of tiles, first query first; writes F
           +--------------+          selective_forward         a row of tiles, one head, as in any attention
    slab   | F, in tiles  | queries  selective_grad_query      a row of tiles, one head
           | of BM x BN   | in order selective_grad_key_value  a column of tiles, one head
           +--------------+          selection_grad            one tile, all heads; writes the gradient's sum
                                     grad_selected             a column of tiles, last query first; replaces it
                                     grad_selecting            a row of tiles

As in document.py nothing is added atomically, so gradients are the same in every run; a head of 192 is
multiplied as 128 + 64; tiles that no query sees are neither computed nor read, because F holds no values there.
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

MOST = tl.constexpr(60000.0)  # F is stored in 16 bits: far less makes a weight 0


@jit
def _load_tile(base, batch, local, key, rows, room, width, seq_len):
    """Tile [len(local), len(key)] of [B, room, width], of which [B, rows, seq_len] is used, in float32."""
    offsets = (batch * room + local)[:, None] * width + key[None, :]
    return tl.load(base + offsets, mask=(local < rows)[:, None] & (key < seq_len)[None, :], other=0.0).to(tl.float32)


@jit
def _store_tile(base, tile, batch, local, key, rows, room, width, seq_len):
    offsets = (batch * room + local)[:, None] * width + key[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=(local < rows)[:, None] & (key < seq_len)[None, :])


@jit
def _column(starts_ptr, ends_ptr, first, position, rows, seq_len, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile of keys: the keys, whether each may be selected (all but the first of a document), where its document
    ends; and the rows of the slab, from the beginning of a tile on, that see any of the keys."""
    key = first + tl.arange(0, BN)
    inside = key < seq_len
    selectable = (tl.load(starts_ptr + key, mask=inside, other=seq_len) < key) & inside
    end = tl.load(ends_ptr + key, mask=inside, other=0)
    begin = tl.maximum(first - position, 0) // BM * BM
    stop = tl.minimum(rows, tl.load(ends_ptr + tl.minimum(first + BN, seq_len) - 1) - position)
    return key, selectable, end, begin, stop


@jit
def _row(starts_ptr, first, position, rows, BM: tl.constexpr):
    """Of a tile of queries: their rows in the slab and indices in the sequence; where each one's document begins, and
    that of the first and of the last query; and the end of the keys that they see."""
    local = first + tl.arange(0, BM)
    last = position + tl.minimum(first + BM, rows)
    start = tl.load(starts_ptr + position + local, mask=local < rows, other=0)
    return local, position + local, start, tl.load(starts_ptr + position + first), tl.load(starts_ptr + last - 1), last


@jit
def select_keys(
    q_ptr, k_ptr, starts_ptr, ends_ptr, before_ptr, after_ptr, f_ptr,
    q_batch, q_token, k_batch, k_token, starts_batch, row, position, rows, room, width, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """F of a slab for a tile of keys, and the sums [B, S] of what was selected before and after it.

    From the selecting head's q and k. Grid: [tiles of keys, batch].

                     first
        k, before    [ BN ]     read once
        q, begin     [ BM x BN ]   F: the sum so far, and what earlier queries of the tile select
           ...       [ BM x BN ]   each tile adds what its queries select to the sum so far
        q, stop      [ BM x BN ]
        after        [ BN ]     written once
    """
    first = tl.program_id(0) * BN
    batch = tl.program_id(1).to(tl.int64)
    starts_ptr += batch * starts_batch
    ends_ptr += batch * starts_batch
    key, selectable, end, begin, stop = _column(starts_ptr, ends_ptr, first, position, rows, seq_len, BM, BN)
    k1, k2 = load_parts_at(k_ptr + batch * k_batch, k_token, key, seq_len, D1, D2)
    total = tl.load(before_ptr + batch * seq_len + key, mask=key < seq_len, other=0.0)
    for at in range(begin, stop, BM):
        local = at + tl.arange(0, BM)
        query = position + local
        q1, q2 = load_parts_at(q_ptr + batch * q_batch, q_token, row + local, row + rows, D1, D2)
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale
        may = selectable[None, :] & (key[None, :] < query[:, None]) & (query[:, None] < end[None, :])
        selected = tl.where(may & (local < rows)[:, None], tl.maximum(scores, 0.0), 0.0)
        if STORED:
            f = total[None, :] + (tl.cumsum(selected, 0) - selected)  # a query is not masked by itself
            _store_tile(f_ptr, tl.minimum(f, MOST), batch, local, key, rows, room, width, seq_len)
        total += tl.sum(selected, 0)
    tl.store(after_ptr + batch * seq_len + key, total, mask=key < seq_len)


@jit
def selective_forward(
    k_wide, k_narrow, v_wide, f_tiles, q_ptr, out_ptr, lse_ptr, starts_ptr,
    q_batch, q_token, q_head, out_batch, out_token, out_head,
    starts_batch, row, position, rows, room, width, queries, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of queries of one head. Grid: [tiles of queries, heads, batch], most keys first.

              document                        last
    k, v, F   [ BN | BN | BN | BN | BN | BN ]         read in turn, with a running softmax; of F the tile's BM rows
    q, out    .                    [   BM   ]         first ...: read and written once
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    local, query, start, document, newest, last = _row(starts_ptr + batch * starts_batch, first, position, rows, BM)
    q1, q2 = load_parts_at(q_ptr + batch * q_batch + head * q_head, q_token, row + local, row + rows, D1, D2)
    highest = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DV], tl.float32)
    scale_log2 = scale * LOG2_E
    for begin in range(document // BN * BN, last, BN):
        key = begin + tl.arange(0, BN)
        f = f_tiles.load([batch.to(tl.int32), first, begin]).reshape(BM, BN).to(tl.float32)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, head, BN, D1, D2)
        v = v_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BN, DV)
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2 - f * LOG2_E
        if (begin + BN - 1 > position + first) | (begin < newest):
            scores = tl.where((key[None, :] <= query[:, None]) & (key[None, :] >= start[:, None]), scores, NEVER)
        # Running softmax (arXiv:2205.14135): rescale the sums where the maximum has grown.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        highest = new_highest
    total = tl.where(local < rows, total, 1.0)
    out_ptr += batch * out_batch + head * out_head
    store_part(out_ptr, out_token, row + local, row + rows, out / total[:, None], 0, DV)
    lse = (highest + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (batch * heads + head) * queries + row + local, lse, mask=local < rows)


@jit
def selective_grad_query(
    k_wide, k_narrow, v_wide, f_tiles, q_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, starts_ptr,
    q_batch, q_token, q_head, out_batch, out_token, out_head, do_batch, do_token, do_head,
    dq_batch, dq_token, dq_head, starts_batch, row, position, rows, room, width, queries, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and delta [B, H, Q], the sum over a row of out * its gradient. Grid as above.

              document                        last
    k, v, F   [ BN | BN | BN | BN | BN | BN ]         read in turn
    q, out, do, dq                 [   BM   ]         first ...: read, and dq and delta written, once
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    local, query, start, document, newest, last = _row(starts_ptr + batch * starts_batch, first, position, rows, BM)
    q1, q2 = load_parts_at(q_ptr + batch * q_batch + head * q_head, q_token, row + local, row + rows, D1, D2)
    do = load_part(do_ptr + batch * do_batch + head * do_head, do_token, row + local, row + rows, 0, DV)
    out = load_part(out_ptr + batch * out_batch + head * out_head, out_token, row + local, row + rows, 0, DV)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    at = (batch * heads + head) * queries + row + local
    tl.store(delta_ptr + at, delta, mask=local < rows)
    lse_log2 = tl.load(lse_ptr + at, mask=local < rows, other=0.0) * LOG2_E
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E
    for begin in range(document // BN * BN, last, BN):
        # The weights are recomputed from the scores and lse, because the forward pass does not store them.
        key = begin + tl.arange(0, BN)
        f = f_tiles.load([batch.to(tl.int32), first, begin]).reshape(BM, BN).to(tl.float32)
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, head, BN, D1, D2)
        v = v_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BN, DV)
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2 - f * LOG2_E
        if (begin + BN - 1 > position + first) | (begin < newest):
            scores = tl.where((key[None, :] <= query[:, None]) & (key[None, :] >= start[:, None]), scores, NEVER)
        weights = tl.exp2(scores - lse_log2[:, None])
        of_weights = tl.dot(do, tl.trans(v), input_precision="ieee")
        grad = (weights * (of_weights - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    dq_ptr += batch * dq_batch + head * dq_head
    store_part(dq_ptr, dq_token, row + local, row + rows, dq1 * scale, 0, D1)
    if D2 > 0:
        store_part(dq_ptr, dq_token, row + local, row + rows, dq2 * scale, D1, D2)


@jit
def _add_part(base, stride, rows, seq_len, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, ADDED: tl.constexpr):
    """store_part, ADDED to what is there."""
    if ADDED:
        tile += load_part(base, stride, rows, seq_len, FIRST, WIDTH).to(tl.float32)
    store_part(base, stride, rows, seq_len, tile, FIRST, WIDTH)


@jit
def selective_grad_key_value(
    q_wide, q_narrow, do_wide, f_tiles, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    starts_batch, row, position, rows, room, width, queries, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from a slab's queries, ADDED to those of other slabs.

    Grid: [tiles of keys, heads, batch]; the first have the most queries.

                           begin             stop
    q, do, lse, delta, F     [ BM | BM | BM | BM ]      read in turn; of F the tile's BN columns
    k, v, dk, dv           [ BN ]                       first ...: read and written once
    """
    first = tl.program_id(0) * BN
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    starts_ptr += batch * starts_batch
    ends_ptr += batch * starts_batch
    key, _, _, begin, stop = _column(starts_ptr, ends_ptr, first, position, rows, seq_len, BM, BN)
    k1, k2 = load_parts_at(k_ptr + batch * k_batch + head * k_head, k_token, key, seq_len, D1, D2)
    v = load_part(v_ptr + batch * v_batch + head * v_head, v_token, key, seq_len, 0, DV)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, DV], tl.float32)
    at_row = (batch * heads + head) * queries + row
    scale_log2 = scale * LOG2_E
    for at in range(begin, stop, BM):
        local = at + tl.arange(0, BM)
        f = f_tiles.load([batch.to(tl.int32), at, first]).reshape(BM, BN).to(tl.float32)
        q1, q2 = load_parts(q_wide, q_narrow, batch, row + at, head, BM, D1, D2)
        do = do_wide.load([batch.to(tl.int32), row + at, head, 0]).reshape(BM, DV)
        lse_log2 = tl.load(lse_ptr + at_row + local, mask=local < rows, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + at_row + local, mask=local < rows, other=0.0)
        scores = matmul_of_parts(k1, k2, q1, q2, D2 > 0) * scale_log2 - tl.trans(f) * LOG2_E  # [BN, BM]
        newest = tl.load(starts_ptr + position + tl.minimum(at + BM, rows) - 1)
        if (first + BN - 1 > position + at) | (first < newest) | (at + BM > rows):
            query = position + local
            start = tl.load(starts_ptr + query, mask=local < rows, other=seq_len)  # rows behind the slab see nothing
            scores = tl.where((key[:, None] <= query[None, :]) & (key[:, None] >= start[None, :]), scores, NEVER)
        weights = tl.exp2(scores - lse_log2[None, :])
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        of_weights = tl.dot(v, tl.trans(do), input_precision="ieee")
        grad = (weights * (of_weights - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(grad, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(grad, q2, dk2, input_precision="ieee")
    dk_ptr += batch * dk_batch + head * dk_head
    _add_part(dk_ptr, dk_token, key, seq_len, dk1 * scale, 0, D1, ADDED)
    if D2 > 0:
        _add_part(dk_ptr, dk_token, key, seq_len, dk2 * scale, D1, D2, ADDED)
    _add_part(dv_ptr + batch * dv_batch + head * dv_head, dv_token, key, seq_len, dv, 0, DV, ADDED)


@jit
def selection_grad(
    q_wide, q_narrow, do_wide, k_wide, k_narrow, v_wide, f_ptr, grad_ptr, lse_ptr, delta_ptr, starts_ptr,
    starts_batch, row, position, rows, room, width, queries, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum over heads of the gradients of a tile's logits, into [B, rows, S] float32: minus the gradient of F.

    Grid: [tiles of keys, tiles of queries, batch]. Pairs that do not see each other get any value.

                     begin
           k, v, F   [ BN ]     read for each head in turn, F once
    first  q, do  [ BM x BN ]   written once, after the last head
    """
    begin, first = tl.program_id(0) * BN, (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    batch = tl.program_id(2).to(tl.int64)
    starts_ptr += batch * starts_batch
    last = position + tl.minimum(first + BM, rows)
    if (begin < last) & (begin + BN > tl.load(starts_ptr + position + first)):
        local, key = first + tl.arange(0, BM), begin + tl.arange(0, BN)
        f = _load_tile(f_ptr, batch, local, key, rows, room, width, seq_len) * LOG2_E
        total = tl.zeros([BM, BN], tl.float32)
        scale_log2 = scale * LOG2_E
        # One head after another, because a sum of several programs would depend on their order.
        for head in range(0, heads):
            q1, q2 = load_parts(q_wide, q_narrow, batch, row + first, head, BM, D1, D2)
            k1, k2 = load_parts(k_wide, k_narrow, batch, begin, head, BN, D1, D2)
            do = do_wide.load([batch.to(tl.int32), row + first, head, 0]).reshape(BM, DV)
            v = v_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BN, DV)
            at = (batch * heads + head) * queries + row + local
            lse_log2 = tl.load(lse_ptr + at, mask=local < rows, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + at, mask=local < rows, other=0.0)
            scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2
            weights = tl.exp2(scores - f - lse_log2[:, None])
            total += weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        _store_tile(grad_ptr, total, batch, local, key, rows, room, width, seq_len)


@jit
def grad_selected(
    q_ptr, k_ptr, starts_ptr, ends_ptr, grad_ptr, after_ptr, before_ptr, dk_ptr,
    q_batch, q_token, k_batch, k_token, starts_batch, row, position, rows, room, width, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OF_F: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Gradients of the selecting head's scores, in the place of `selection_grad`'s, and of a tile of its keys.

    `after` [B, S] is the gradient of the sums behind the slab, and `before` becomes that of those before it. OF_F: F
    has a gradient as well. The keys' gradients [B, S, D] are float32. Grid: [tiles of keys, batch].

                     first
        before, dk   [ BN ]     written once
        q, begin     [ BM x BN ]   the gradient of the scores takes the place of that of the logits
           ...       [ BM x BN ]   last queries first, because a query's selection masks for all later ones
        q, stop      [ BM x BN ]
        k, after     [ BN ]     read once
    """
    first = tl.program_id(0) * BN
    batch = tl.program_id(1).to(tl.int64)
    starts_ptr += batch * starts_batch
    ends_ptr += batch * starts_batch
    key, selectable, end, begin, stop = _column(starts_ptr, ends_ptr, first, position, rows, seq_len, BM, BN)
    k1, k2 = load_parts_at(k_ptr + batch * k_batch, k_token, key, seq_len, D1, D2)
    later = tl.load(after_ptr + batch * seq_len + key, mask=key < seq_len, other=0.0)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    tiles = tl.maximum(tl.cdiv(stop - begin, BM), 0)
    for number in range(0, tiles):
        at = begin + (tiles - 1 - number) * BM
        local = at + tl.arange(0, BM)
        query = position + local
        q1, q2 = load_parts_at(q_ptr + batch * q_batch, q_token, row + local, row + rows, D1, D2)
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0)
        within = (query[:, None] < end[None, :]) & (local < rows)[:, None]
        grad = tl.broadcast_to(later[None, :], (BM, BN))
        if OF_F:
            logits = _load_tile(grad_ptr, batch, local, key, rows, room, width, seq_len)
            logits = tl.where(within & (key[None, :] <= query[:, None]), logits, 0.0)
            total = tl.sum(logits, 0)
            grad -= total[None, :] - tl.cumsum(logits, 0)  # minus those of later queries of the tile
            later -= total
        may = within & selectable[None, :] & (key[None, :] < query[:, None])
        grad = tl.where(may & (scores > 0), grad, 0.0)
        _store_tile(grad_ptr, grad, batch, local, key, rows, room, width, seq_len)
        rounded = tl.trans(grad).to(q1.dtype)
        dk1 = tl.dot(rounded, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(rounded, q2, dk2, input_precision="ieee")
    tl.store(before_ptr + batch * seq_len + key, later, mask=key < seq_len)
    dk_ptr += batch * seq_len * (D1 + D2)
    _add_part(dk_ptr, D1 + D2, key, seq_len, dk1 * scale, 0, D1, ADDED)
    if D2 > 0:
        _add_part(dk_ptr, D1 + D2, key, seq_len, dk2 * scale, D1, D2, ADDED)


@jit
def grad_selecting(
    k_ptr, starts_ptr, grad_ptr, dq_ptr, k_batch, k_token,
    starts_batch, row, position, rows, room, width, queries, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the selecting head's queries, [B, Q, D] in float32. Grid: [tiles of queries, batch].

              document                        last
    k, grad   [ BN | BN | BN | BN | BN | BN ]         read in turn; grad_selected wrote the tile's BM rows of it
    dq        .                    [   BM   ]         first ...: written once
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    batch = tl.program_id(1).to(tl.int64)
    local, query, start, document, _, last = _row(starts_ptr + batch * starts_batch, first, position, rows, BM)
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    # From the beginning of the first query's document on, because no query of the tile selects a key before that.
    for begin in range(document // BN * BN, last, BN):
        key = begin + tl.arange(0, BN)
        k1, k2 = load_parts_at(k_ptr + batch * k_batch, k_token, key, seq_len, D1, D2)
        grad = _load_tile(grad_ptr, batch, local, key, rows, room, width, seq_len)
        # Rounded as grad_selected rounds it for the keys' gradients.
        grad = tl.where((key[None, :] < query[:, None]) & (key[None, :] > start[:, None]), grad, 0.0).to(k1.dtype)
        dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    dq_ptr += batch * queries * (D1 + D2)
    store_part(dq_ptr, D1 + D2, row + local, row + rows, dq1 * scale, 0, D1)
    if D2 > 0:
        store_part(dq_ptr, D1 + D2, row + local, row + rows, dq2 * scale, D1, D2)
