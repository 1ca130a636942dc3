"""The pre-norm residual block: the attention of each kind, and SwiGLU (Shazeer, arXiv:2002.05202)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.kernels import decode as kernels
from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model.branch import Attention, Branch, Mixer, Regions, Saved, SequenceContext, Step, TokenContext
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import EPS, Linear, Norm, RMSNorm, Role, Rotation, build_norm
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.swa import SlidingWindowAttention


def registered(blocks: dict[str, type[Mixer]]) -> dict[str, type[Mixer]]:
    """`blocks`; raises TypeError unless exactly these kinds have a key for their layers in ModelConfig."""
    if set(blocks) != set(ModelConfig.kinds()):
        known = ModelConfig.kinds()
        raise TypeError(f"each of {list(blocks)} needs a key model.KIND_layers_per_cycle, which {known} have")
    return blocks


BLOCKS = registered(
    {
        "swa": SlidingWindowAttention,
        "mla": LatentAttention,
    }
)


def attention_kinds(config: ModelConfig) -> dict[str, type[Attention]]:
    """The mixers of the model's block kinds that are attention."""
    kinds = set(config.block_kinds)
    return {kind: mixer for kind, mixer in BLOCKS.items() if kind in kinds and issubclass(mixer, Attention)}


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
    groups. The formula's two weights are `gate_up.spec.split(gate_up.weight)`. `activation` may be replaced.
    """

    linear_input: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.group = config.ffn_group  # columns of gate projections, then as many of up projections, in turn
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

    def fused_decode(self, norm: Norm) -> Step:
        """What adds this branch, behind its norm, to the stream by kernels/decode.py."""

        def step(stream: kernels.Stream) -> kernels.Stream:
            stream, hidden = kernels.normed_linear(stream, norm.weight, EPS, self.gate_up.weight, self.group)
            return kernels.add_linear(stream, hidden, self.down.weight)

        return step


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)), with dropout on both terms in training.

    `kind` is a key of BLOCKS. `regions` may be replaced. `branches` names the residual branches, each with its norm.
    """

    branches: ClassVar[dict[str, str]] = {"attention": "attention_norm", "feed_forward": "ffn_norm"}

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention_norm = build_norm(config)
        self.attention: Mixer = BLOCKS[kind](config)
        self.ffn_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout
        self.regions = Regions()

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        out: Tensor = self.regions.run("block", self._forward, x, context[self.kind])
        return out

    def prefill(self, x: Tensor, context: SequenceContext, cache: Any) -> Tensor:
        """`forward` that also fills this layer's cache."""
        return self._add(x, self.attention.prefill(self.attention_norm(x), context[self.kind], cache))

    def decode(self, x: Tensor, context: SequenceContext, cache: Any) -> Tensor:
        """The next token of each sequence, [B, 1, dim] -> [B, 1, dim]."""
        return self._add(x, self.attention.decode(self.attention_norm(x), context[self.kind], cache))

    def fused_decode(self, cache: Any, rotation: Rotation, dtype: torch.dtype) -> Step | None:
        """What computes `decode` with this cache by kernels/decode.py; None: nothing can.

        `rotation` is that of every position, and `dtype` the activations'.
        """
        norms = self.attention_norm, self.ffn_norm
        linears = [each for each in self.modules() if isinstance(each, Linear)]
        are_plain = all(each.is_plain(dtype) for each in linears) and all(type(norm) is RMSNorm for norm in norms)
        if not are_plain or not kernels.fits(*(each.weight for each in linears), group=self.feed_forward.group):
            return None
        attend = self.attention.fused_decode(self.attention_norm, cache, rotation)
        if attend is None:
            return None
        feed_forward = self.feed_forward.fused_decode(self.ffn_norm)
        return lambda stream: feed_forward(attend(stream))

    def _forward(self, x: Tensor, context: TokenContext) -> Tensor:
        return self._add(x, self.regions.run("attention", self._attention_branch, x, context))

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.regions.run("residual", self._middle_residual, x, attended)
        out = self.regions.run("feed_forward", self._feed_forward_branch, x)
        return x + F.dropout(out, self.dropout, self.training)

    def _attention_branch(self, x: Tensor, context: TokenContext) -> Tensor:
        out: Tensor = self.attention(self.attention_norm(x), context)
        return out

    def _feed_forward_branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.ffn_norm(x))
        return out

    def _middle_residual(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + F.dropout(attended, self.dropout, self.training)
