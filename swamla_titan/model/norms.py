"""Normalisation over the last axis: computed in float32, returned in the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * w (Zhang and Sennrich, arXiv:1910.07467)."""

    eps = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class DynamicTanh(nn.Module):
    """tanh(alpha x) * w + b, a normalisation without statistics (Zhu et al., arXiv:2503.10622)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))  # one element, not zero axes: FSDP2 shards no scalars
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        squashed = torch.tanh(self.alpha.to(wide) * x.to(wide))
        return (squashed * self.weight.to(wide) + self.bias.to(wide)).to(x.dtype)


def build_norm(config: ModelConfig) -> RMSNorm | DynamicTanh:
    """The norm that the config asks for, over the residual stream."""
    return DynamicTanh(config.dim) if config.norm == "dynamic_tanh" else RMSNorm(config.dim)
