"""SwiGLU (Shazeer, arXiv:2002.05202)."""

from typing import ClassVar

from torch import Tensor, nn

from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model.branch import Branch, Saved
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.linear import Linear, Role


class SwiGLU(nn.Module):
    """silu(gate x) * up x, of gate and up projections in groups of `group` columns each."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 hidden] -> [..., hidden]."""
        return swiglu(x, self.group)


class FeedForward(Branch):
    """down(silu(gate x) * up x), with gate and up in one linear layer.

    Rows of `gate_up` come in groups, [hidden / group, (gate, up), group], so that a tensor-parallel rank that owns
    consecutive rows owns gate and up projections of the same hidden units, at any degree that divides the number of
    groups. The formula's two weights are `gate_up.spec.split(gate_up.weight)`.

    `activation` may be replaced.
    """

    linear_input: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.group = config.ffn_group  # columns of gate projections, then as many of up projections, and so on
        self.activation: nn.Module = SwiGLU(self.group)
        # Not kept: a matmul as wide as the others, whose output is a third of what a block would keep (5.3 dim of 16).
        self.gate_up = Linear(
            config.dim, 2 * config.ffn_width, Role.COLUMN, parts=(self.group, self.group), recomputed=True
        )
        # Not kept: its output is added to the residual stream, and nothing in the backward pass reads it.
        self.down = Linear(config.ffn_width, config.dim, Role.RESIDUAL_OUTPUT, parts=(self.group,), recomputed=True)

    @classmethod
    def saved(cls, config: ModelConfig, tensor: int) -> Saved:
        """As in Branch: gate and up projections, and the output of SwiGLU."""
        return Saved(3 * config.ffn_width / tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        out: Tensor = self.down(self.activation(self.gate_up(x)))
        return out
