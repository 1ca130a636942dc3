"""Gradient clipping without waiting for the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def clip_gradients(
    gradients: Iterable[tuple[Tensor, float]],
    max_norm: float,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale gradients down to a global L2 norm of at most `max_norm` (0: leave them); returns the norm before.

    `gradients` are (this rank's part of one parameter's gradient, share): each element of the whole model must have
    shares that add up to 1 over all ranks that hold a copy of it. `sum_over_ranks` adds a scalar up over all ranks;
    None: a process alone.
    """
    parts, shares = zip(*gradients)
    norms = torch.stack(torch._foreach_norm(parts))
    if sum_over_ranks is None:
        norm = torch.linalg.vector_norm(norms)
    else:
        shares_there = torch.tensor(shares, dtype=norms.dtype).to(norms.device, non_blocking=True)
        norm = sum_over_ranks((norms.square() * shares_there).sum()).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, scale)
    return norm
