"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one small latent gives all heads' keys and values."""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from swamla_titan.kernels import decode as kernels
from swamla_titan.kernels.attention.dispatch import Heads, Projections, SelectiveImplementation
from swamla_titan.kernels.attention.masks import MaskSpec, Selection, SelectionRule
from swamla_titan.kernels.attention.selective import selecting_head
from swamla_titan.model.branch import (
    Attention,
    AttentionContext,
    Clock,
    Gathered,
    KeyExchange,
    Saved,
    SelectingHead,
    Step,
)
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import EPS, Linear, RMSNorm, Role, Rotary, Rotation, rotate


class MLACache:
    """The latent and the rotary key of every token: kv_lora_rank + rope elements each, for all heads together."""

    def __init__(self, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> None:
        self.clock = clock
        batch, device = clock.starts.shape[0], clock.starts.device
        self.latents = torch.zeros(batch, max_tokens, config.kv_lora_rank, dtype=dtype, device=device)
        self.rope_keys = torch.zeros(batch, max_tokens, config.qk_rope_head_dim, dtype=dtype, device=device)

    def fill(self, latents: Tensor, rope_keys: Tensor) -> None:
        """Store the prompts' latents [B, T, R] and rotated keys [B, T, rope]."""
        self.latents[:, : latents.shape[1]] = latents
        self.rope_keys[:, : rope_keys.shape[1]] = rope_keys

    def append(self, latents: Tensor, rope_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token per sequence, [B, 1, R] and [B, 1, rope]; returns all slots, [B, S, R] and [B, S, rope]."""
        self.latents.index_copy_(1, self.clock.length, latents)
        self.rope_keys.index_copy_(1, self.clock.length, rope_keys)
        return self.latents, self.rope_keys

    def next_mask(self) -> Tensor:
        """Which slots the next token sees, boolean [B, 1, 1, S]."""
        index, starts = torch.arange(self.latents.shape[1], device=self.latents.device), self.clock.starts[:, None]
        return ((index >= starts) & (index <= self.clock.length))[:, None, None]


class SelectiveMLACache(MLACache):
    """MLACache with one more value per token: how much later ones have selected it (kernels/attention/selective.py).

    Where there are more tokens than room, each sequence drops those that were selected most, but never its first token
    nor the newest. Padding counts as selected infinitely, so it is dropped first.
    """

    def __init__(self, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> None:
        super().__init__(config, clock, max_tokens, dtype)
        batch, device = clock.starts.shape[0], clock.starts.device
        kind = torch.promote_types(dtype, torch.float32)
        self.room = max_tokens
        self.selected = torch.zeros(batch, max_tokens, dtype=kind, device=device)
        # [B, room]: True in the slot of the first token, and in that of the newest.
        self.is_first = torch.zeros(batch, max_tokens, dtype=torch.bool, device=device)
        self.is_newest = torch.zeros_like(self.is_first)

    def fill_selected(self, latents: Tensor, rope_keys: Tensor, selected: Tensor) -> None:
        """`fill`, with how much the prompts' tokens selected each other, [B, T]."""
        index, starts = torch.arange(latents.shape[1], device=latents.device), self.clock.starts[:, None]
        selected = selected.masked_fill(index < starts, float("inf"))
        is_first, is_newest = index == starts, (index == index[-1]).expand_as(selected)
        if latents.shape[1] > self.room:
            order = selected.masked_fill(is_first | is_newest, -1).flip(1).sort(dim=1, stable=True).indices
            kept = (index[-1] - order[:, : self.room]).sort(dim=1).values  # of equals the newer ones
            selected, is_first, is_newest = (x.gather(1, kept) for x in (selected, is_first, is_newest))
            latents, rope_keys = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in (latents, rope_keys))
        self.fill(latents, rope_keys)
        for stored, now in ((self.selected, selected), (self.is_first, is_first), (self.is_newest, is_newest)):
            stored.zero_()
            stored[:, : latents.shape[1]] = now

    def append(self, latents: Tensor, rope_keys: Tensor) -> tuple[Tensor, Tensor]:
        """As in MLACache; once the cache is full, a token takes the slot of one that is dropped."""
        least_wanted = self.selected.masked_fill(self.is_first | self.is_newest, -1).argmax(dim=1, keepdim=True)
        slot = torch.where(self.clock.length < self.room, self.clock.length, least_wanted)  # [B, 1]
        for stored, now in ((self.latents, latents), (self.rope_keys, rope_keys)):
            stored.scatter_(1, slot[..., None].expand(-1, -1, now.shape[2]), now)
        self.selected.scatter_(1, slot, 0)
        self.is_newest.zero_().scatter_(1, slot, True)
        return self.latents, self.rope_keys

    def select(self, scores: Tensor) -> None:
        """Add what the newest token selects, by the selecting head's scores [B, S]; `append` resets an empty slot."""
        self.selected += scores.relu().masked_fill(self.is_first | self.is_newest, 0)

    def next_mask(self) -> Tensor:
        """As in MLACache: the slots in use, because what was selected infinitely has no weight."""
        in_use = torch.arange(self.room, device=self.selected.device) <= self.clock.length
        return in_use.expand(self.selected.shape[0], 1, 1, -1)


class LatentAttention(Attention):
    """Causal attention whose keys are [part from the latent, one rotary key shared by all heads].

    Rows of `wq` (or `wq_b`) are [heads, nope + rope] and of `wkv_b` [heads, nope + v]: whole heads stay together.
    """

    linear_input: ClassVar[bool] = True
    key_exchange: ClassVar[KeyExchange] = "gather"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        self.qk_dim = self.nope_dim + self.rope_dim
        self.scale = self.qk_dim**-0.5
        self.q_lora_rank, heads = config.q_lora_rank, config.num_heads
        if self.q_lora_rank:
            self.wq_a = Linear(config.dim, self.q_lora_rank, Role.REPLICATED)
            self.q_norm = RMSNorm(self.q_lora_rank)
            self.wq_b = Linear(self.q_lora_rank, heads * self.qk_dim, Role.LATENT_COLUMN, (self.qk_dim,))
        else:
            self.wq = Linear(config.dim, heads * self.qk_dim, Role.COLUMN, (self.qk_dim,))
        parts = (self.latent_dim, self.rope_dim)
        self.wkv_a = Linear(config.dim, sum(parts), Role.REPLICATED, parts)
        self.kv_norm = RMSNorm(self.latent_dim)
        # Not kept: the latent is far narrower than other layers' inputs, and this output is the widest of a block.
        parts = (self.nope_dim, self.v_dim)
        self.wkv_b = Linear(self.latent_dim, heads * sum(parts), Role.LATENT_COLUMN, parts, recomputed=True)
        self.wo = Linear(heads * self.v_dim, config.dim, Role.RESIDUAL_OUTPUT, (self.v_dim,))
        head = self.selection_head(config)
        self.selecting_head = None if head is None else SelectingHead(head)

    @classmethod
    def mask(cls, config: ModelConfig) -> MaskSpec:
        """As in Attention."""
        return MaskSpec()

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        """As in Attention: of the heads' rotary parts alone."""
        return Rotary(config.qk_rope_head_dim, config.mla_rope_theta or config.rope_theta)

    @classmethod
    def heads(cls, config: ModelConfig) -> Heads:
        """As in Attention: of the keys and values that the latent is expanded to."""
        qk_width = config.qk_nope_head_dim + config.qk_rope_head_dim
        return Heads(config.num_heads, config.num_heads, qk_width, config.v_head_dim)

    @classmethod
    def gathered(cls, config: ModelConfig) -> Gathered:
        """As in Attention: the latent and the rotary key; and what each chunk's queries select of each key."""
        selects = cls.selection_head(config) is not None
        return Gathered(config.kv_lora_rank + config.qk_rope_head_dim, sums=int(selects))

    @classmethod
    def selection_head(cls, config: ModelConfig) -> int | None:
        """As in Attention."""
        return config.selection_head if config.mla_selective else None

    @classmethod
    def projections(cls, config: ModelConfig) -> Projections:
        """As in Attention."""
        return Projections("latent", config.qk_rope_head_dim)

    @classmethod
    def saved(cls, config: ModelConfig, tensor: int) -> Saved:
        """As in Branch.

        Of own tokens the normed latent (and with a query rank the query's, twice), queries and attention's result. Of
        every token the gathered latent, keys, and the latent's expansion, in which the values lie. Where heads are
        sharded, the selecting one's queries and keys beside own ones. latent_hopper.py saves no expanded keys but the
        rotary part of queries a second time, less by (qk_nope_head_dim) elements a head; this is what others save.
        """
        heads = cls.heads(config)
        compressed = cls.gathered(config).local + 2 * config.q_lora_rank
        own = compressed + heads.queries * (heads.qk_width + heads.v_width) / tensor
        expanded = heads.qk_width + config.qk_nope_head_dim + heads.v_width
        selecting = heads.qk_width if config.mla_selective and tensor > 1 else 0
        of_every_token = config.kv_lora_rank + heads.keys * expanded / tensor + selecting
        return Saved(own + selecting, of_every_token, saves_result=True)

    @classmethod
    def new_cache(cls, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> MLACache:
        """As in Attention."""
        return (SelectiveMLACache if config.mla_selective else MLACache)(config, clock, max_tokens, dtype)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        if self.fused_attention is not None and self.fused_attention.serves(context):
            latent, rope_key = self.latents(x)
            heads = self.queries(x), self.keys_values(latent), rope_key
            return self._output(self.fused_attention(context, self.scale, *heads))
        latent, rope_key = self.inner_attention.gather(*self.compress(x, context), context)
        query, key, value = self.expand(x, latent, rope_key, context)
        selection = self._selection(query, key, context)
        if selection is not None:
            sums = partial(self._selected_sums, query, key, selection, context)
            selection = selection._replace(before=self.inner_attention.sums_before(sums, context))
        return self._output(self.inner_attention(query, key, value, context, self.scale, selection))

    def prefill(self, x: Tensor, context: AttentionContext, cache: MLACache) -> Tensor:
        """`forward` that also fills the cache."""
        latent, rope_key = self.compress(x, context)
        query, key, value = self.expand(x, latent, rope_key, context)
        selection = self._selection(query, key, context)
        if selection is None:
            cache.fill(latent, rope_key.squeeze(2))
        else:
            assert isinstance(cache, SelectiveMLACache)
            sums = self._selected_sums(query, key, selection, context)
            cache.fill_selected(latent, rope_key.squeeze(2), sums[:, 0])
        return self._output(context.attend(query, key, value, self.scale, selection))

    def decode(self, x: Tensor, context: AttentionContext, cache: MLACache) -> Tensor:
        """The next token of each sequence, [B, 1, dim] -> [B, 1, dim]; context.mask is over the cache's slots.

        The latent's up-projection is absorbed into query and output, so keys and values are never made:
        q . (W_k c) = (W_k^T q) . c, and sum_s p_s (W_v c_s) = W_v (sum_s p_s c_s). It reads `wkv_b.weight` itself,
        which only a decode on plain parameters may do; training goes through the modules.
        """
        latent, rope_key = self.compress(x, context)
        latents, rope_keys = cache.append(latent, rope_key.squeeze(2))  # [B, S, R], [B, S, rope]
        q_nope, q_rope = self.rotated_queries(x, context)
        up = self.wkv_b.weight.to(x.dtype).unflatten(0, (-1, self.nope_dim + self.v_dim))  # [H, nope + v, R]
        w_key, w_value = up.split([self.nope_dim, self.v_dim], dim=1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_key)  # [B, 1, H, R]
        scores = torch.einsum("bthr,bsr->bhts", q_latent, latents) + torch.einsum("bthp,bsp->bhts", q_rope, rope_keys)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32)) * self.scale
        assert isinstance(context.mask, Tensor)
        if self.selecting_head is not None:
            assert isinstance(cache, SelectiveMLACache)
            selecting = scores[:, self.selecting_head.head, 0]
            scores = scores - cache.selected[:, None, None]
            cache.select(selecting)
        weights = scores.masked_fill(~context.mask, float("-inf")).softmax(dim=-1).to(x.dtype)  # [B, H, 1, S]
        mixed = torch.einsum("bhts,bsr->bthr", weights, latents)
        return self._output(torch.einsum("bthr,hvr->bthv", mixed, w_value))

    def fused_decode(self, norm: RMSNorm, cache: MLACache, rotation: Rotation) -> Step | None:
        """As in Mixer; None with selective attention, and with latents too wide for a multiprocessor's memory."""
        if self.selecting_head is not None or self.latent_dim > kernels.WIDEST_LATENT:
            return None
        first = self.wq_a if self.q_lora_rank else self.wq
        weight = torch.cat([first.weight, self.wkv_a.weight])  # one linear layer, because they have the same input
        widths = first.out_features, self.wkv_a.out_features
        up = self.wkv_b.weight.unflatten(0, (-1, self.nope_dim + self.v_dim))
        clock = cache.clock.starts, cache.clock.length

        def step(stream: kernels.Stream) -> kernels.Stream:
            stream, projected = kernels.normed_linear(stream, norm.weight, EPS, weight)
            query, new = projected.split(widths, dim=1)
            if self.q_lora_rank:
                _, query = kernels.normed_linear(kernels.Stream(query), self.q_norm.weight, EPS, self.wq_b.weight)
            query, gain = query.unflatten(1, (-1, self.qk_dim)), self.kv_norm.weight
            stored = cache.latents, cache.rope_keys
            attended = kernels.latent_attention(query, new, up, rotation, gain, clock, *stored, self.scale, EPS)
            return kernels.add_linear(stream, attended, self.wo.weight)

        return step

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> queries [B, T, H, nope + rope], not rotated."""
        query: Tensor = self.wq_b(self.q_norm(self.wq_a(x))) if self.q_lora_rank else self.wq(x)
        return query.unflatten(-1, (-1, self.qk_dim))

    def rotated_queries(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> queries without position [B, T, H, nope] and rotated queries [B, T, H, rope]."""
        q_nope, q_rope = self.queries(x).split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope, rotate(q_rope, context.rotation)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> normed latent [B, T, R] and shared key [B, T, rope], not rotated."""
        latent, rope_key = self.wkv_a(x).split([self.latent_dim, self.rope_dim], dim=-1)
        return self.kv_norm(latent), rope_key

    def compress(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> what decoding keeps: normed latent [B, T, R] and rotated shared key [B, T, 1, rope]."""
        latent, rope_key = self.latents(x)
        return latent, rotate(rope_key.unsqueeze(2), context.rotation)

    def keys_values(self, latent: Tensor) -> Tensor:
        """Latents [B, S, R] -> each head's part of its keys, and its values, [B, S, H, nope + v]."""
        return self.wkv_b(latent).unflatten(-1, (-1, self.nope_dim + self.v_dim))

    def expand(
        self, x: Tensor, latent: Tensor, rope_key: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, nope + rope] of x [B, T, dim]; keys [B, S, H, nope + rope] and values [B, S, H, v].

        The keys and values are made from latents [B, S, R] and rotated keys [B, S, 1, rope].
        """
        q_nope, q_rope = self.rotated_queries(x, context)
        k_nope, value = self.keys_values(latent).split([self.nope_dim, self.v_dim], dim=-1)
        query = torch.cat([q_nope, q_rope], dim=-1)
        key = torch.cat([k_nope, rope_key.expand(-1, -1, k_nope.shape[2], -1)], dim=-1)
        return query, key, value

    def _selection(self, query: Tensor, key: Tensor, context: AttentionContext) -> Selection | None:
        """What the selecting head selects of the keys [B, S, H, D] by the queries [B, T, H, D], if there is one."""
        if self.selecting_head is None:
            return None
        assert isinstance(context.mask, SelectionRule)
        selection: Selection = self.selecting_head(query, key, context.mask)
        return selection

    def _selected_sums(self, query: Tensor, key: Tensor, selection: Selection, context: AttentionContext) -> Tensor:
        """What each chunk of the queries selects of each key, [B, chunks, S]."""
        assert isinstance(context.implementation, SelectiveImplementation)
        by = selecting_head(query, key, selection.query, selection.key, selection.head)
        return context.implementation.sums(*by, selection.rule, self.scale)
