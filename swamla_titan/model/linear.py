"""The one kind of linear layer in the model, and the embedding; model/init.py gives them their first values."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.sharding import FULL


class Role(Enum):
    """What a linear layer reads and writes. How ranks shard it, its first values and its float8 input follow from it.

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
        """Whether its input is what a norm over the residual stream gives."""
        return self in (Role.COLUMN, Role.REPLICATED)

    @property
    def stays_wide(self) -> bool:
        """Whether float8 leaves it as it is."""
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

    def __init__(
        self, in_features: int, out_features: int, role: Role, parts: tuple[int, ...] = (1,), recomputed: bool = False
    ) -> None:
        """Arguments behind the widths are as in LinearSpec."""
        super().__init__(in_features, out_features, bias=False)
        self.spec = LinearSpec(role, parts, recomputed)
        self.sharding = FULL

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn and thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.sharding.output(self.matmul(self.sharding.input(x), self.sharding.parameter(self.weight)))

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T with the weight, or the shard of it, that is given."""
        return F.linear(x, weight.to(x.dtype))


class Head(Linear):
    """The last linear layer, whose result can also be a function of x and the weight: a loss without full logits."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, Role.COLUMN)

    def forward(self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], or loss(x, weight)."""
        return super().forward(x) if loss is None else loss(x, self.weight)


class Embedding(nn.Embedding):
    """nn.Embedding without torch's own first values."""

    def reset_parameters(self) -> None:
        """Nothing, as in Linear."""


def spec_of(name: str, linear: nn.Module) -> LinearSpec:
    """What a linear layer declares; TypeError for one that declares nothing."""
    spec = getattr(linear, "spec", None)
    if not isinstance(spec, LinearSpec):
        raise TypeError(f"{name} ({type(linear).__name__}) declares no role: it must be a Linear of {__name__}")
    return spec
