"""Sliding-window attention with sinks: local, with the first tokens of the document always in view."""

from typing import ClassVar

from torch import Tensor, nn

from swamla_titan.kernels.attention.masks import MaskSpec
from swamla_titan.model.cache import SWACache
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import AttentionContext
from swamla_titan.model.inner_attention import FusedAttention, InnerAttention
from swamla_titan.model.linear import Linear
from swamla_titan.model.norms import RMSNorm
from swamla_titan.model.rope import rotate


class SlidingWindowAttention(nn.Module):
    """Rotary attention over the newest `swa_window` keys and the document's first `swa_sink_size`.

    `inner_attention` may be replaced. `fused_attention(qkv, context, scale)`, if there is one, does the rotation too.

    Rows of `wqkv` are grouped by key/value head, [kv_heads, queries of the group + key + value, head_dim]: a
    tensor-parallel rank that owns a stretch of rows owns whole groups. `split_qkv` gives them in the usual order.
    """

    projections: ClassVar[str] = "qkv"  # what the linear layer before attention gives (dispatch.py)

    @classmethod
    def mask(cls, config: ModelConfig) -> MaskSpec:
        """Which keys a query sees."""
        return MaskSpec(config.swa_window, config.swa_sink_size)

    @classmethod
    def head_widths(cls, config: ModelConfig) -> tuple[int, int]:
        """Of queries and keys, and of values."""
        return config.head_dim, config.head_dim

    @classmethod
    def rotary(cls, config: ModelConfig) -> tuple[int, float]:
        """How much of a head is rotated, and theta."""
        return config.head_dim, config.swa_rope_theta or config.rope_theta

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_heads // config.kv_heads
        self.scale = config.head_dim**-0.5
        self.wqkv = Linear(config.dim, (config.num_heads + 2 * config.kv_heads) * config.head_dim)
        self.wo = Linear(config.num_heads * config.head_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.inner_attention = InnerAttention()
        self.fused_attention: FusedAttention | None = None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        if self.fused_attention is not None and self.fused_attention.serves(context):
            return self._output(self.fused_attention(self.groups(x), context, self.scale))
        query, key, value = self.project(x, context)
        return self._output(self.inner_attention(query, key, value, context, self.scale))

    def prefill(self, x: Tensor, context: AttentionContext, cache: SWACache) -> Tensor:
        """`forward` that also fills the cache."""
        query, key, value = self.project(x, context)
        cache.fill(key, value)
        return self._output(context.attend(query, key, value, self.scale))

    def decode(self, x: Tensor, context: AttentionContext, cache: SWACache) -> Tensor:
        """The next token of each row, [B, 1, dim] -> [B, 1, dim]; context.mask is over the cache's slots."""
        query, key, value = self.project(x, context)
        cache.append(key, value, context.positions)
        return self._output(context.attend(query, cache.keys, cache.values, self.scale))

    def groups(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> the queries of a group of heads, then its key and its value, [B, T, G, H/G + 2, D]."""
        out: Tensor = self.wqkv(x)
        return out.unflatten(-1, (-1, self.queries_per_key + 2, self.head_dim))

    def project(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, dim] -> rotated queries [B, T, H, D], rotated keys and values [B, T, G, D]."""
        query, key, value = self.groups(x).split([self.queries_per_key, 1, 1], dim=-2)
        query = rotate(self.q_norm(query.flatten(2, 3)), context.rotation)  # [B, T, H, D]
        key = rotate(self.k_norm(key.squeeze(-2)), context.rotation)  # [B, T, G, D]
        return query, key, value.squeeze(-2)

    def split_qkv(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`wqkv.weight` -> query [H D, dim], key [G D, dim] and value [G D, dim] weights, head by head."""
        groups = weight.unflatten(0, (-1, self.queries_per_key + 2, self.head_dim))
        query, key, value = groups.split([self.queries_per_key, 1, 1], dim=1)
        return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)

    def _output(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.wo(attended.flatten(2))  # from [B, T, H, D]
        return projected
