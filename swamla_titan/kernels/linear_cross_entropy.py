"""Output head and loss as one operation, which never materializes the logits of all tokens (any device)."""

from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.cross_entropy import IGNORE

# Bytes of a chunk of logits. Smaller chunks would accumulate the weight's gradient more often, and each accumulation
# reads and writes all of it.
_CHUNK_BYTES = 2**30
_ROUND_TO = 256  # a chunk has a multiple of so many tokens, for the tiles of its matmuls


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    denominator: Tensor | float,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(x weight^T, targets, ...) / denominator, a float32 scalar (float64 for float64 x).

    x [N, D], weight [V, D] in any dtype (computed in x's), V >= vocab_size, targets [N] int64; the rest is as in
    kernels/cross_entropy.py. `denominator` is a number or a tensor of one element, and gets no gradient.

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
    total: Tensor = _LinearCrossEntropy.apply(x, weight, targets, scale, vocab_size, z_loss, label_smoothing, wanted)
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
    ) -> Tensor:
        matrix = weight.to(x.dtype)
        size = tokens_per_chunk(x.shape[0], weight.shape[0], x.element_size())
        losses, grad_weight = [], None
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else x
        for chunk, its_targets, its_grad in zip(x.split(size), targets.split(size), grad_x.split(size)):
            logits = chunk @ matrix.T
            losses.append(cross_entropy_rows(logits, its_targets, scale, vocab_size, z_loss, label_smoothing, wanted))
            if wanted:  # `logits` now holds their gradient
                torch.mm(logits, matrix, out=its_grad)
                grad_weight = _add_matmul(grad_weight, logits.T, chunk)
            del logits  # so that the next chunk is not allocated beside this one
        ctx.gradients = (grad_x, grad_weight) if wanted else None
        ctx.weight_dtype = weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy are there for one backward pass")
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.weight_dtype), *[None] * 6


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


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """Each token's term of the loss of kernels/cross_entropy.py, times `scale`: [N] in float32 (float64 for float64).

    logits [N, V] contiguous, targets [N], scale [] in the result's dtype. With `gradient`, logits are overwritten by
    the gradient of the sum of the terms. CUDA uses a Triton kernel, which reads each row from memory once.
    """
    if logits.is_cuda:
        return _triton_rows(logits, targets, scale, vocab_size, z_loss, label_smoothing, gradient)
    return plain_rows(logits, targets, scale, vocab_size, z_loss, label_smoothing, gradient)


def plain_rows(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """`cross_entropy_rows` in plain PyTorch."""
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
    from swamla_titan.kernels.cross_entropy_triton import cross_entropy_rows as kernel

    assert logits.is_contiguous()
    assert targets.is_contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        kernel[(logits.shape[0],)](
            *(logits, targets, scale, losses, logits.shape[1], vocab_size, z_loss, label_smoothing),
            SMOOTHED=label_smoothing > 0,
            GRADIENT=gradient,
            BLOCK=4096,
            num_warps=8,
        )
    return losses
