"""The output head and the loss as one operation, which never holds the logits of all tokens (any device)."""

from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.cross_entropy import IGNORE

# Of logits at a time. With fewer, adding to the weight's gradient, which reads and writes all of it, would cost more.
_CHUNK_BYTES = 2**30
_ROWS = 256  # a slice is a multiple of, as matmuls like it


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
    kernels/cross_entropy.py. `denominator` is a number or a tensor of one, which gets no gradient.

    Logits are made for a stretch of tokens at a time and overwritten by their gradient at once, from which the
    gradients of x and weight follow (as in Liger Kernel, arXiv:2410.10989), the latter added up in float32. So the
    backward pass has nothing left to do, can be taken once, and nothing is computed twice; without gradients (eval)
    only the loss is computed.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(denominator, Tensor):
        scale = denominator.detach().reshape(()).to(x.device, wide).reciprocal()
    else:  # filled on the device: a tensor made of a Python number is copied there, and the copy waits
        scale = torch.full((), 1 / denominator, dtype=wide, device=x.device)
    total: Tensor = _LinearCrossEntropy.apply(x, weight, targets, scale, vocab_size, z_loss, label_smoothing, wanted)
    return total


def tokens_at_a_time(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Rows of logits over so many columns, of so many bytes a number, that are held at a time: tokens in even parts."""
    most = max(_CHUNK_BYTES // (itemsize * vocabulary), _ROWS) // _ROWS * _ROWS
    even = -(-tokens // max(-(-tokens // most), 1))
    return min(tokens, -(-even // _ROWS) * _ROWS)


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
        rows = tokens_at_a_time(x.shape[0], weight.shape[0], x.element_size())
        losses, grad_weight = [], None
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else x
        for some, their_targets, their_grad in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            logits = some @ matrix.T
            losses.append(cross_entropy_rows(logits, their_targets, scale, vocab_size, z_loss, label_smoothing, wanted))
            if wanted:  # the logits are their gradient now
                torch.mm(logits, matrix, out=their_grad)
                grad_weight = _add_matmul(grad_weight, logits.T, some)
            del logits  # or the next stretch would be made beside this one
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
    """total + a b in float32 or wider, in place or not; total None: 0."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b if total is None else total.addmm_(a, b)
    if not a.is_cuda:  # where matmuls of 16-bit values come in 16 bits only
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
    """Each row's share of kernels/cross_entropy.py's loss, times `scale`: [N] in float32 (float64 for float64 logits).

    logits [N, V] contiguous, targets [N], scale [] in the result's dtype. With `gradient`, logits are overwritten by
    the gradient of the sum of the shares. On CUDA by a Triton kernel, which reads each row from memory once.
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
