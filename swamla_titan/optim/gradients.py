"""The norm of all gradients, and what clipping divides them by, without waiting for the device."""

from collections.abc import Callable, Iterable
from functools import lru_cache

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
    shares_there = _on_device(shares, norms.dtype, norms.device)
    return sum_over_ranks((norms.square() * shares_there).sum()).sqrt()


@lru_cache(maxsize=8)
def _on_device(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Once for all steps: a copy of numbers of the host's may wait for what the device does."""
    return torch.tensor(shares, dtype=dtype, device=device)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are divided by to have one of at most `max_norm`: a scalar like it, 1 or more."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)
