"""Counts of a model: its parameters, and the arithmetic of training for MFU.

The arithmetic is what the model needs, not what a kernel happens to execute. Per token, forward: 2 * (weights of all
linear layers), and for each layer what its attention declares (model/branch.py): 2 * pairs/T * heads * (qk width + v
width), where `pairs` counts the (query, key) pairs that see each other in a sequence of T tokens: T (T+1) / 2 under a
causal mask, fewer under a window. Backward costs twice the forward (gradients of input and of weight), so training is
3 times it. The head counts as the linear layer that it is, tied or not, with its padding columns; the embedding is a
look-up and counts nothing, as do norms, rotations, softmax and recomputation. Annexes (model/annex.py) count by their
linear layers, and what they declare. Documents would shorten the pairs; they are not subtracted, so that the figure
does not depend on the data.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.blocks import BLOCKS, Block
from swamla_titan.model.config import FLAVORS, ModelConfig
from swamla_titan.model.model import SWAMLAModel
from swamla_titan.model.row_table import row_tables


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those without embedding, head and tables), counted on the module itself; tied weights once."""
    with torch.device("meta"):
        model = SWAMLAModel(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    looked_up = model.embedding.weight, model.head.weight, *row_tables(model)
    outside = {id(weight): weight.numel() for weight in looked_up}
    return total, total - sum(outside.values())


def parameter_names(config: ModelConfig) -> list[str]:
    """Names of all parameters; a tied head goes by the embedding's."""
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 1)  # not known yet, and in no name
    with torch.device("meta"):
        return [name for name, _ in SWAMLAModel(config).named_parameters()]


def flavor_table() -> list[str]:
    """Rows of a Markdown table of the flavors, heading included."""
    rows = [
        "| flavor | layers | dim | heads | FFN | parameters | without embeddings |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in FLAVORS.items():
        total, inner = parameter_counts(config)
        rows.append(
            f"| `{name}` | {config.num_layers} | {config.dim} | {config.num_heads} | {config.ffn_width} "
            f"| {total / 1e6:,.1f}M | {inner / 1e6:,.1f}M |"
        )
    return rows


def block_flops(config: ModelConfig, kind: str, seq_len: int, pairs: int | None = None) -> int:
    """Floating-point operations to train a block of `kind` on one sequence of `seq_len` tokens.

    `pairs` of a query and a key are computed, None: those that see each other.
    """
    with torch.device("meta"):
        weights = _linear_weights(Block(config, kind))
    attention = BLOCKS[kind]
    pairs = attention.pairs(config, seq_len) if pairs is None else pairs
    return 3 * (2 * seq_len * weights + attention.flops(config, pairs))


def annex_flops(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Floating-point operations to train the annexes before a layer on one sequence of `seq_len` tokens."""
    total = 0
    for kind in annexes_of(config, layer).values():
        with torch.device("meta"):
            weights = _linear_weights(kind(config, layer))
        total += 3 * (2 * seq_len * weights + kind.flops(config, seq_len))
    return total


def training_flops(config: ModelConfig, seq_len: int, pairs: Mapping[str, int] | None = None) -> int:
    """Floating-point operations to train on one sequence of `seq_len` tokens; `pairs` as in `block_flops`, by kind."""
    head = 3 * 2 * seq_len * config.padded_vocab_size * config.dim
    given = pairs or {}
    of_kind = {kind: block_flops(config, kind, seq_len, given.get(kind)) for kind in set(config.block_kinds)}
    of_annexes = sum(annex_flops(config, layer, seq_len) for layer in range(config.num_layers))
    return head + of_annexes + sum(of_kind[kind] for kind in config.block_kinds)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token in sequences of `seq_len`: the numerator of MFU."""
    return training_flops(config, seq_len) / seq_len


def _linear_weights(module: nn.Module) -> int:
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))
