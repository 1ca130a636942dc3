"""Causal attention within documents as one operator of Triton kernels (CUDA): for MLA with a document mask.

torch.compile keeps the operator in its graph as it is. Keys and values may have different widths. As in
window_triton.py, the backward pass computes gradients of queries first, then those of keys and values, without atomic
additions, so that output and gradients are deterministic; a head of 192 is multiplied as 128 + 64. Tiles that no query
of the program sees are skipped, and tiles whose queries see all keys are not masked:

                keys of document 1      keys of document 2
    queries   [  #    #    m    .    |    .    .    .    ]      # visible, not masked
    queries   [  #    #    #    m    |    m    .    .    ]      m masked: on the diagonal, or queries of two documents
    queries   [  .    .    .    .    |    #    m    .    ]      . skipped
"""

from typing import Any

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention.masks import attention_flops, causal_pairs
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
from swamla_titan.kernels.device import (
    Limit,
    SplitWidth,
    Tiles,
    dtype_name,
    strides,
    tma_descriptors_of_two,
    tma_readable,
    why_no_kernels,
)
from swamla_titan.kernels.limits import DOCUMENT_V_WIDTHS, DOCUMENT_WIDTHS
from swamla_titan.kernels.operator import differentiate
from swamla_titan.kernels.triton import jit, tl

TIMED_WIDTHS = (192, 128)  # of queries and keys, and of values, at which it was timed (documents of 500 tokens)

# The fastest on an H100 of those that benchmarks/attention_tiles.py tries, at head widths of 192 and 128.
FORWARD = Tiles(128, 32, 8, 3)
BACKWARD = Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 3)  # of queries, and of keys and values


def why_not_document_kernel(device: torch.device, dtype: torch.dtype, width: int, v_width: int) -> Limit | None:
    """Why `document_attention` cannot take heads of these widths in this dtype on this device, or None."""
    if why := why_no_kernels(device):
        return why
    fits = width in DOCUMENT_WIDTHS and v_width in DOCUMENT_V_WIDTHS and dtype in (torch.bfloat16, torch.float16)
    return None if fits else Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")


def document_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key^T) value over the keys of the query's document up to the query itself.

    query and key [B, T, H, D] with D one of DOCUMENT_WIDTHS, value [B, T, H, E] with E one of DOCUMENT_V_WIDTHS, in 16
    bits, elements adjacent in memory, heads at addresses that are multiples of 16 bytes -> [B, T, H, E], contiguous.
    starts and ends [B, T] int32, contiguous: the index of the first token of each token's document, and that after its
    last.
    """
    out: Tensor = _forward(query, key, value, starts, ends, scale)[0]
    return out


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, E] and lse [B, H, T], the logarithm of each softmax's denominator, in float32."""
    batch, length, heads, width = query.shape
    # The kernels would read out of bounds otherwise.
    assert key.shape == query.shape
    assert value.shape[:3] == query.shape[:3]
    for bounds in (starts, ends):
        assert bounds.shape == (batch, length)
        assert bounds.is_contiguous()
        assert bounds.dtype == torch.int32
    key, value = tma_readable(key), tma_readable(value)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tiles, split, v_width = FORWARD, SplitWidth.of(width), value.shape[-1]
    with torch.cuda.device_of(query):  # Triton launches on the current one
        document_forward[(-(-length // tiles.queries), heads, batch)](
            *(*tma_descriptors_of_two(key, value, tiles.keys), query, out, lse, starts),
            *(*strides(query, out), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **tiles.constants(),
        )
    return out, lse


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    grad_out, query, key, value = (tma_readable(each) for each in (grad_out, query, key, value))
    batch, length, heads, width = query.shape
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    query_tiles, key_tiles = BACKWARD
    split, v_width = SplitWidth.of(width), value.shape[-1]
    with torch.cuda.device_of(query):
        document_grad_query[(-(-length // query_tiles.queries), heads, batch)](
            *tma_descriptors_of_two(key, value, query_tiles.keys),
            *(query, out, grad_out, grad_query, lse, delta, starts),
            *(*strides(query, out, grad_out, grad_query), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **query_tiles.constants(),
        )
        document_grad_key_value[(-(-length // key_tiles.keys), heads, batch)](
            *tma_descriptors_of_two(query, grad_out, key_tiles.queries),
            *(key, value, grad_key, grad_value, lse, delta, starts, ends),
            *(*strides(key, value, grad_key, grad_value), heads, length, scale),
            **split._asdict(),
            DV=v_width,
            **key_tiles.constants(),
        )
    return grad_query, grad_key, grad_value


_forward = torch.library.custom_op("swamla_titan::document_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("swamla_titan::document_attention_backward", run_backward, mutates_args=())


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(value.shape), query.new_empty(batch, heads, length, dtype=torch.float32)


def _flops(query: Size, value: Size, **_: Any) -> int:
    return attention_flops(query, value[3], causal_pairs(query[1]))


differentiate(_forward, _backward, ("out", "lse"), _flops)


@jit
def _masked(scores, query, key, start):
    """The scores of queries (rows) and keys (columns), NEVER where the key is later or in another document."""
    return tl.where((key <= query) & (key >= start), scores, NEVER)


@jit
def _documents(starts_ptr, query, first, last, seq_len):
    """Where documents begin: those of all queries of a tile, of its first query, and of its last, `last` - 1."""
    start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
    return start, tl.load(starts_ptr + first), tl.load(starts_ptr + last - 1)


@jit
def document_forward(
    k_wide, k_narrow, v_wide, q_ptr, out_ptr, lse_ptr, starts_ptr,
    q_batch, q_token, q_head, out_batch, out_token, out_head, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries of one head. Grid: [tiles of queries, heads, batch], most keys first.

              document                        last
    k, v      [ BN | BN | BN | BN | BN | BN ]         read in turn, with a running softmax
    q, out    .                    [   BM   ]         first ... last: read and written once
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, last = first + tl.arange(0, BM), tl.minimum(first + BM, seq_len)
    start, document, newest = _documents(starts_ptr + batch * seq_len, query, first, last, seq_len)
    q1, q2 = load_parts_at(q_ptr + batch * q_batch + head * q_head, q_token, query, seq_len, D1, D2)
    highest = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DV], tl.float32)
    scale_log2 = scale * LOG2_E
    for begin in range(document // BN * BN, last, BN):
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, head, BN, D1, D2)
        v = v_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BN, DV)
        # Scaled before they are masked, because the compiler fuses NEVER * scale - NEVER * scale into one operation
        # that rounds once and is not 0, for queries whose document begins after the first tiles.
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0) * scale_log2
        if (begin + BN - 1 > first) | (begin < newest):
            key = begin + tl.arange(0, BN)
            scores = _masked(scores, query[:, None], key[None, :], start[:, None])
        # Running softmax (arXiv:2205.14135): rescale the sums where the maximum has grown.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        highest = new_highest
    total = tl.where(query < seq_len, total, 1.0)
    store_part(out_ptr + batch * out_batch + head * out_head, out_token, query, seq_len, out / total[:, None], 0, DV)
    lse = (highest + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (batch * heads + head) * seq_len + query, lse, mask=query < seq_len)


@jit
def document_grad_query(
    k_wide, k_narrow, v_wide, q_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, starts_ptr,
    q_batch, q_token, q_head, out_batch, out_token, out_head, do_batch, do_token, do_head,
    dq_batch, dq_token, dq_head, heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and its delta [B, H, T], the sum over a head of out * its gradient.

                  document                        last
        k, v      [ BN | BN | BN | BN | BN | BN ]         read in turn
        q, out, do, dq  .              [   BM   ]         read, or written, once

    Grid as in `document_forward`.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, last = first + tl.arange(0, BM), tl.minimum(first + BM, seq_len)
    start, document, newest = _documents(starts_ptr + batch * seq_len, query, first, last, seq_len)
    q1, q2 = load_parts_at(q_ptr + batch * q_batch + head * q_head, q_token, query, seq_len, D1, D2)
    do = load_part(do_ptr + batch * do_batch + head * do_head, do_token, query, seq_len, 0, DV)
    out = load_part(out_ptr + batch * out_batch + head * out_head, out_token, query, seq_len, 0, DV)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    row = (batch * heads + head) * seq_len
    tl.store(delta_ptr + row + query, delta, mask=query < seq_len)
    lse_log2 = tl.load(lse_ptr + row + query, mask=query < seq_len, other=0.0) * LOG2_E
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
    scale_log2 = scale * LOG2_E
    for begin in range(document // BN * BN, last, BN):
        # The weights are recomputed from the scores and lse, because the forward pass does not store them.
        k1, k2 = load_parts(k_wide, k_narrow, batch, begin, head, BN, D1, D2)
        v = v_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BN, DV)
        scores = matmul_of_parts(q1, q2, k1, k2, D2 > 0)
        if (begin + BN - 1 > first) | (begin < newest):
            key = begin + tl.arange(0, BN)
            scores = _masked(scores, query[:, None], key[None, :], start[:, None])
        weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        grad_weights = tl.dot(do, tl.trans(v), input_precision="ieee")
        grad = (weights * (grad_weights - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(grad, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(grad, k2, dq2, input_precision="ieee")
    dq_ptr += batch * dq_batch + head * dq_head
    store_part(dq_ptr, dq_token, query, seq_len, dq1 * scale, 0, D1)
    if D2 > 0:
        store_part(dq_ptr, dq_token, query, seq_len, dq2 * scale, D1, D2)


@jit
def document_grad_key_value(
    q_wide, q_narrow, do_wide, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    heads, seq_len, scale,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values. Grid: [tiles of keys, heads, batch]; the first have the most queries.

                  first                               end of the last key's document
        k, v, dk, dv  [   BN   ]                      .   read, or written, once
        q, do, lse, delta  [ BM | BM | BM | BM | BM | BM ]    read in turn

    Queries from `seq_len` on add nothing, because the gradient of their output is loaded as zeros.
    """
    first = tl.program_id(0) * BN
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = first + tl.arange(0, BN)
    starts_ptr += batch * seq_len
    end = tl.load(ends_ptr + batch * seq_len + tl.minimum(first + BN, seq_len) - 1)  # of the last key's document
    k1, k2 = load_parts_at(k_ptr + batch * k_batch + head * k_head, k_token, key, seq_len, D1, D2)
    v = load_part(v_ptr + batch * v_batch + head * v_head, v_token, key, seq_len, 0, DV)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, DV], tl.float32)
    row = (batch * heads + head) * seq_len
    scale_log2 = scale * LOG2_E
    for begin in range(first // BM * BM, end, BM):
        # Scores are transposed, [BN, BM], so that weights and their gradients are the left operands of the matmuls
        # below.
        query = begin + tl.arange(0, BM)
        q1, q2 = load_parts(q_wide, q_narrow, batch, begin, head, BM, D1, D2)
        do = do_wide.load([batch.to(tl.int32), begin, head, 0]).reshape(BM, DV)
        lse_log2 = tl.load(lse_ptr + row + query, mask=query < seq_len, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + row + query, mask=query < seq_len, other=0.0)
        scores = matmul_of_parts(k1, k2, q1, q2, D2 > 0)  # [BN, BM]
        newest = tl.load(starts_ptr + tl.minimum(begin + BM, seq_len) - 1)
        if (first + BN - 1 > begin) | (first < newest):
            start = tl.load(starts_ptr + query, mask=query < seq_len, other=0)
            scores = _masked(scores, query[None, :], key[:, None], start[None, :])
        weights = tl.exp2(scores * scale_log2 - lse_log2[None, :])
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(do), input_precision="ieee")
        grad = (weights * (grad_weights - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(grad, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(grad, q2, dk2, input_precision="ieee")
    dk_ptr += batch * dk_batch + head * dk_head
    store_part(dk_ptr, dk_token, key, seq_len, dk1 * scale, 0, D1)
    if D2 > 0:
        store_part(dk_ptr, dk_token, key, seq_len, dk2 * scale, D1, D2)
    store_part(dv_ptr + batch * dv_batch + head * dv_head, dv_token, key, seq_len, dv, 0, DV)
