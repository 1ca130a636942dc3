"""What optimizers must know of the model's matrices: which are several in one, and how far ranks may cut their columns.

Muon makes the singular values of an update equal, so it matters what counts as a matrix. Here one linear map of the
paper's equations is one, as in code that stores them apart: queries, keys and values (split by Jordan's Muon and by
Megatron too), gate and up, MLA's latent and rotary key, and its expansions to keys and to values. Queries of MLA, whose
parts with and without position make up one score, and output projections are taken whole, as by Moonlight
(arXiv:2502.16982).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.mla import LatentAttention
from swamla_titan.model.swa import SlidingWindowAttention


def separate_rows(model: nn.Module) -> dict[Tensor, list[Tensor]]:
    """The rows, int64, of each matrix within a fused weight; a weight that is a single matrix is not among them."""
    found = {}
    for module in model.modules():
        for weight, split in _fused(module):
            found[weight] = [rows.flatten() for rows in split(torch.arange(weight.shape[0]).unsqueeze(1))]
    return found


def column_units(model: nn.Module) -> dict[Tensor, int]:
    """Of weights whose columns tensor parallelism shares: how many consecutive ones always stay on one rank."""
    found = {}
    for module in model.modules():
        if isinstance(module, SlidingWindowAttention):
            found[module.wo.weight] = module.head_dim
        elif isinstance(module, LatentAttention):
            found[module.wo.weight] = module.v_dim
        elif isinstance(module, FeedForward):
            found[module.down.weight] = module.group
    return found


def _fused(module: nn.Module) -> Iterator[tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]]:
    if isinstance(module, SlidingWindowAttention):
        yield module.wqkv.weight, module.split_qkv
    elif isinstance(module, LatentAttention):
        yield module.wkv_a.weight, module.split_kv_a
        yield module.wkv_b.weight, module.split_kv_b
    elif isinstance(module, FeedForward):
        yield module.gate_up.weight, module.split_gate_up
