"""The cross-entropy loss over the vocabulary, in float32 or wider; alone, and with the output head as one operation.

The latter never materializes the logits of all tokens (any device; a Triton kernel on CUDA).
"""

from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.triton import jit, tl

IGNORE = -100  # the target of a position that is not learned from, as in torch.nn.functional.cross_entropy
# Bytes of a chunk of logits. Smaller chunks would accumulate the weight's gradient more often, and each accumulation
# reads and writes all of it.
_CHUNK_BYTES = 2**30
_IGNORE = tl.constexpr(IGNORE)  # as kernels read it
_ROUND_TO = 256  # a chunk has a multiple of so many tokens, for the tiles of its matmuls


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    sequences: int = 0,
) -> Tensor:
    """Sum over the targets that are not -100 of -log softmax(logits)[target], plus z-loss; a float32 scalar.

    logits [N, V] with V >= vocab_size (columns from vocab_size on are padding and ignored), targets [N] int64. With
    `sequences`, which have equally many tokens, a sum for each of them: [sequences].
    `label_smoothing` spreads that share of the target evenly over the vocabulary, as torch's cross_entropy does;
    `z_loss` adds weight * log(sum exp logits)^2 per target, which keeps the logits' scale from drifting
    (PaLM, arXiv:2204.02311, section 5). A target outside [0, vocab_size) that is not -100 is the caller's error and is
    not detected.

    Compiled, the float32 logits exist only inside fused loops, because the target's logit is selected by a comparison:
    the backward pass of `gather` would first write an [N, V] float32 buffer of zeros.
    """
    logits = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    log_partition = logits.logsumexp(dim=-1)  # [N]
    columns = torch.arange(vocab_size, device=logits.device)
    target_logit = torch.where(columns == targets[:, None], logits, 0.0).sum(dim=-1)  # [N]
    loss = log_partition - target_logit
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logits.mean(dim=-1))
    if z_loss > 0:
        loss = loss + z_loss * log_partition.square()
    return summed(torch.where(targets != IGNORE, loss, 0.0), sequences)


def summed(losses: Tensor, sequences: int) -> Tensor:
    """The sum of the losses [N] of all tokens, or of those of each of `sequences` sequences, [sequences]."""
    return losses.view(sequences, -1).sum(dim=-1) if sequences else losses.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    denominator: Tensor | float,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    terms: list[Tensor] | None = None,
) -> Tensor:
    """cross_entropy(x weight^T, targets, ...) / denominator, a float32 scalar (float64 for float64 x).

    x [N, D], weight [V, D] in any dtype (computed in x's), V >= vocab_size, targets [N] int64; the rest is as in
    `cross_entropy`. `denominator` is a number or a tensor of one element, and gets no gradient. `terms` is given each
    token's term of the result, [N].

    Logits are computed for a chunk of tokens and immediately overwritten by their gradient, from which the gradients of
    x and weight follow (as in Liger Kernel, arXiv:2410.10989); the weight's is accumulated in float32. So nothing is
    computed twice, and the backward pass only scales the gradients, once. Without gradients (evaluation) only the loss
    is computed. Raises RuntimeError at a second backward pass.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(denominator, Tensor):
        scale = denominator.detach().reshape(()).to(x.device, wide).reciprocal()
    else:  # filled on the device, because a copy of a host tensor would wait for it
        scale = torch.full((), 1 / denominator, dtype=wide, device=x.device)
    options = vocab_size, z_loss, label_smoothing, wanted, terms
    total: Tensor = _LinearCrossEntropy.apply(x, weight, targets, scale, *options)
    return total


def tokens_per_chunk(tokens: int, vocabulary: int, itemsize: int) -> int:
    """How many tokens have their logits in memory at once: even chunks of `tokens`, at most _CHUNK_BYTES each."""
    most = max(_CHUNK_BYTES // (itemsize * vocabulary), _ROUND_TO) // _ROUND_TO * _ROUND_TO
    even = -(-tokens // max(-(-tokens // most), 1))
    return min(tokens, -(-even // _ROUND_TO) * _ROUND_TO)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        vocab_size: int,
        z_loss: float,
        label_smoothing: float,
        wanted: bool,
        terms: list[Tensor] | None,
    ) -> Tensor:
        matrix, rows = weight.to(x.dtype), _triton_rows if x.is_cuda else plain_rows
        size = tokens_per_chunk(x.shape[0], weight.shape[0], x.element_size())
        losses, grad_weight = [], None
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else x
        for chunk, its_targets, its_grad in zip(x.split(size), targets.split(size), grad_x.split(size)):
            logits = chunk @ matrix.T
            losses.append(rows(logits, its_targets, scale, vocab_size, z_loss, label_smoothing, wanted))
            if wanted:  # `logits` now holds their gradient
                torch.mm(logits, matrix, out=its_grad)
                grad_weight = _add_matmul(grad_weight, logits.T, chunk)
            del logits  # so that the next chunk is not allocated beside this one
        ctx.gradients = (grad_x, grad_weight) if wanted else None
        ctx.weight_dtype = weight.dtype
        every = torch.cat(losses)
        if terms is not None:
            terms.append(every)
        return every.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy are there for one backward pass")
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.weight_dtype), *[None] * 7


def _add_matmul(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in float32 or wider, in place where it can be; total None: 0."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b if total is None else total.addmm_(a, b)
    if not a.is_cuda:  # a CPU multiplies 16-bit values to 16-bit results only
        added = (a @ b).float()
        return added if total is None else total.add_(added)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32)


def plain_rows(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """Each token's term of the loss of `cross_entropy`, times `scale`: [N] in float32 (float64 for float64).

    logits [N, V] contiguous, targets [N], scale [] in the result's dtype. With `gradient`, logits are overwritten by
    the gradient of the sum of the terms.
    """
    wide = logits[:, :vocab_size].to(scale.dtype)
    learned = targets != IGNORE
    columns = torch.where(learned, targets, 0)[:, None]
    partition = wide.logsumexp(dim=-1)
    losses = partition - (1 - label_smoothing) * wide.gather(1, columns).squeeze(1)
    losses = losses - label_smoothing * wide.mean(dim=-1) + z_loss * partition.square()
    if gradient:
        slope = (wide - partition[:, None]).exp() * (1 + 2 * z_loss * partition)[:, None]
        slope -= label_smoothing / vocab_size
        slope.scatter_add_(1, columns, torch.full_like(partition, label_smoothing - 1)[:, None])
        slope *= torch.where(learned, scale, 0.0)[:, None]
        logits[:, :vocab_size] = slope.to(logits.dtype)
        logits[:, vocab_size:] = 0
    return torch.where(learned, losses * scale, 0.0)


def _triton_rows(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """`plain_rows` by a Triton kernel (CUDA), which reads each row from memory once."""
    assert logits.is_contiguous()
    assert targets.is_contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        cross_entropy_rows[(logits.shape[0],)](
            *(logits, targets, scale, losses, logits.shape[1], vocab_size, z_loss, label_smoothing),
            SMOOTHED=label_smoothing > 0,
            GRADIENT=gradient,
            BLOCK=4096,
            num_warps=8,
        )
    return losses


@jit
def _load_logits(row_ptr, column, real, width):
    """Logits in float32, minus infinity in padding, which is loaded too so that loads are 16 bytes and aligned."""
    x = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(real, x, -float("inf"))


@jit
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
    if target == _IGNORE:
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
