"""Gradient clipping without waiting for the device."""

import torch


def clip_gradients(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale gradients down to a global L2 norm of at most `max_norm` (0: leave them); returns the norm before."""
    parameters = list(model.parameters())
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
