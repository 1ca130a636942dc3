"""What optimizers need to know of weights: which are several matrices fused, and where ranks may split their columns.

Muon equalizes the singular values of an update, so it matters what counts as one matrix. Here it is one linear map of
the paper's equations, as if each had a weight of its own: queries, keys and values (split by Jordan's Muon and by
Megatron too), gate and up projections, MLA's latent and rotary key, and its up projections to keys and to values. MLA's
queries are one matrix, because their parts with and without position add up to one score, and so are output
projections, as in Moonlight (arXiv:2502.16982).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swamla_titan.model.layers import LinearSpec, Role


def separate_rows(model: nn.Module) -> dict[Tensor, list[Tensor]]:
    """For each fused weight, the row indices (int64) of each of its matrices; weights of one matrix are left out."""
    return {
        weight: [rows.flatten() for rows in spec.split(torch.arange(weight.shape[0]).unsqueeze(1))]
        for weight, spec in _weights(model)
        if spec.is_fused
    }


def column_units(model: nn.Module) -> dict[Tensor, int]:
    """For each weight whose columns tensor parallelism shards, how many consecutive columns always stay together."""
    return {weight: spec.unit for weight, spec in _weights(model) if spec.role is Role.RESIDUAL_OUTPUT}


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, LinearSpec]]:
    for module in model.modules():
        spec = getattr(module, "spec", None)  # of our Linear, and of torchao's float8 layer as we derive it
        if isinstance(spec, LinearSpec):
            assert isinstance(module.weight, Tensor)
            yield module.weight, spec
