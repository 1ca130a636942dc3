"""The norm of all gradients, and the divisor that clips them, without a host sync."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor


def gradient_norm(
    gradients: Iterable[tuple[Tensor, float]], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The global L2 norm of all gradients, a scalar of their dtype on their device.

    `gradients` are (local shard of a parameter's gradient, share): the shares of an element of the full model must add
    up to 1 over all ranks that hold a copy of it, so that it counts once. `sum_over_ranks` all-reduces a scalar; None:
    a single process.
    """
    shards, shares = zip(*gradients)
    norms = torch.stack(torch._foreach_norm(shards))
    if sum_over_ranks is None:
        return torch.linalg.vector_norm(norms)
    shares_on_device = _on_device(shares, norms.dtype, norms.device)
    return sum_over_ranks((norms.square() * shares_on_device).sum()).sqrt()


@lru_cache(maxsize=8)
def _on_device(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The shares as a tensor, made once for all steps, because a copy from the host may wait for the device."""
    return torch.tensor(shares, dtype=dtype, device=device)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """The divisor, at least 1, that brings gradients of this norm to at most `max_norm`: a scalar like `norm`."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)
