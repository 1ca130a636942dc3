"""A language model of interleaved sliding-window attention with sinks and multi-head latent attention.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))        in each block
    x = x + annex(x, ids of the tokens)                               before the blocks of some layers, as an Engram

Tokens of a padded batch have the position -1 in the padding. Positions, masks and rotations are made once for all
blocks (`SwamlaModel.plan`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_swamla import SwamlaConfig

SLIDING, FULL = "sliding_attention", "full_attention"
# What forward calls the cache in its output: transformers has renamed it.
CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)
DENSE = ("eager", "sdpa")  # implementations of attention that take a mask with an element for each query and key


class SwamlaCacheLayer(CacheLayerMixin):
    """What a block remembers of the tokens so far, as tensors with the batch first; `room` tokens, None: it grows.

    With room all tensors keep their place in memory, so that decoding can be compiled.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    tensors = ("keys", "values", "positions", "selected", "ngram_ids", "convolved")

    keys: Any
    values: Any
    positions: Any
    selected: Any

    def __init__(self, config: SwamlaConfig, room: int | None) -> None:
        super().__init__()
        self.config, self.room = config, room
        self.is_compileable, self.is_empty = room is not None, True
        self.length: Any = 0 if room is None else torch.zeros((), dtype=torch.int64)
        self.positions = self.selected = None
        # Of an Engram before the block: ids of the latest tokens, and inputs of its convolution.
        self.ngram_ids: Tensor | None = None
        self.convolved: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Begin with the first tokens; subclasses allocate."""
        self.device = key_states.device
        if self.room is not None:
            self.length = self.length.to(self.device)
            self._keep_address(self.length)
        self.is_initialized = True

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """Let `tensor` be what is remembered under a name; returns what is remembered."""
        before = getattr(self, name)
        if self.room is not None and before is not None:
            return before.copy_(tensor)
        if self.room is not None:
            self._keep_address(tensor)
        setattr(self, name, tensor)
        return tensor

    def _keep_address(self, tensor: Tensor) -> None:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)

    def advance(self, tokens: int) -> None:
        """Count further tokens."""
        self.is_empty = False
        self.length = self.length + tokens if self.room is None else self.length.add_(tokens)

    def get_seq_length(self, *unused: Any) -> Any:
        """Tokens so far, with those of the padding."""
        return self.length

    def get_mask_sizes(self, query_length: int, *unused: Any) -> tuple[int, int]:
        """As if all tokens were remembered: masks of other forms come from `SwamlaModel.plan`."""
        return (int(self.length) + query_length if self.room is None else self.room), 0

    def get_max_length(self) -> int:
        """The most tokens; -1: any number."""
        return -1 if self.room is None else self.room

    get_max_cache_shape = get_max_length  # its name before

    @property
    def max_cache_len(self) -> int:
        """The same."""
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Sequences, once there are tokens."""
        return -1 if self.keys is None else self.keys.shape[0]

    max_batch_size = batch_size  # its name before

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a window has overwritten what stood there before."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a cache with a window cannot be cropped, so nothing can be drafted and taken back"
            )

    def _map(self, change: Any) -> None:
        for name in self.tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_empty = True
        if self.room is None:
            self.length, self.is_initialized = 0, False
            for name in self.tensors:
                setattr(self, name, None)
        elif self.is_initialized:
            self.length.zero_()
            self._map(lambda tensor: tensor.zero_())
            for name in ("positions", "ngram_ids"):
                if (tensor := getattr(self, name)) is not None:
                    tensor.fill_(-1)

    def offload(self) -> None:
        """Move all to the host."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all back to the device."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _select(self, change: Any) -> None:
        self._map(lambda tensor: change(tensor) if self.room is None else tensor.copy_(change(tensor)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the sequences be those at these indices, as beam search asks for."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._map(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))


class WindowCacheLayer(SwamlaCacheLayer):
    """Rotated keys and values of the first `sinks` tokens and of the latest `window - 1`, which is all that is needed.

    keys and values are [B, G, slots, D], `positions` [B, slots] says which token each slot holds; -1: none. The token
    at position p goes to slot sinks + p % (window - 1), one at p < sinks to slot p as well, and padding to the last
    slot, where nothing is seen.
    """

    is_sliding = True

    def __init__(self, config: SwamlaConfig, room: int | None) -> None:
        super().__init__(config, room)
        self.sinks, self.ring = config.sliding_window_sinks, max(config.sliding_window - 1, 1)
        self.slots = self.sinks + self.ring + 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate all slots. Zeros and not empty: 0 * NaN is NaN, also where nothing is seen."""
        super().lazy_initialization(key_states)
        batch, heads, _, width = key_states.shape
        for name in ("keys", "values"):
            self.kept(name, key_states.new_zeros(batch, heads, self.slots, width))
        empty = torch.full((batch, self.slots), -1, dtype=torch.int64, device=key_states.device)
        self.kept("positions", empty)

    def update(
        self, key_states: Tensor, value_states: Tensor, positions: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, G, n, D] of tokens at positions [B, n]; all slots as they were before, and behind them what is new.

        Slots are left out while there is nothing in them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        seen = key_states, value_states
        if not self.is_empty:
            seen = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        last, unseen = positions.amax(dim=1, keepdim=True), self.slots - 1
        slots = [
            torch.where((positions >= 0) & (positions > last - self.ring), self.sinks + positions % self.ring, unseen)
        ]
        if self.sinks:
            slots.append(torch.where((positions >= 0) & (positions < self.sinks), positions, unseen))
        for slot in slots:
            self.positions.scatter_(1, slot, positions)
            at = slot[:, None, :, None].expand(-1, key_states.shape[1], -1, key_states.shape[3])
            self.keys.scatter_(2, at, key_states)
            self.values.scatter_(2, at, value_states)
        self.positions[:, unseen] = -1
        self.advance(key_states.shape[2])
        return seen


class LatentCacheLayer(SwamlaCacheLayer):
    """The latent and the rotary key of every token, for all heads together: keys [B, 1, S, R], values [B, 1, S, rope].

    `selected` [B, S]: in selective attention, how much later tokens have selected of each.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate the room, if there is one."""
        super().lazy_initialization(key_states)
        assert value_states is not None
        slots, batch = self.room or 0, key_states.shape[0]
        self.kept("keys", key_states.new_zeros(batch, 1, slots, key_states.shape[3]))
        self.kept("values", value_states.new_zeros(batch, 1, slots, value_states.shape[3]))
        if self.config.selection_head is not None:
            kind = torch.promote_types(key_states.dtype, torch.float32)
            self.kept("selected", key_states.new_zeros(batch, slots, dtype=kind))

    def update(self, key_states: Tensor, value_states: Tensor, *unused: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store [B, 1, n, R] and [B, 1, n, rope]; all so far, or all slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self.room is None:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            if self.selected is not None:
                self.selected = F.pad(self.selected, (0, tokens))
        else:
            at = torch.arange(tokens, device=key_states.device) + self.length
            self.keys.index_copy_(2, at, key_states)
            self.values.index_copy_(2, at, value_states)
        self.advance(tokens)
        return self.keys, self.values


def with_own_layers(cache: Cache, config: SwamlaConfig) -> Cache:
    """Give a new cache of transformers the layers of this model: windows with sinks, and latents.

    Raises ValueError for one that holds tokens of other layers, or stores them in a form of its own.
    """
    known = isinstance(cache, DynamicCache | StaticCache)
    if known and any(isinstance(layer, SwamlaCacheLayer) for layer in cache.layers):
        return cache
    if not known or cache.get_seq_length():
        raise ValueError(
            f"this model needs a new DynamicCache or StaticCache, and not a used one or a {type(cache).__name__}"
        )
    rooms = [layer.max_cache_len for layer in cache.layers if isinstance(cache, StaticCache)]
    room = max(rooms) if rooms else None
    kinds = {SLIDING: WindowCacheLayer, FULL: LatentCacheLayer}
    cache.layers = [kinds[layer_type](config, room) for layer_type in config.layer_types]
    cache.layer_class_to_replicate = None
    return cache


class SwamlaRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class SwamlaDynamicTanh(nn.Module):
    """tanh(alpha x) * weight + bias, computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        squashed = torch.tanh(self.alpha.to(wide) * x.to(wide))
        return (squashed * self.weight.to(wide) + self.bias.to(wide)).to(x.dtype)


def new_norm(config: SwamlaConfig) -> nn.Module:
    """The norm over the residual stream."""
    if config.norm == "dynamic_tanh":
        return SwamlaDynamicTanh(config.hidden_size)
    return SwamlaRMSNorm(config.hidden_size, config.rms_norm_eps)


def rotation(positions: Tensor, width: int, settings: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, width / 2] of positions [B, T], in float32 or wider.

    Angles are computed in float64, where the device has it: at position 100,000 a float32 angle is off by 0.004.
    """
    kind = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=kind, device=positions.device) / width
    scaled = positions.clamp(min=0).to(kind) / settings.get("factor", 1.0)
    angles = scaled[:, None, :, None] * settings["rope_theta"] ** -exponents
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [B, H, T, D], whose element i is paired with element i + D / 2."""
    cos, sin = by
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Softmax attention written down: [B, H, T, D], [B, G, S, D], [B, G, S, E] -> [B, T, H, E], and the weights.

    Without a mask it is causal, and the last query is that of the last key.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).to(torch.promote_types(query.dtype, torch.float32))
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(
            scores.shape[3] - scores.shape[2]
        )
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class SwamlaAttention(nn.Module):
    """What both kinds of attention have in common: the call of the implementation that the configuration names."""

    is_causal = True
    layer_type: str

    def __init__(self, config: SwamlaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = 1
        self.sliding_window: int | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As eager_attention has it; [B, T, H * E] and the weights, if the implementation gives them."""
        name = self.config._attn_implementation
        call, width = eager_attention, value.shape[-1]
        if name not in DENSE and key.shape[-1] != width:  # most kernels know one width
            value = F.pad(value, (0, key.shape[-1] - width))
        if name != "eager":
            call = ALL_ATTENTION_FUNCTIONS[name]
        out, weights = call(
            self, query, key, value, mask, scaling=scaling, dropout=0.0, sliding_window=self.sliding_window, **kwargs
        )
        out = out.reshape(query.shape[0], query.shape[2], query.shape[1], -1)[..., :width]
        return out.flatten(2), weights


class SwamlaSlidingAttention(SwamlaAttention):
    """Rotary attention over the latest keys and the first ones of the document.

    Rows of `wqkv` are grouped by key/value head: [key/value heads, its queries + its key + its value, head_dim].
    """

    layer_type = SLIDING

    def __init__(self, config: SwamlaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = SwamlaRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = SwamlaRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        by: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights."""
        groups = self.wqkv(x).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))  # [B, T, G, H/G + 2, D]
        query, key, value = groups.split([self.num_key_value_groups, 1, 1], dim=-2)
        query = rotate(self.q_norm(query.flatten(2, 3)).transpose(1, 2), by)
        key = rotate(self.k_norm(key.squeeze(-2)).transpose(1, 2), by)
        value = value.squeeze(-2).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, positions)
        attended, weights = self.attend(query, key, value, mask, self.scaling, **kwargs)
        return self.wo(attended), weights


class SwamlaLatentAttention(SwamlaAttention):
    """Multi-head latent attention: keys are [a part from the latent, one rotary key shared by all heads].

    Rows of `wq` (or `wq_b`) are [heads, nope + rope], those of `wkv_b` [heads, nope + v].
    """

    layer_type = FULL

    def __init__(self, config: SwamlaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, hidden, eps = config.num_attention_heads, config.hidden_size, config.rms_norm_eps
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_dim, self.qk_dim = config.kv_lora_rank, config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling, self.q_lora_rank, self.selection_head = (
            self.qk_dim**-0.5,
            config.q_lora_rank,
            config.selection_head,
        )
        if self.q_lora_rank:
            self.wq_a = nn.Linear(hidden, self.q_lora_rank, bias=False)
            self.q_norm = SwamlaRMSNorm(self.q_lora_rank, eps)
            self.wq_b = nn.Linear(self.q_lora_rank, heads * self.qk_dim, bias=False)
        else:
            self.wq = nn.Linear(hidden, heads * self.qk_dim, bias=False)
        self.wkv_a = nn.Linear(hidden, self.latent_dim + self.rope_dim, bias=False)
        self.kv_norm = SwamlaRMSNorm(self.latent_dim, eps)
        self.wkv_b = nn.Linear(self.latent_dim, heads * (self.nope_dim + self.v_dim), bias=False)
        self.wo = nn.Linear(heads * self.v_dim, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        by: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor,
        cache: Cache | None,
        selectable: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights.

        `selectable` [B, T, S]: in selective attention, which keys a query may select.
        """
        q_nope, q_rope = self.queries(x, by)
        if selectable is not None and q_nope.shape[1] != self.config.num_attention_heads:
            raise ValueError("selective attention: a rank of tensor parallelism may lack the head that selects")
        latent, rope_key = self.wkv_a(x)[:, None].split([self.latent_dim, self.rope_dim], dim=-1)
        latent, rope_key = self.kv_norm(latent), rotate(rope_key, by)  # [B, 1, T, R] and [B, 1, T, rope]
        if cache is not None:
            latent, rope_key = cache.update(latent, rope_key, self.layer_idx, positions)
        weights: Tensor | None = None
        if cache is not None and x.shape[1] == 1 and self._can_absorb(x):
            attended, weights = self._absorbed(q_nope, q_rope, latent, rope_key, mask, selectable, cache)
        else:
            query, key, value = self.expand(q_nope, q_rope, latent, rope_key)
            if selectable is None:
                attended, weights = self.attend(query, key, value, mask, self.scaling, **kwargs)
            else:
                attended = self._selective(query, key, value, mask, selectable, cache)
        return self.wo(attended), weights

    def queries(self, x: Tensor, by: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, hidden] -> queries without position [B, H, T, nope], and rotated ones [B, H, T, rope]."""
        query = self.wq_b(self.q_norm(self.wq_a(x))) if self.q_lora_rank else self.wq(x)
        heads = query.unflatten(-1, (-1, self.qk_dim)).transpose(1, 2)
        q_nope, q_rope = heads.split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope, rotate(q_rope, by)

    def expand(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, nope + rope], keys [B, H, S, nope + rope] and values [B, H, S, v] of S latents."""
        expanded = self.wkv_b(latent[:, 0]).unflatten(-1, (-1, self.nope_dim + self.v_dim)).transpose(1, 2)
        k_nope, value = expanded.split([self.nope_dim, self.v_dim], dim=-1)
        key = torch.cat([k_nope, rope_key.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        return torch.cat([q_nope, q_rope], dim=-1), key, value

    def _selective(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, selectable: Tensor, cache: Cache | None
    ) -> Tensor:
        """Selective attention, in float32 or wider because sums of scores are subtracted from the logits."""
        wide, head = torch.promote_types(query.dtype, torch.float32), self.selection_head
        query, key = query.to(wide), key.to(wide)
        scores = query[:, head] @ key[:, head].transpose(1, 2) * self.scaling  # [B, T, S]
        bias = self._bias(self._selected(scores, selectable, cache), mask)
        out = F.scaled_dot_product_attention(query, key, value.to(wide), attn_mask=bias, scale=self.scaling)
        return out.to(value.dtype).transpose(1, 2).flatten(2)

    def _can_absorb(self, x: Tensor) -> bool:
        """Whether `wkv_b` is its weight and nothing else: adapters, quantization and offloading need its forward."""
        weight = self.wkv_b.weight
        plain = type(self.wkv_b) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point()
        dense = self.config._attn_implementation in DENSE
        return dense and plain and weight.device == x.device and not self.wkv_b._forward_hooks

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        selectable: Tensor | None,
        cache: Cache,
    ) -> tuple[Tensor, Tensor]:
        """Attention of one query over latents, from which keys and values need not be made.

        q . (W_k c) = (W_k^T q) . c, and sum_s p_s (W_v c_s) = W_v (sum_s p_s c_s).
        """
        up = self.wkv_b.weight.to(q_nope.dtype).unflatten(0, (-1, self.nope_dim + self.v_dim))  # [H, nope + v, R]
        w_key, w_value = up.split([self.nope_dim, self.v_dim], dim=1)
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, w_key)
        scores = q_latent @ latent.transpose(2, 3) + q_rope @ rope_key.transpose(2, 3)  # [B, H, 1, S]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scaling
        if selectable is not None:
            selected = self._selected(scores[:, self.selection_head], selectable, cache)
            scores = scores + self._bias(selected, mask)
        elif mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1).to(latent.dtype)
        return torch.einsum("bhtr,hvr->bthv", weights @ latent, w_value).flatten(2), weights

    def _selected(self, scores: Tensor, selectable: Tensor, cache: Cache | None) -> Tensor:
        """How much earlier queries have selected of each key, [B, T, S], from the selecting head's scores [B, T, S]."""
        selected = torch.where(selectable, scores.relu(), 0.0)
        earlier = selected.cumsum(dim=1) - selected
        if cache is not None:
            before = cache.layers[self.layer_idx].selected
            earlier = earlier + before[:, None]
            before.add_(selected.sum(dim=1))
        return earlier

    @staticmethod
    def _bias(selected: Tensor, mask: Tensor | None) -> Tensor:
        """What is added to the logits of all heads, [B, 1, T, S]."""
        assert mask is not None
        return (-selected[:, None]).masked_fill(~mask, float("-inf"))


class SwamlaCompressedIds(nn.Module):
    """The ids that stand for tokens in n-grams: tokens whose texts differ in case, accents or white space share one."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(tokens, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T]."""
        ids: Tensor = self.get_buffer("ids")
        return ids[tokens]


class SwamlaTable(nn.Module):
    """Rows of all n-gram tables of a layer."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, rows: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return F.embedding(rows, self.weight)


class SwamlaConvolution(nn.Module):
    """silu(sum over taps k of w[k] * norm(x)[t - k * dilation]), per channel; before the document's start lie zeros."""

    def __init__(self, dim: int, kernel: int, dilation: int, eps: float) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.norm = SwamlaRMSNorm(dim, eps)
        self.weight = nn.Parameter(torch.zeros(kernel * dim))

    def forward(self, x: Tensor, positions: Tensor, layer: SwamlaCacheLayer | None) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        wide, halo = torch.promote_types(x.dtype, torch.float32), (self.kernel - 1) * self.dilation
        normed = F.rms_norm(x.to(wide), x.shape[-1:], eps=self.norm.eps).to(x.dtype)
        before = None if layer is None else layer.convolved
        if before is None:
            before = normed.new_zeros(normed.shape[0], halo, normed.shape[2])
        section = torch.cat([before, normed], dim=1)
        if layer is not None:
            layer.kept("convolved", section[:, section.shape[1] - halo :].clone())
        taps = self.weight.to(wide).view(self.kernel, -1) * self.norm.weight.to(wide)
        total = section[:, halo:].to(wide) * taps[0]
        for k in range(1, self.kernel):
            lag = k * self.dilation
            earlier = section[:, halo - lag : section.shape[1] - lag].to(wide)
            total = total + torch.where(positions[..., None] >= lag, earlier, 0.0) * taps[k]
        return F.silu(total).to(x.dtype)


class SwamlaEngram(nn.Module):
    """Rows of the n-grams that end at a token, gated by the residual stream and mixed by a short convolution.

    The index of a row is (id[t] * m[0]) XOR (id[t - 1] * m[1]) XOR ..., modulo the prime of its table.
    """

    def __init__(self, config: SwamlaConfig, layer_idx: int) -> None:
        super().__init__()
        own, hidden, eps = config.engram, config.hidden_size, config.rms_norm_eps
        assert own is not None
        hashes = own["hashes"][str(layer_idx)]
        self.layer_idx, self.pad, self.orders = layer_idx, own["pad_id"], own["orders"]
        self.multipliers, self.primes = hashes["multipliers"], hashes["primes"]
        self.sharpen_gate = own["sharpen_gate"]
        tables = [prime for primes in self.primes for prime in primes]
        self.table = SwamlaTable(sum(tables), own["d_mem"] // len(tables))
        self.key = nn.Linear(own["d_mem"], hidden, bias=False)
        self.value = nn.Linear(own["d_mem"], hidden, bias=False)
        self.query_norm, self.key_norm = SwamlaRMSNorm(hidden, eps), SwamlaRMSNorm(hidden, eps)
        self.convolution = SwamlaConvolution(hidden, own["kernel"], self.orders[-1], eps)

    def forward(self, x: Tensor, ids: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """The residual stream [B, T, hidden] with this branch added, for compressed ids [B, T]."""
        layer = None if cache is None else cache.layers[self.layer_idx]
        memory = self.table(self.rows(ids, positions, layer)).flatten(-2)
        value = self.gated(x, memory)
        return x + value + self.convolution(value, positions, layer)

    def rows(self, ids: Tensor, positions: Tensor, layer: SwamlaCacheLayer | None) -> Tensor:
        """The rows to look up, [B, T, tables]."""
        lookback = self.orders[-1] - 1
        before = None if layer is None else layer.ngram_ids
        if before is None:
            before = ids.new_full((ids.shape[0], lookback), self.pad)
        section = torch.cat([before, ids], dim=1)
        if layer is not None:
            layer.kept("ngram_ids", section[:, section.shape[1] - lookback :].clone())
        mixed, found, offset = ids * self.multipliers[0], [], 0
        for lag in range(1, lookback + 1):
            earlier = section[:, lookback - lag : section.shape[1] - lag]
            mixed = mixed ^ (torch.where(positions >= lag, earlier, self.pad) * self.multipliers[lag])
            for prime in self.primes[self.orders.index(lag + 1)] if lag + 1 in self.orders else ():
                found.append(mixed % prime + offset)
                offset += prime
        return torch.stack(found, dim=-1)

    def gated(self, x: Tensor, memory: Tensor) -> Tensor:
        """sigmoid(<norm(x), norm(W_k e)> / sqrt(hidden)) W_v e, of what was looked up, e [B, T, d_mem]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        query, key = x.to(wide), self.key(memory).to(wide)
        eps, gain = self.key_norm.eps, self.query_norm.weight.to(wide) * self.key_norm.weight.to(wide)
        rms = (query.square().mean(dim=-1) + eps).rsqrt() * (key.square().mean(dim=-1) + eps).rsqrt()
        score = (query * key * gain).sum(dim=-1) * rms / math.sqrt(x.shape[-1])
        if self.sharpen_gate:
            score = score.sign() * score.abs().clamp(min=1e-6).sqrt()
        return (score.sigmoid()[..., None] * self.value(memory)).to(x.dtype)


ANNEXES = {"engram": SwamlaEngram}  # what stands before the blocks of some layers, by its settings in config.json


def annex_settings(config: SwamlaConfig) -> dict[str, dict[str, Any]]:
    """The settings of each annex that the model has, in their order before a block."""
    return {name: own for name in ANNEXES if (own := getattr(config, name, None))}


class SwamlaFeedForward(nn.Module):
    """down(silu(gate x) * up x); rows of `gate_up` are [hidden / group, (gate, up), group]."""

    def __init__(self, config: SwamlaConfig) -> None:
        super().__init__()
        self.group = config.intermediate_group
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2, self.group)).unbind(-2)
        return self.down((F.silu(gate) * up).flatten(-2))


class SwamlaBlock(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += feed_forward(norm(x)), with dropout on both terms in training."""

    def __init__(self, config: SwamlaConfig, layer_idx: int) -> None:
        super().__init__()
        kinds = {kind.layer_type: kind for kind in (SwamlaSlidingAttention, SwamlaLatentAttention)}
        self.attention_norm = new_norm(config)
        self.attention = kinds[config.layer_types[layer_idx]](config, layer_idx)
        self.ffn_norm = new_norm(config)
        self.feed_forward = SwamlaFeedForward(config)
        self.dropout = config.residual_dropout

    def forward(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights of attention; `context` as attention has it."""
        attended, weights = self.attention(self.attention_norm(x), **context)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training), weights


class SwamlaPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config: SwamlaConfig
    config_class = SwamlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ("SwamlaBlock", *(annex.__name__ for annex in ANNEXES.values()))
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_flash_attn = True  # where a model has no sinks, see SwamlaModel.plan
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | SwamlaTable):
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, SwamlaAttention | SwamlaFeedForward):
            output = module.get_submodule("wo" if isinstance(module, SwamlaAttention) else "down")
            init.normal_(output.weight, mean=0.0, std=std / math.sqrt(2 * self.config.num_hidden_layers))
        if isinstance(module, SwamlaRMSNorm | SwamlaDynamicTanh):
            init.ones_(module.weight)
        if isinstance(module, SwamlaDynamicTanh):
            init.constant_(module.alpha, 0.5)
            init.zeros_(module.bias)
        if isinstance(module, SwamlaConvolution):
            init.zeros_(module.weight)
        if isinstance(module, SwamlaCompressedIds):
            ids, pads = module.get_buffer("ids"), [own["pad_id"] for own in annex_settings(self.config).values()]
            init.copy_(ids, torch.arange(len(ids)).clamp(max=pads[0]))


def _require_known(config: SwamlaConfig) -> None:
    """Raise ValueError for settings that this code does not implement."""
    rope_types = {name: each.get("rope_type", "default") for name, each in config.rope_parameters.items()}
    known = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "norm": (config.norm, ("rmsnorm", "dynamic_tanh")),
        **{f"layer_types[{i}]": (each, (SLIDING, FULL)) for i, each in enumerate(config.layer_types)},
        **{f"rope_parameters.{name}.rope_type": (each, ("default", "linear")) for name, each in rope_types.items()},
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"{name} = {value!r}: expected one of {', '.join(choices)}")


class SwamlaModel(SwamlaPreTrainedModel):
    """Embedding, blocks and norm."""

    def __init__(self, config: SwamlaConfig) -> None:
        super().__init__(config)
        _require_known(config)
        layers, annexes = range(config.num_hidden_layers), annex_settings(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([SwamlaBlock(config, layer) for layer in layers])
        self.annexes = nn.ModuleDict(
            {
                str(layer): nn.ModuleDict({name: ANNEXES[name](config, layer) for name in names})
                for layer in layers
                if (names := [name for name, own in annexes.items() if layer in own["layers"]])
            }
        )
        if annexes:
            self.compressed_ids = SwamlaCompressedIds(config.padded_vocab_size)
        self.norm = new_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The residual stream behind the last norm, [B, T, hidden], for tokens [B, T].

        `attention_mask` [B, S] is 0 where padding stands, of all tokens so far; or what `plan` gives. `position_ids`
        without a mask and a cache mark documents that are packed into a sequence: one begins wherever they do not go up
        by one, and tokens see their own document only. `cache` and `past_key_values` are two names of one thing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and len(self.annexes):
            raise ValueError("inputs_embeds: this model looks up n-grams of the tokens, so it needs input_ids")
        packed = attention_mask is None and self._has_documents(position_ids)
        cache = self._cache(cache if past_key_values is None else past_key_values, use_cache, packed)
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if isinstance(attention_mask, dict):
            # `generate` makes a plan where the caller's mask is, and moves only the tokens to the model's device.
            plan: dict[str, Any] = {
                name: None if part is None else part.to(x.device) for name, part in attention_mask.items()
            }
        else:
            plan = self.plan(self.config, x.shape[:2], x.device, attention_mask, cache, position_ids)
        positions = plan["positions"]
        rotations = {
            SLIDING: rotation(positions, self.config.head_dim, self._rope(SLIDING), x.dtype),
            FULL: rotation(positions, self.config.qk_rope_head_dim, self._rope(FULL), x.dtype),
        }
        ids = self.compressed_ids(input_ids) if len(self.annexes) else None
        output_hidden_states = self._asked("output_hidden_states", output_hidden_states)
        output_attentions = self._asked("output_attentions", output_attentions)
        states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        for layer, block in enumerate(self.blocks):
            states += [x] if output_hidden_states else []
            if str(layer) in self.annexes:
                for annex in self.annexes.get_submodule(str(layer)).children():
                    x = annex(x, ids, positions, cache)
            layer_type = self.config.layer_types[layer]
            context = {"by": rotations[layer_type], "mask": plan[layer_type], "positions": positions, "cache": cache}
            if layer_type == FULL and self.config.selection_head is not None:
                context["selectable"] = plan["selectable"]
            if self.config._attn_implementation not in DENSE:
                context |= {"position_ids": positions} | kwargs
            x, weights = block(x, **context)
            attentions += [weights] if output_attentions else []
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache},
        )
        return output if self._asked("return_dict", return_dict) else output.to_tuple()

    def _asked(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name, False)) if value is None else value

    def _rope(self, layer_type: str) -> dict[str, Any]:
        """The rotary settings of a type of layer; any where the model has none of the type."""
        return self.config.rope_parameters.get(layer_type, {"rope_theta": 1.0})

    def _has_documents(self, position_ids: Tensor | None) -> bool:
        """Whether positions mark documents, which implementations without a dense mask find by themselves."""
        dense = self.config._attn_implementation in DENSE
        return dense and position_ids is not None and bool(_begins(position_ids).any())

    def _cache(self, cache: Cache | None, use_cache: bool | None, packed: bool) -> Cache | None:
        """The cache to use, a new one if it is asked for; None: none, as where blocks are computed again."""
        if packed and cache is not None:
            raise ValueError("position_ids: several documents in a sequence cannot be remembered; give no cache")
        if packed or (self.training and self.gradient_checkpointing):
            return None
        if cache is None and self._asked("use_cache", use_cache) and not self.training:
            cache = DynamicCache()
        return None if cache is None else with_own_layers(cache, self.config)

    @staticmethod
    def plan(
        config: SwamlaConfig,
        shape: Sequence[int],
        device: torch.device,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """Positions of tokens of a shape [B, T], -1 in the padding, and of each type of layer the mask.

        Masks are boolean [B or 1, 1, T, keys], True where a query sees a key, over what the cache gives; None: causal.
        For implementations of attention that take no such mask, it is the padding [B, S], or None. "selectable" has the
        keys that selective attention may select.

        Raises ValueError for an implementation that cannot compute this model's attention.
        """
        batch, tokens = shape
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None:
            if attention_mask.shape[-1] < past + tokens or attention_mask.dim() != 2:
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)}: expected [batch, {past + tokens}]")
            attention_mask = attention_mask[:, : past + tokens].to(device=device, dtype=torch.bool)
            if attention_mask.all():
                attention_mask = None
        real = attention_mask
        if position_ids is None:
            every = torch.arange(past + tokens, device=device)[None] if real is None else real.long().cumsum(1) - 1
            position_ids = every[:, past:]
        positions = position_ids.to(device).expand(batch, -1)
        if real is not None:
            positions = torch.where(real[:, past:], positions, -1)
        if config._attn_implementation not in DENSE:
            _require_expressible(config, cache)
            return {"positions": positions, SLIDING: real, FULL: real}
        documents = None
        if attention_mask is None and cache is None:
            begins = _begins(positions)
            documents = begins.long().cumsum(1) if bool(begins.any()) else None
        masks = _Masks(config, positions, real, documents, past, cache)
        plan = {"positions": positions, SLIDING: masks.sliding(), FULL: masks.full()}
        return plan | ({} if config.selection_head is None else {"selectable": masks.selectable()})


def _begins(positions: Tensor) -> Tensor:
    """Which tokens but the first begin a document, [B, T]: those whose position is not one more than the one before."""
    return positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1


def _require_expressible(config: SwamlaConfig, cache: Cache | None) -> None:
    """Raise ValueError for what an implementation of attention without a dense mask cannot compute."""
    sliding, reasons = SLIDING in config.layer_types, []
    if sliding and config.sliding_window_sinks:
        reasons.append(f"queries see the first {config.sliding_window_sinks} tokens beside their window")
    if FULL in config.layer_types and config.selection_head is not None:
        reasons.append("attention is selective")
    if sliding and cache is not None and not reasons:
        reasons.append("the cache of a window is a ring, which has another order than the tokens")
    if reasons:
        raise ValueError(
            f'attn_implementation = "{config._attn_implementation}" cannot compute this model, because '
            f'{" and ".join(reasons)}: use "sdpa" or "eager"'
        )


class _Masks:
    """The masks of a forward pass: positions [B, T] (-1: padding); `real` [B, S] and `documents` [B, T], or None."""

    def __init__(
        self,
        config: SwamlaConfig,
        positions: Tensor,
        real: Tensor | None,
        documents: Tensor | None,
        past: int,
        cache: Cache | None,
    ) -> None:
        self.config, self.positions, self.real, self.documents = config, positions, real, documents
        self.past, self.cache = past, cache
        self.tokens, self.device = positions.shape[1], positions.device
        self.plain = real is None and documents is None  # one document each, from its beginning

    def _among_new(self) -> Tensor:
        """Which of the new tokens each sees by causality, documents and padding, [B or 1, T, T]; each itself."""
        index = torch.arange(self.tokens, device=self.device)
        seen = (index <= index[:, None])[None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None] == self.documents[:, :, None])
        if self.real is not None:
            seen = seen & (self.real[:, None, self.past :] | (index == index[:, None]))
        return seen

    def sliding(self) -> Tensor | None:
        """The mask of sliding-window attention."""
        window, sinks = self.config.sliding_window, self.config.sliding_window_sinks
        layer = self._layer(SLIDING)
        if layer is not None and layer.is_empty:
            layer = None
        if layer is None and self.plain and self.tokens <= window:
            return None
        query, key = self.positions[:, :, None], self.positions[:, None]
        seen = self._among_new() & ((query - key < window) | (key < sinks) & (key >= 0))
        if self.plain and layer is None:
            seen = seen[:1]
        if layer is not None:
            slot, stored = torch.arange(layer.slots, device=self.device), layer.positions.to(self.device)[:, None]
            # A sink is seen there once it has left the window, else its weight would count twice.
            reaches = torch.where(slot < sinks, query - stored >= window, query - stored < window)
            before = (stored >= 0) & reaches & (query >= 0)
            seen = torch.cat([before, seen.expand(len(before), -1, -1)], dim=2)
        return seen[:, None]

    def full(self) -> Tensor | None:
        """The mask of latent attention."""
        room = None if (layer := self._layer(FULL)) is None else layer.room
        selects = self.config.selection_head is not None
        if self.plain and room is None and not selects and (self.past == 0 or self.tokens == 1):
            return None
        seen = self._among_new()
        if self.past:
            before = torch.ones(1, 1, self.past, dtype=torch.bool, device=self.device)
            if self.real is not None:
                before = self.real[:, None, : self.past]
            shape = max(len(seen), len(before)), self.tokens, -1
            seen = torch.cat([before.expand(shape), seen.expand(shape)], dim=2)
        return (seen if room is None else F.pad(seen, (0, room - seen.shape[2])))[:, None]

    def selectable(self) -> Tensor:
        """Which keys a query may select, [B or 1, T, keys]: those before it, but never the first of its document."""
        mask = self.full()
        assert mask is not None
        key = torch.arange(mask.shape[3], device=self.device)
        if self.documents is not None:
            first = self.documents.diff(dim=1, prepend=self.documents[:, :1] - 1) != 0
        elif self.real is not None:
            first = F.pad(self.real & (self.real.long().cumsum(1) == 1), (0, mask.shape[3] - self.real.shape[1]))
        else:
            first = (key == 0)[None]
        query = torch.arange(self.tokens, device=self.device)[:, None] + self.past
        return mask[:, 0] & (key < query) & ~first[:, None]

    def _layer(self, layer_type: str) -> Any:
        """The cache of a layer of a type; None: there is none."""
        if self.cache is None or layer_type not in self.config.layer_types:
            return None
        return self.cache.layers[self.config.layer_types.index(layer_type)]


class SwamlaForCausalLM(SwamlaPreTrainedModel, GenerationMixin):
    """The language model: logits of the next token, and the loss of labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config: SwamlaConfig) -> None:
        super().__init__(config)
        self.model = SwamlaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab_size], and with `labels` [B, T] the mean loss of their prediction.

        Labels of -100 do not count. `logits_to_keep`: how many of the last positions get logits, or which; 0: all. The
        others as in SwamlaModel.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if self.model._asked("return_dict", return_dict) else output.to_tuple()

    @staticmethod
    def create_masks_for_generate(
        config: SwamlaConfig,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        input_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """What `generate` makes before each compiled forward pass, whose shapes it keeps the same.

        Some arguments have two names, because transformers has renamed them.
        """
        own, x = cache if past_key_values is None else past_key_values, inputs_embeds
        x = input_embeds if x is None else x
        assert own is not None
        assert x is not None
        # The embeddings are empty, and not always on the device.
        device = next((each.device for each in (attention_mask, position_ids) if each is not None), x.device)
        plan = SwamlaModel.plan
        return plan(config, x.shape[:2], device, attention_mask, with_own_layers(own, config), position_ids)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in PreTrainedModel; logits are of the first `new_num_tokens` ids."""
        if new_num_tokens is not None and annex_settings(self.config):
            raise ValueError("the n-gram tables of this model belong to its vocabulary, which cannot be resized")
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.vocab_size, self.config.padded_vocab_size = new_num_tokens, embedding.num_embeddings
        return embedding


__all__ = ["SwamlaForCausalLM", "SwamlaModel", "SwamlaPreTrainedModel"]
