"""What the blocks keep between a forward and a backward pass: an estimate from their shapes.

A compiled block keeps, for each token (inputs of products and of attention, and what a product gave where arithmetic
on it is repeated; widths of H heads and G key/value heads, F hidden units of the feed-forward network):

| block | kept                                                                                                     |
|-------|----------------------------------------------------------------------------------------------------------|
| both  | 4 dim: the residual stream twice, both norms' results; 3 F: gates, ups, their product                    |
| SWA   | H D + G D: rotated queries, keys; (H + 2 G) D: the projection, which the values lie in; H D: the result  |
| MLA   | the latent and rotary key, the normed latent (and with a query rank the query's, twice); 2 H (nope +     |
|       | rope): queries, keys; H (nope + v): the latent's expansion, which the values lie in; H v: the result     |

With float8.recipe = "native" the inputs of converted products are kept as float8 (`native_savings`).

Left out are masks and what is one number a head and token. Eager blocks keep more: each float32 intermediate of norms
and rotations; not where native float8 has operators for all of those. Blocks checkpointed by operators keep results of
products, which float8 gives in the type that they have without it.
"""

import dataclasses
from collections.abc import Collection, Sequence

import torch

from swamla_titan.config import Config
from swamla_titan.model import ModelConfig
from swamla_titan.parallel.degrees import Degrees
from swamla_titan.parallel.parallelize import float8_products

# Eager to compiled, measured on a CPU for both kinds of block; float32 has no casts that would be kept.
EAGER_FACTOR = {"float32": 1.3, "bfloat16": 1.5}


def kept_numbers(model: ModelConfig, kind: str, context: int = 1, tensor: int = 1) -> float:
    """Numbers that a compiled block of `kind`, swa or mla, keeps on a rank for each token of a row.

    The ranks of `context` share the tokens, but each has the keys and values of MLA for whole rows. The ranks of
    `tensor` share heads and hidden units, and the residual stream's tokens; the norms' results they have gathered.
    """
    heads, dim = model.num_heads, model.dim
    own_tokens = 2 * dim / tensor + 2 * dim + 3 * model.ffn_width / tensor
    whole_rows = 0.0
    if kind == "swa":
        own_tokens += (3 * heads + 3 * model.kv_heads) * model.head_dim / tensor
    else:
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        own_tokens += model.kv_lora_rank + model.qk_rope_head_dim + 2 * model.q_lora_rank
        own_tokens += heads * (qk + model.v_head_dim) / tensor
        whole_rows += model.kv_lora_rank + heads * (qk + model.qk_nope_head_dim + model.v_head_dim) / tensor
    return own_tokens / context + whole_rows


def native_savings(model: ModelConfig, kind: str, products: Collection[str], itemsize: int, tensor: int = 1) -> float:
    """Numbers of `itemsize` bytes that a block of `kind` keeps less, or more, by native float8, for each own token.

    `products` are the converted ones, by their names in a block. Inputs are kept in one byte instead; but attention
    keeps its result for itself as well, so the input of `wo` comes on top.
    """
    width = model.head_dim if kind == "swa" else model.v_head_dim
    inputs = {
        "attention.wqkv": model.dim if kind == "swa" else 0,
        "attention.wq": model.dim if kind == "mla" else 0,
        "attention.wq_a": model.dim if kind == "mla" else 0,
        "feed_forward.gate_up": model.dim,
        "feed_forward.down": model.ffn_width / tensor,
    }
    saved = sum(numbers for name, numbers in inputs.items() if name in products) * (1 - 1 / itemsize)
    return saved - ("attention.wo" in products) * model.num_heads * width / tensor / itemsize


def has_operators(model: ModelConfig, kind: str, products: Collection[str]) -> bool:
    """Whether norms and SwiGLU of a block of `kind` are operators of native float8, with these products converted."""
    if model.norm != "rmsnorm":  # the other is cast, but computed as ever
        return False
    readers = {"wqkv"} if kind == "swa" else {"wkv_a", "wq_a" if model.q_lora_rank else "wq"}
    return {*(f"attention.{each}" for each in readers), "feed_forward.gate_up", "feed_forward.down"} <= set(products)


def kept_products(model: ModelConfig, kind: str, context: int = 1, tensor: int = 1) -> float:
    """The same for a block that is checkpointed by operators (parallel/activation_checkpoint.py).

    It keeps its input and the results of attention, of the projection before it (queries, in SWA also keys and values;
    the latent) and of the one after it.
    """
    heads, dim = model.num_heads, model.dim
    if kind == "swa":
        products = (2 * heads + 2 * model.kv_heads) * model.head_dim / tensor
    else:
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        products = model.kv_lora_rank + model.qk_rope_head_dim + model.q_lora_rank
        products += heads * (qk + model.v_head_dim) / tensor
    return (2 * dim / tensor + products) / context


def block_bytes(config: Config, degrees: Degrees, layers: Sequence[int]) -> int:
    """Bytes that these layers keep on a rank for one row, by activation_checkpoint.mode.

    Blocks that are recomputed need, besides, what one block keeps without checkpointing, while its backward pass runs:
    see `recomputed_bytes`.
    """
    return round(sum(_of_layer(config, degrees, layer) for layer in layers))


def recomputed_bytes(config: Config, degrees: Degrees, layers: Sequence[int]) -> int:
    """Bytes for one row that the backward pass of the largest recomputed block makes again; 0 where none is."""
    unchecked = dataclasses.replace(
        config, activation_checkpoint=dataclasses.replace(config.activation_checkpoint, mode="none", memory_budget=1.0)
    )
    more = (_of_layer(unchecked, degrees, layer) - _of_layer(config, degrees, layer) for layer in layers)
    return round(max(more, default=0))


def _of_layer(config: Config, degrees: Degrees, layer: int) -> float:
    model, settings = config.model, config.activation_checkpoint
    kind = model.block_kinds[layer]
    everything = kept_numbers(model, kind, degrees.context, degrees.tensor)
    itemsize = getattr(torch, config.training.compute_dtype).itemsize
    products = set[str]()
    if config.float8.recipe == "native":
        products = {each.kind for each in float8_products(config) if each.why_not is None}
        everything -= native_savings(model, kind, products, itemsize, degrees.tensor) / degrees.context
    if not config.compile.enabled and not (degrees.tensor == 1 and has_operators(model, kind, products)):
        everything *= EAGER_FACTOR[config.training.compute_dtype]
    its_input = model.dim / (degrees.tensor * degrees.context)
    if settings.mode == "full" or (
        settings.mode == "selective" and settings.selective == "blocks" and (layer + 1) % settings.every_n_blocks == 0
    ):
        numbers = its_input
    elif settings.mode == "selective" and settings.selective == "operators":
        numbers = kept_products(model, kind, degrees.context, degrees.tensor)
    else:
        numbers = its_input + settings.memory_budget * (everything - its_input)
    return numbers * config.training.seq_len * itemsize
