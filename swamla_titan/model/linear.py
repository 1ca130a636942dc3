"""The one kind of matrix product in the model, and the embedding; SWAMLAModel.init_weights gives them their values."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x W^T, computed in x's dtype whatever W is kept in.

    Mixed precision is this cast and nothing else: float32 master weights meet bfloat16 activations here. Where the
    weights already have x's dtype (FSDP2 with bfloat16 parameters, or a float32 run) the cast does nothing. It stays an
    nn.Linear, which is what float8 conversion and tensor parallelism look for. Its memory comes as it is found.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn and thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with another weight in the place of the module's own: tensor parallelism passes its shard."""
        return F.linear(x, weight.to(x.dtype))


class Head(Linear):
    """The last product, whose result can also be a function of x and the weight: a loss that needs no whole logits."""

    def forward(self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], or loss(x, weight)."""
        return super().forward(x) if loss is None else loss(x, self.weight)


class Embedding(nn.Embedding):
    """nn.Embedding without torch's own first values."""

    def reset_parameters(self) -> None:
        """Nothing, as in Linear."""
