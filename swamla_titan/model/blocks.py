"""The pre-norm residual block, and the attention of each kind of block."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.branch import Attention, Mixer
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import SequenceContext, TokenContext
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.norms import build_norm
from swamla_titan.model.swa import SlidingWindowAttention


def registered(blocks: dict[str, type[Mixer]]) -> dict[str, type[Mixer]]:
    """`blocks`; TypeError unless exactly these kinds have a key for their layers in ModelConfig."""
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
    """The model's kinds of block whose mixer is attention."""
    kinds = {kind: mixer for kind, mixer in BLOCKS.items() if kind in config.block_kinds}
    return {kind: mixer for kind, mixer in kinds.items() if issubclass(mixer, Attention)}


class Regions:
    """Runs the regions of a block's forward pass, each by its name.

    "block" is all of it, "attention" and "feed_forward" are the residual branches, "residual" is the sum between them.
    Activation checkpointing gives blocks an object that recomputes some regions in the backward pass.
    """

    def run(self, name: str, forward: Callable[..., Any], *inputs: Any) -> Any:
        """forward(*inputs)."""
        return forward(*inputs)


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
