"""Triton kernel of the cross-entropy of one row of logits, and of its gradient in the logits' place."""

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)


@triton.jit
def _numbers(row_ptr, column, real, width):
    """Minus infinity in padding. It is read nevertheless: rows end at a multiple of 16 bytes, vocabularies anywhere."""
    x = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(real, x, -float("inf"))


@triton.jit
def cross_entropy_rows(
    logits_ptr, targets_ptr, scale_ptr, losses_ptr, width, vocab_size, z_loss, label_smoothing,
    SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of logits [N, width], of which the columns from vocab_size on are padding.

    Reads it twice for the gradient, the second time from the cache: some 100 KB that this processor has just read.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    target = tl.load(targets_ptr + row)
    if target == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, width, BLOCK):
                column = first + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], tl.float32).to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + column, zeros, mask=column < width)
        return

    of_target = tl.load(logits_ptr + target).to(tl.float32)  # before any thread may write there

    # A running maximum and sum for each of BLOCK columns apart, put together at the end.
    highest = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < vocab_size
        x = _numbers(logits_ptr, column, real, width)
        above = tl.maximum(highest, x)
        total = total * tl.exp(highest - above) + tl.exp(x - above)
        highest = above
        if SMOOTHED:
            plain += tl.where(real, x, 0.0)
    largest = tl.max(highest, 0)
    partition = largest + tl.log(tl.sum(total * tl.exp(highest - largest), 0))
    scale = tl.load(scale_ptr)
    loss = partition - (1 - label_smoothing) * of_target + z_loss * partition * partition
    if SMOOTHED:
        loss -= label_smoothing * tl.sum(plain, 0) / vocab_size
    tl.store(losses_ptr + row, loss * scale)

    if GRADIENT:
        slope = (1 + 2 * z_loss * partition) * scale
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            real = column < vocab_size
            x = _numbers(logits_ptr, column, real, width)
            grad = tl.exp(x - partition) * slope
            if SMOOTHED:
                grad -= tl.where(real, label_smoothing / vocab_size * scale, 0.0)
            grad -= tl.where(column == target, (1 - label_smoothing) * scale, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < width)
