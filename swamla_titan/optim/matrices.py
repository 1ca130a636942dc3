"""What optimizers must know of the model's matrices: which are several in one, and how far ranks may cut their columns.

Muon makes the singular values of an update equal, so it matters what counts as a matrix. Here one linear map of the
paper's equations is one, as in code that stores them apart: queries, keys and values (split by Jordan's Muon and by
Megatron too), gate and up, MLA's latent and rotary key, and its expansions to keys and to values. Queries of MLA, whose
parts with and without position make up one score, and output projections are taken whole, as by Moonlight
(arXiv:2502.16982).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swamla_titan.model.linear import LinearSpec, Role


def separate_rows(model: nn.Module) -> dict[Tensor, list[Tensor]]:
    """The rows, int64, of each matrix within a fused weight; a weight that is a single matrix is not among them."""
    return {
        weight: [rows.flatten() for rows in spec.split(torch.arange(weight.shape[0]).unsqueeze(1))]
        for weight, spec in _weights(model)
        if spec.is_fused
    }


def column_units(model: nn.Module) -> dict[Tensor, int]:
    """Of weights whose columns tensor parallelism shards: how many consecutive ones always stay on one rank."""
    return {weight: spec.unit for weight, spec in _weights(model) if spec.role is Role.RESIDUAL_OUTPUT}


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, LinearSpec]]:
    for module in model.modules():
        spec = getattr(module, "spec", None)  # a float8 linear layer of torchao has one too
        if isinstance(spec, LinearSpec):
            assert isinstance(module.weight, Tensor)
            yield module.weight, spec
