"""The next token of a block by the kernels of kernels/decode.py, in the place of Block.decode where these can."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels import decode as kernels
from swamla_titan.model.blocks import Block, FeedForward
from swamla_titan.model.branch import Attention, Clock
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import EPS, Head, Linear, RMSNorm
from swamla_titan.model.mla import LatentAttention, MLACache
from swamla_titan.model.swa import SlidingWindowAttention, SWACache

Rotation = tuple[Tensor, Tensor]
Step = Callable[[Tensor], Tensor]  # the residual stream [B, dim], which may be overwritten -> [B, dim]


def why_not_fused(module: torch.nn.Module, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute with the layers of a block, or None."""
    for name, each in module.named_modules():
        if isinstance(each, Linear) and (type(each) is not Linear or not each.sharding.is_full):
            return f"{name} is converted or sharded"
        if isinstance(each, Linear) and each.weight.dtype != dtype:
            return f"{name} is cast to the activations' dtype"
    norms = [name for name, each in module.named_children() if name.endswith("norm") and type(each) is not RMSNorm]
    return f"{norms[0]} is no RMSNorm" if norms else None


def fused_step(block: Block, cache: Any, clock: Clock, rotations: dict[str, Rotation]) -> Step | None:
    """What computes the next token of a block with this cache, which it fills; None: its attention is of another kind.

    `rotations`: cosines and sines of every position, by kind of block.
    """
    attention = block.attention
    if isinstance(attention, SlidingWindowAttention) and isinstance(cache, SWACache):
        return partial(_swa_step, block, attention, cache, clock, rotations[block.kind])
    if isinstance(attention, LatentAttention) and type(cache) is MLACache:
        first = attention.wq_a if attention.q_lora_rank else attention.wq
        weight = torch.cat([first.weight, attention.wkv_a.weight])  # one linear layer, as they have the same input
        return partial(_mla_step, block, attention, weight, cache, clock, rotations[block.kind])
    return None


def fused_head(head: torch.nn.Module, norm: torch.nn.Module, vocab_size: int, dtype: torch.dtype) -> Step | None:
    """What computes the logits [B, vocab_size] of the residual stream [B, dim]; None: no kernel can."""
    if type(head) is not Head or type(norm) is not RMSNorm or not head.sharding.is_full or head.weight.dtype != dtype:
        return None
    return lambda x: kernels.linear(x, head.weight, norm.weight, EPS)[:, :vocab_size]


def all_rotations(
    attention: type[Attention], config: ModelConfig, room: int, clock: Clock, dtype: torch.dtype
) -> Rotation:
    """Cosines and sines of `room` positions, [room, D/2] each."""
    positions = torch.arange(room, device=clock.starts.device)[None]
    cos, sin = attention.rotation(config, positions, dtype)
    return cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()


def _swa_step(
    block: Block, attention: SlidingWindowAttention, cache: SWACache, clock: Clock, rotation: Rotation, x: Tensor
) -> Tensor:
    qkv = _linear(x, attention.wqkv.weight, block.attention_norm)
    qkv = qkv.view(len(x), -1, attention.queries_per_key + 2, attention.head_dim)
    gains = None
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        gains = attention.q_norm.weight, attention.k_norm.weight
    at = clock.starts, clock.length
    slots = cache.keys, cache.values, cache.sink
    attended = kernels.ring_attention(qkv, rotation, gains, at, *slots, attention.scale, EPS)
    return _feed_forward(block, kernels.linear(attended, attention.wo.weight, residual=x))


def _mla_step(
    block: Block,
    attention: LatentAttention,
    weight: Tensor,
    cache: MLACache,
    clock: Clock,
    rotation: Rotation,
    x: Tensor,
) -> Tensor:
    both = _linear(x, weight, block.attention_norm)
    query, new = both.split([len(weight) - attention.wkv_a.out_features, attention.wkv_a.out_features], dim=1)
    if attention.q_lora_rank:
        query = _linear(query, attention.wq_b.weight, attention.q_norm)
    up = attention.wkv_b.weight.unflatten(0, (-1, attention.nope_dim + attention.v_dim))
    attended = kernels.latent_attention(
        query.unflatten(1, (-1, attention.qk_dim)),
        new,
        up,
        rotation,
        attention.kv_norm.weight,
        (clock.starts, clock.length),
        cache.latents,
        cache.rope_keys,
        attention.scale,
        EPS,
    )
    return _feed_forward(block, kernels.linear(attended, attention.wo.weight, residual=x))


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    layers: FeedForward = block.feed_forward
    assert isinstance(block.ffn_norm, RMSNorm)
    hidden = kernels.linear(x, layers.gate_up.weight, block.ffn_norm.weight, EPS, group=layers.group)
    return kernels.linear(hidden, layers.down.weight, residual=x)


def _linear(x: Tensor, weight: Tensor, norm: torch.nn.Module) -> Tensor:
    """The linear layer of x [B, K] behind the norm."""
    assert isinstance(norm, RMSNorm)
    return kernels.linear(x, weight, norm.weight, EPS)
