"""Sliding-window attention with sinks: a query sees the newest keys and the first ones of its document."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from swamla_titan.kernels import decode as kernels
from swamla_titan.kernels.attention.dispatch import Heads, Projections
from swamla_titan.kernels.attention.masks import MaskSpec
from swamla_titan.model.branch import Attention, AttentionContext, Clock, KeyExchange, Saved, Step
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import EPS, Linear, RMSNorm, Role, Rotary, Rotation, rotate


class SWACache:
    """Rotated keys and values of a document's first `sink` tokens and of the newest `window` ones.

    keys and values are [B, sink + window, G, D]; in memory the slots of a head lie together. The token at index t goes
    to slot sink + t % window; a token at position p < sink goes to slot p as well. A key that is in both is seen
    through the window only (`next_mask`).
    """

    def __init__(self, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> None:
        self.clock = clock
        # At most as many slots as tokens.
        self.sink, self.window = min(config.swa_sink_size, max_tokens), min(config.swa_window, max_tokens)
        # Zeros and not empty: a slot that is masked still meets a weight of 0, and 0 * NaN is NaN.
        shape = (clock.starts.shape[0], config.kv_heads, self.sink + self.window, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=clock.starts.device).transpose(1, 2)
        self.values = torch.zeros(shape, dtype=dtype, device=clock.starts.device).transpose(1, 2)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the prompts' keys and values [B, T, G, D]."""
        length = keys.shape[1]
        times = torch.arange(max(0, length - self.window), length, device=keys.device)
        ring = self.sink + times % self.window
        # Sink positions after a short prompt's end get the key of its last token; they are masked until `append` writes
        # their own.
        sinks = torch.arange(self.sink, device=keys.device)
        at = (self.clock.starts[:, None] + sinks).clamp(max=length - 1)[:, :, None, None]  # [B, sink, 1, 1]
        at = at.expand(-1, -1, *keys.shape[2:])
        for slots, new in ((self.keys, keys), (self.values, values)):
            slots[:, ring] = new[:, times]
            slots[:, : self.sink] = new.gather(1, at)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store one token per sequence: keys and values [B, 1, G, D] at positions [B, 1]."""
        ring = self.sink + self.clock.length % self.window  # [1]
        own = (positions == torch.arange(self.sink, device=keys.device))[:, :, None, None]  # [B, sink, 1, 1]
        for slots, new in ((self.keys, keys), (self.values, values)):
            slots.index_copy_(1, ring, new)
            slots[:, : self.sink] = torch.where(own, new, slots[:, : self.sink])

    def next_mask(self) -> Tensor:
        """Which slots the next token sees, boolean [B, 1, 1, sink + window]."""
        time, starts = self.clock.length, self.clock.starts[:, None]  # starts: [B, 1]
        slots = torch.arange(self.window, device=starts.device)
        times = time - (time - slots) % self.window  # the newest index that each slot can hold; negative: none yet
        in_window = times >= starts  # [B, window]
        # Only once a sink key has left the window, else its weight would count twice.
        in_sink = time - starts - torch.arange(self.sink, device=starts.device) >= self.window  # [B, sink]
        return torch.cat([in_sink, in_window], dim=1)[:, None, None]


class SlidingWindowAttention(Attention):
    """Rotary attention over the newest `swa_window` keys and the document's first `swa_sink_size`.

    Rows of `wqkv` are grouped by key/value head, [kv_heads, queries of the group + key + value, head_dim]: a
    tensor-parallel rank that owns consecutive rows owns whole groups.
    """

    linear_input: ClassVar[bool] = True
    key_exchange: ClassVar[KeyExchange] = "halo"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_heads // config.kv_heads
        self.scale = config.head_dim**-0.5
        # of a key/value head: queries, key, value
        parts = (self.queries_per_key * self.head_dim, self.head_dim, self.head_dim)
        self.wqkv = Linear(config.dim, config.kv_heads * sum(parts), Role.COLUMN, parts)
        self.wo = Linear(config.num_heads * config.head_dim, config.dim, Role.RESIDUAL_OUTPUT, (self.head_dim,))
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()

    @classmethod
    def mask(cls, config: ModelConfig) -> MaskSpec:
        """As in Attention."""
        return MaskSpec(config.swa_window, config.swa_sink_size)

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        """As in Attention: of heads in full."""
        return Rotary(config.head_dim, config.swa_rope_theta or config.rope_theta)

    @classmethod
    def heads(cls, config: ModelConfig) -> Heads:
        """As in Attention."""
        return Heads(config.num_heads, config.kv_heads, config.head_dim, config.head_dim)

    @classmethod
    def projections(cls, config: ModelConfig) -> Projections:
        """As in Attention. Norms of queries and keys come before the rotation."""
        return Projections("qkv", config.head_dim, "model.qk_norm" if config.qk_norm else None)

    @classmethod
    def saved(cls, config: ModelConfig, tensor: int) -> Saved:
        """As in Branch: rotated queries and keys, the projection, in which the values lie, and attention's result."""
        elements = (3 * config.num_heads + 3 * config.kv_heads) * config.head_dim
        return Saved(elements / tensor, saves_result=True)

    @classmethod
    def new_cache(cls, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> SWACache:
        """As in Attention."""
        return SWACache(config, clock, max_tokens, dtype)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        if self.fused_attention is not None and self.fused_attention.serves(context):
            return self._output(self.fused_attention(context, self.scale, self.groups(x)))
        query, key, value = self.project(x, context)
        return self._output(self.inner_attention(query, key, value, context, self.scale))

    def prefill(self, x: Tensor, context: AttentionContext, cache: SWACache) -> Tensor:
        """`forward` that also fills the cache."""
        query, key, value = self.project(x, context)
        cache.fill(key, value)
        return self._output(context.attend(query, key, value, self.scale))

    def decode(self, x: Tensor, context: AttentionContext, cache: SWACache) -> Tensor:
        """The next token of each sequence, [B, 1, dim] -> [B, 1, dim]; context.mask is over the cache's slots."""
        query, key, value = self.project(x, context)
        cache.append(key, value, context.positions)
        return self._output(context.attend(query, cache.keys, cache.values, self.scale))

    def fused_decode(self, norm: RMSNorm, cache: SWACache, rotation: Rotation) -> Step | None:
        """As in Mixer; None with heads too wide for a multiprocessor's memory."""
        if self.head_dim > kernels.WIDEST_HEAD:
            return None
        gains = None
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            gains = self.q_norm.weight, self.k_norm.weight
        clock = cache.clock.starts, cache.clock.length

        def step(stream: kernels.Stream) -> kernels.Stream:
            stream, qkv = kernels.normed_linear(stream, norm.weight, EPS, self.wqkv.weight)
            qkv = qkv.unflatten(1, (-1, self.queries_per_key + 2, self.head_dim))
            slots = cache.keys, cache.values, cache.sink
            attended = kernels.ring_attention(qkv, rotation, gains, clock, *slots, self.scale, EPS)
            return kernels.add_linear(stream, attended, self.wo.weight)

        return step

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
