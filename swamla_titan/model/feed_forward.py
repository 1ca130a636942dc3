"""SwiGLU (Shazeer, arXiv:2002.05202)."""

from collections.abc import Callable

from torch import Tensor, nn

from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.linear import Linear


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), with gate and up in one product.

    Rows of `gate_up` come in groups, [hidden / group, (gate, up), group], so that a tensor-parallel rank that owns a
    stretch of rows owns gates and ups of the same hidden units, at any degree that divides the number of groups.
    `gate_weight` and `up_weight` in terms of the formula are `split_gate_up(gate_up.weight)`.

    `activate` may be set from outside, to a faster function like kernels/swiglu.py's `swiglu`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.group = config.ffn_group  # columns of gate, then as many of up, and so on
        self.activate: Callable[[Tensor, int], Tensor] = swiglu
        self.gate_up = Linear(config.dim, 2 * config.ffn_width)
        self.down = Linear(config.ffn_width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        out: Tensor = self.down(self.activate(self.gate_up(x), self.group))
        return out

    def split_gate_up(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`gate_up.weight` [2 hidden, dim] -> (gate, up), each [hidden, dim] in the order of `down`'s columns."""
        gate, up = weight.unflatten(0, (-1, 2, self.group)).unbind(dim=1)
        return gate.flatten(0, 1), up.flatten(0, 1)
