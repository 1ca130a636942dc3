"""Normalisation over the last axis: computed in float32, returned in the input's dtype.

The formulas are functions of their own, so that who holds the parameters in another form (tensor parallelism) can
apply them too.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.config import ModelConfig
from swamla_titan.model.sharding import FULL

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) * w (Zhang and Sennrich, arXiv:1910.07467); x [..., dim], weight [dim]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), EPS).to(x.dtype)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + 1e-6) of x [..., dim] in x's dtype, [...]: RMSNorm for who scales a sum over dim instead."""
    return torch.rsqrt(x.square().mean(dim=-1) + EPS)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh(alpha x) * w + b (Zhu et al., arXiv:2503.10622); x [..., dim], alpha [1], weight and bias [dim]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squashed = torch.tanh(alpha.to(wide) * x.to(wide))
    return (squashed * weight.to(wide) + bias.to(wide)).to(x.dtype)


class PerChannel(nn.Module):
    """A module whose parameters have one axis: every rank holds them in full, in float32, and they do not decay."""

    initial: ClassVar[dict[str, float]]  # of each parameter, by its name

    def __init__(self) -> None:
        super().__init__()
        self.sharding = FULL


class Norm(PerChannel):
    """A norm over the last axis."""

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()


class RMSNorm(Norm):
    """`rms_norm` with its weight."""

    initial: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.weight = nn.Parameter(torch.full((dim,), self.initial["weight"]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.sharding.parameter(self.weight))

    def gain(self, dtype: torch.dtype) -> Tensor:
        """The weight that this process computes with, [dim]."""
        return self.sharding.parameter(self.weight).to(dtype)


class DynamicTanh(Norm):
    """`dynamic_tanh`, a normalisation without statistics, with its parameters."""

    initial: ClassVar[dict[str, float]] = {"alpha": 0.5, "weight": 1.0, "bias": 0.0}

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.alpha = nn.Parameter(torch.full((1,), self.initial["alpha"]))  # FSDP2 shards no tensors without an axis
        self.weight = nn.Parameter(torch.full((dim,), self.initial["weight"]))
        self.bias = nn.Parameter(torch.full((dim,), self.initial["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        own = self.sharding.parameter
        return dynamic_tanh(x, own(self.alpha), own(self.weight), own(self.bias))


def build_norm(config: ModelConfig) -> Norm:
    """The norm that the config asks for, over the residual stream."""
    return DynamicTanh(config.dim) if config.norm == "dynamic_tanh" else RMSNorm(config.dim)
