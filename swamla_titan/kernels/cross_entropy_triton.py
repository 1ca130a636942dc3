"""Triton kernel of the cross-entropy of one row of logits, whose gradient overwrites the logits."""

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)


@triton.jit
def _load_logits(row_ptr, column, real, width):
    """Logits in float32, minus infinity in padding, which is loaded too so that loads are 16 bytes and aligned."""
    x = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(real, x, -float("inf"))


@triton.jit
def cross_entropy_rows(
    logits_ptr, targets_ptr, scale_ptr, losses_ptr, width, vocab_size, z_loss, label_smoothing,
    SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, and with GRADIENT the gradient, of one row of logits [N, width]; columns from vocab_size on are padding.

                        0      BLOCK   ...       vocab_size   width
        program 0  row [ ..... | ..... | ..... | ..... : padding ]   pass 1: maximum and sum -> losses [row]
        program 1  row [ ..... | ..... | ..... | ..... : padding ]   pass 2: gradient -> the same row of logits

    The second pass reads from the cache: the row is some 100 KB that this multiprocessor has just read.
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

    target_logit = tl.load(logits_ptr + target).to(tl.float32)  # before any thread may overwrite it

    # Each of BLOCK lanes has a running maximum and sum of its own, so that lanes are reduced once and not per block.
    highest = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < vocab_size
        x = _load_logits(logits_ptr, column, real, width)
        # Rescale the sum where the maximum has grown, so that no exponential overflows (arXiv:1805.02867).
        above = tl.maximum(highest, x)
        total = total * tl.exp(highest - above) + tl.exp(x - above)
        highest = above
        if SMOOTHED:
            plain += tl.where(real, x, 0.0)
    largest = tl.max(highest, 0)
    partition = largest + tl.log(tl.sum(total * tl.exp(highest - largest), 0))
    scale = tl.load(scale_ptr)
    loss = partition - (1 - label_smoothing) * target_logit + z_loss * partition * partition
    if SMOOTHED:
        loss -= label_smoothing * tl.sum(plain, 0) / vocab_size
    tl.store(losses_ptr + row, loss * scale)

    if GRADIENT:
        slope = (1 + 2 * z_loss * partition) * scale
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            real = column < vocab_size
            x = _load_logits(logits_ptr, column, real, width)
            # softmax - target, where z-loss scales the softmax and label smoothing spreads the target.
            grad = tl.exp(x - partition) * slope
            if SMOOTHED:
                grad -= tl.where(real, label_smoothing / vocab_size * scale, 0.0)
            grad -= tl.where(column == target, (1 - label_smoothing) * scale, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < width)
