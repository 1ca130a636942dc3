"""True parameter counts and names, of the module itself."""

import dataclasses

import torch

from swamla_titan.model.config import ModelConfig
from swamla_titan.model.flavors import FLAVORS
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
