"""The norm of all gradients, and what clipping divides them by, without waiting for the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def gradient_norm(
    gradients: Iterable[tuple[Tensor, float]], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Their global L2 norm, a scalar of their dtype on their device.

    `gradients` are (this rank's part of one parameter's gradient, share): each element of the whole model must have
    shares that add up to 1 over all ranks that hold a copy of it. `sum_over_ranks` adds a scalar up over all ranks;
    None: a process alone.
    """
    parts, shares = zip(*gradients)
    norms = torch.stack(torch._foreach_norm(parts))
    if sum_over_ranks is None:
        return torch.linalg.vector_norm(norms)
    shares_there = torch.tensor(shares, dtype=norms.dtype).to(norms.device, non_blocking=True)
    return sum_over_ranks((norms.square() * shares_there).sum()).sqrt()


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are divided by to have one of at most `max_norm`: a scalar like it, 1 or more."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)
