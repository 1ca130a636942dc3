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

import functools
from collections.abc import Collection, Sequence

import torch
from torch import nn

from swamla_titan.config import Config
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.kernels.flops import causal_pairs, swa_pairs
from swamla_titan.model import Block, ModelConfig
from swamla_titan.model.flops import training_flops_per_token
from swamla_titan.parallel.activation_checkpoint import checkpointed_regions, is_kept, keeps_operators
from swamla_titan.parallel.parallelize import float8_products

BRANCHES = ("attention", "feed_forward")  # the residual branches of a block, by the names of their modules

# Eager to compiled, measured on a CPU for both kinds of block; float32 has no casts that would be kept.
EAGER_FACTOR = {"float32": 1.3, "bfloat16": 1.5}


def kept_numbers(model: ModelConfig, kind: str, context: int = 1, tensor: int = 1) -> float:
    """Numbers that a compiled block of `kind`, swa or mla, keeps on a rank for each token of a row.

    The ranks of `context` share the tokens, but each has the keys and values of MLA for whole rows. The ranks of
    `tensor` share heads and hidden units, and the residual stream's tokens; the norms' results they have gathered.
    """
    branches = (kept_by_branch(model, kind, branch, context, tensor) for branch in BRANCHES)
    return sum(branches)


def kept_by_branch(model: ModelConfig, kind: str, branch: str, context: int = 1, tensor: int = 1) -> float:
    """The part of it that one residual branch keeps: its input, the norm's result and what comes of that."""
    heads, dim = model.num_heads, model.dim
    own_tokens = dim / tensor + dim
    if branch == "feed_forward":
        return (own_tokens + 3 * model.ffn_width / tensor) / context
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
    """What a block that is checkpointed by operators (parallel/activation_checkpoint.py) keeps beside its input.

    Those are the results of attention, of the projection before it (queries, in SWA also keys and values; the latent)
    and of the one after it. All are its attention's: the feed-forward network keeps none.
    """
    heads, dim = model.num_heads, model.dim
    if kind == "swa":
        products = (2 * heads + 2 * model.kv_heads) * model.head_dim / tensor
    else:
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        products = model.kv_lora_rank + model.qk_rope_head_dim + model.q_lora_rank
        products += heads * (qk + model.v_head_dim) / tensor
    return (dim / tensor + products) / context


def block_bytes(config: Config, degrees: Degrees, layers: Sequence[int]) -> int:
    """Bytes that these layers keep on a rank for one row, by [activation_checkpoint].

    Regions that are recomputed need, besides, what one of them keeps without checkpointing, while its backward pass
    runs: see `recomputed_bytes`.
    """
    return round(sum(_of_layer(config, degrees, layer)[0] for layer in layers))


def recomputed_bytes(config: Config, degrees: Degrees, layers: Sequence[int]) -> int:
    """Bytes for one row that the backward pass of the largest recomputed region makes again; 0 where none is."""
    return round(max((_of_layer(config, degrees, layer)[1] for layer in layers), default=0))


def _of_layer(config: Config, degrees: Degrees, layer: int) -> tuple[float, float]:
    """Bytes for one row that a layer keeps, and that its largest recomputed region makes again."""
    model, settings = config.model, config.activation_checkpoint
    kind = model.block_kinds[layer]
    branches = {branch: _branch_elements(config, degrees, kind, branch) for branch in BRANCHES}
    its_input = model.dim / (degrees.tensor * degrees.context)
    regions = checkpointed_regions(settings, layer)
    again = 0.0
    kept = sum(branches.values())
    for region in regions.values():
        whole = sum(branches[branch] for branch in region)
        of_region = its_input
        if keeps_operators(settings) and "attention" in region:
            of_region += kept_products(model, kind, degrees.context, degrees.tensor)
        again = max(again, whole - of_region)
        kept += of_region - whole
    if settings.memory_budget < 1:  # the compiler's, of what lies between the inputs and all
        again = (1 - settings.memory_budget) * (kept - its_input)
        kept -= again
    unit = config.training.seq_len * getattr(torch, config.training.compute_dtype).itemsize
    return kept * unit, again * unit


def _branch_elements(config: Config, degrees: Degrees, kind: str, branch: str) -> float:
    """What a residual branch keeps for each token if nothing of it is recomputed, as this run computes it."""
    model, dtype = config.model, config.training.compute_dtype
    elements = kept_by_branch(model, kind, branch, degrees.context, degrees.tensor)
    products = set[str]()
    if config.float8.recipe == "native":
        products = {each.kind for each in float8_products(config) if each.why_not is None}
        own = {each for each in products if each.startswith(f"{branch}.")}
        itemsize = getattr(torch, dtype).itemsize
        elements -= native_savings(model, kind, own, itemsize, degrees.tensor) / degrees.context
    if not config.compile.enabled and not (degrees.tensor == 1 and has_operators(model, kind, products)):
        elements *= EAGER_FACTOR[dtype]
    return elements


def recomputed_operations(config: Config, layer: int) -> int:
    """Operations of a layer's forward pass over one row that its backward pass repeats, as model/flops.py counts them.

    The last linear layer of a region is not repeated: nothing in the backward pass asks for its result. What the
    compiler repeats by `memory_budget` is its own choice, and not counted.
    """
    model, settings, length = config.model, config.activation_checkpoint, config.training.seq_len
    regions = checkpointed_regions(settings, layer)
    if not regions:
        return 0
    kind = model.block_kinds[layer]
    operators, total = keeps_operators(settings), 0
    for region in regions.values():
        linears = [linear for branch in region for linear in _linear_sizes(model, kind, branch)][:-1]
        total += 2 * length * sum(size for name, size in linears if not (operators and is_kept(name)))
        if "attention" in region and not operators:
            total += _attention_operations(model, kind, length)
    return total


def recomputed_share(config: Config) -> float:
    """Operations that the backward passes repeat, over those of training without."""
    model, length = config.model, config.training.seq_len
    again = sum(recomputed_operations(config, layer) for layer in range(model.num_layers))
    return again / (length * training_flops_per_token(model, length))


@functools.cache
def _linear_sizes(model: ModelConfig, kind: str, branch: str) -> list[tuple[str, int]]:
    """Name and elements of the weights of a residual branch, in the order of the forward pass."""
    with torch.device("meta"):
        block = Block(model, kind)
    linears = block.get_submodule(branch).named_modules()
    return [(name, linear.weight.numel()) for name, linear in linears if isinstance(linear, nn.Linear)]


@functools.cache
def _attention_operations(model: ModelConfig, kind: str, length: int) -> int:
    """Scores, and the average of the values."""
    if kind == "swa":
        pairs, widths = swa_pairs(length, model.swa_window, model.swa_sink_size), 2 * model.head_dim
    else:
        pairs = causal_pairs(length)
        widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return 2 * model.num_heads * pairs * widths
