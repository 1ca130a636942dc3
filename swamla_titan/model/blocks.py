"""Pre-norm residual blocks of the two kinds."""

import torch.nn.functional as F
from torch import Tensor, nn

from swamla_titan.model.cache import MLACache, SWACache
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import SequenceContext
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.norms import build_norm
from swamla_titan.model.swa import SlidingWindowAttention


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)), with dropout on both terms in training.

    Each kind has a `forward` of its own although they read alike: torch.compile counts recompilations per function, and
    two kinds, in training and evaluation, with and without gradients, would use up one function's limit of 8.
    """

    def __init__(self, config: ModelConfig, attention: SlidingWindowAttention | LatentAttention) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = attention
        self.ffn_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def prefill(self, x: Tensor, context: SequenceContext, cache: "SWACache | MLACache") -> Tensor:
        """`forward` that also fills this layer's cache."""
        return self._add(x, self.attention.prefill(self.attention_norm(x), context, cache))  # type: ignore[arg-type]

    def decode(self, x: Tensor, context: SequenceContext, cache: "SWACache | MLACache") -> Tensor:
        """The next token of each row, [B, 1, dim] -> [B, 1, dim]."""
        return self._add(x, self.attention.decode(self.attention_norm(x), context, cache))  # type: ignore[arg-type]

    def attention_branch(self, x: Tensor, context: SequenceContext) -> Tensor:
        """What attention adds to the residual stream, [B, T, dim]."""
        out: Tensor = self.attention(self.attention_norm(x), context)
        return out

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        """What the feed-forward network adds to it, [B, T, dim]."""
        out: Tensor = self.feed_forward(self.ffn_norm(x))
        return out

    def middle_residual(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream between the two branches, [B, T, dim]."""
        return x + F.dropout(attended, self.dropout, self.training)

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.middle_residual(x, attended)
        return x + F.dropout(self.feed_forward_branch(x), self.dropout, self.training)


class SWABlock(Block):
    """Block with sliding-window attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, SlidingWindowAttention(config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        return self._add(x, self.attention_branch(x, context))


class MLABlock(Block):
    """Block with multi-head latent attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, LatentAttention(config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        return self._add(x, self.attention_branch(x, context))
