"""Arithmetic of training, for MFU: what the model needs, not what a kernel happens to execute.

Per token, forward: 2 * (weights of all matrix products) + 2 * pairs/T * heads * (qk width + v width) per layer, where
`pairs` counts the (query, key) pairs that see each other in a row of T tokens: with window and sink in SWA layers,
T (T+1) / 2 in MLA layers. Backward costs twice the forward (gradients of input and of weight), so training is 3 times
it. The head counts as the product that it is, tied or not, with its padding columns; the embedding is a look-up and
counts nothing, as do norms, rotations, softmax and recomputation. Documents would shorten the pairs; they are not
subtracted, so that the figure does not depend on the data.
"""

import torch
from torch import nn

from swamla_titan.kernels.flops import causal_pairs, swa_pairs
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.model import SWAMLAModel


def matmul_weights(config: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token, counted on the module itself."""
    with torch.device("meta"):
        model = SWAMLAModel(config)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def training_flops(config: ModelConfig, seq_len: int, swa_row_pairs: int, mla_row_pairs: int) -> int:
    """Floating-point operations to train on one row of `seq_len` tokens, given each kind's visible pairs per row."""
    kinds = config.block_kinds
    swa_widths = 2 * config.head_dim
    mla_widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_heads * (
        kinds.count("swa") * swa_row_pairs * swa_widths + kinds.count("mla") * mla_row_pairs * mla_widths
    )
    return 3 * 2 * (seq_len * matmul_weights(config) + attention)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token in rows of `seq_len`: the numerator of MFU."""
    pairs = swa_pairs(seq_len, config.swa_window, config.swa_sink_size), causal_pairs(seq_len)
    return training_flops(config, seq_len, *pairs) / seq_len
