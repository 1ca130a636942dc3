"""The layers that the model is made of: linear layers, embedding, norms and rotary position embedding.

Norms and rotation are computed in float32 and returned in the input's dtype. model/init.py draws initial values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.config import ModelConfig

EPS = 1e-6


class Sharding:
    """Full parameters and activations. Tensor parallelism gives modules a Sharding of shards (parallel/tensor.py)."""

    is_full = True

    def parameter(self, parameter: Tensor) -> Tensor:
        """The shard of a parameter that this process computes with."""
        return parameter

    def input(self, x: Tensor) -> Tensor:
        """The input that a linear layer multiplies, made from the one that it is given."""
        return x

    def output(self, y: Tensor) -> Tensor:
        """The output that a linear layer returns, made from what it has computed."""
        return y


FULL = Sharding()


@dataclass(frozen=True)
class UpdateRule:
    """How a module's own parameters are updated, whatever optimizer.name is; a module declares it as `update_rule`.

    `by_rows`: Adam with float32 moments, of the rows that a step looked up; for RowTable and its subclasses alone.
    `lr_multiplier`: a factor of the learning rate, beside that of optimizer.lr_multipliers. `decays`: False: no weight
    decay; where rows that were looked up move alone, they alone decay.
    """

    by_rows: bool = False
    lr_multiplier: float = 1.0
    decays: bool = True


class Role(Enum):
    """What a linear layer reads and writes. Its sharding, initial values and float8 input follow from it.

    The residual stream is replicated over heads and hidden units, and so is a latent: a narrow vector from which each
    rank makes its own heads.
    """

    COLUMN = "residual stream -> heads or hidden units"
    REPLICATED = "residual stream -> latent"
    LATENT_COLUMN = "latent -> heads"
    RESIDUAL_OUTPUT = "heads or hidden units -> residual stream"
    MEMORY = "looked-up rows -> residual stream, token by token"

    @property
    def reads_residual_stream(self) -> bool:
        """Whether its input is the output of a norm over the residual stream."""
        return self in (Role.COLUMN, Role.REPLICATED)

    @property
    def stays_wide(self) -> bool:
        """Whether float8 recipes leave it out."""
        return self is Role.MEMORY


@dataclass(frozen=True)
class LinearSpec:
    """What the rest of the program must know of a linear layer beside its two widths.

    `parts`: heads, or groups of hidden units, lie one after another, each of so many outputs (inputs of a
    RESIDUAL_OUTPUT): a rank owns whole ones. With several parts the weight is fused: the first parts of all heads make
    up one matrix, the second parts another, and so on. `recomputed`: selective activation checkpointing drops its
    output and computes that again.
    """

    role: Role
    parts: tuple[int, ...] = (1,)
    recomputed: bool = False

    @property
    def unit(self) -> int:
        """Consecutive outputs (inputs of a RESIDUAL_OUTPUT) that always stay on one rank."""
        return sum(self.parts)

    @property
    def is_fused(self) -> bool:
        """Whether the weight is several matrices in one."""
        return len(self.parts) > 1

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight [out, in] -> its matrices [out of the part, in], head by head."""
        units = weight.unflatten(0, (-1, self.unit))
        return tuple(part.flatten(0, 1) for part in units.split(list(self.parts), dim=1))


class Linear(nn.Linear):
    """x W^T, computed in x's dtype whatever dtype W has.

    Mixed precision is this cast and nothing else: float32 master weights meet bfloat16 activations here. Where the
    weights already have x's dtype (FSDP2 with bfloat16 parameters, or a float32 run) the cast does nothing. It stays an
    nn.Linear, which is what float8 conversion and tensor parallelism look for. Its memory comes uninitialized.
    """

    sharding: Sharding = FULL

    def __init__(
        self, in_features: int, out_features: int, role: Role, parts: tuple[int, ...] = (1,), recomputed: bool = False
    ) -> None:
        """The arguments after the widths are as in LinearSpec."""
        super().__init__(in_features, out_features, bias=False)
        self.spec = LinearSpec(role, parts, recomputed)

    def reset_parameters(self) -> None:
        """Do nothing, because torch's initial values would be drawn and discarded."""

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the result in `dtype` is x times the weight as it is: not sharded, not converted, not cast."""
        return type(self) in (Linear, Head) and self.sharding.is_full and self.weight.dtype == dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.sharding.output(self.matmul(self.sharding.input(x), self.sharding.parameter(self.weight)))

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T with the given weight, or shard of it."""
        return F.linear(x, weight.to(x.dtype))


class Head(Linear):
    """The last linear layer, whose result can also be a function of x and the weight: a loss without full logits."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, Role.COLUMN)

    def forward(self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], or loss(x, weight)."""
        return super().forward(x) if loss is None else loss(x, self.weight)


class Embedding(nn.Embedding):
    """nn.Embedding without torch's initial values."""

    def reset_parameters(self) -> None:
        """Do nothing, as in Linear."""


def spec_of(name: str, linear: nn.Module) -> LinearSpec:
    """What a linear layer declares; TypeError for one that declares nothing."""
    spec = getattr(linear, "spec", None)
    if not isinstance(spec, LinearSpec):
        raise TypeError(f"{name} ({type(linear).__name__}) declares no role: it must be a Linear of {__name__}")
    return spec


def linear_weights(model: nn.Module) -> Iterator[tuple[Tensor, LinearSpec]]:
    """The weights of the linear layers that declare something, torchao's float8 layers as we derive them among them."""
    for module in model.modules():
        spec = getattr(module, "spec", None)
        if isinstance(spec, LinearSpec):
            assert isinstance(module.weight, Tensor)
            yield module.weight, spec


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + 1e-6) of x [..., dim] in x's dtype, [...]: for RMSNorm of a factor in a sum over dim."""
    return torch.rsqrt(x.square().mean(dim=-1) + EPS)


class PerChannel(nn.Module):
    """A module whose parameters have one axis: each rank holds them in full, in float32, and they do not decay."""

    initial: ClassVar[dict[str, float]]  # value of each parameter, by its name
    sharding: Sharding = FULL


class Norm(PerChannel):
    """A norm over the last axis; its constructor takes the width."""

    weight: Tensor


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + 1e-6) * weight (Zhang and Sennrich, arXiv:1910.07467)."""

    initial: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), self.initial["weight"]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.gain(wide)
        return F.rms_norm(x.to(wide), weight.shape, weight, EPS).to(x.dtype)

    def gain(self, dtype: torch.dtype) -> Tensor:
        """The weight [dim] that this process computes with, as `dtype`."""
        return self.sharding.parameter(self.weight).to(dtype)


class DynamicTanh(Norm):
    """tanh(alpha x) * weight + bias (Zhu et al., arXiv:2503.10622): a norm without statistics."""

    initial: ClassVar[dict[str, float]] = {"alpha": 0.5, "weight": 1.0, "bias": 0.0}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), self.initial["alpha"]))  # FSDP2 shards no tensors without an axis
        self.weight = nn.Parameter(torch.full((dim,), self.initial["weight"]))
        self.bias = nn.Parameter(torch.full((dim,), self.initial["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, weight, bias = [self.sharding.parameter(each).to(wide) for each in (self.alpha, self.weight, self.bias)]
        return (torch.tanh(alpha * x.to(wide)) * weight + bias).to(x.dtype)


def build_norm(config: ModelConfig) -> Norm:
    """A norm over the residual stream, of the config's kind."""
    return DynamicTanh(config.dim) if config.norm == "dynamic_tanh" else RMSNorm(config.dim)


class Rotary(NamedTuple):
    """Rotary position embedding: the width of the part of a head that is rotated, and the base of the frequencies."""

    width: int
    theta: float


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, [B or 1, T, 1, D/2]: broadcast over heads."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, dim: int, theta: float, scaling: float, dtype: torch.dtype) -> Rotation:
    """The rotation of heads of width `dim` at `positions` [B or 1, T] (tokens since the document's start).

    Angle i is position / scaling * theta^(-2i/dim). Angles come from the positions, not from a table of a fixed length,
    and in float64: at position 100,000 a float32 angle is off by 0.004. `dtype` is that of the results.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = (positions.to(torch.float64) / scaling)[..., None, None] * theta**-exponents  # [B, T, 1, D/2]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate heads x [B, T, H, D]; computed in the rotation's dtype (float32), returned in x's."""
    first, second = x.to(by.cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin], dim=-1)
    return rotated.to(x.dtype)
