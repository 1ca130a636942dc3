"""True sizes of the flavors, and the FLOPs formula against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swamla_titan.kernels.attention.masks import causal_pairs, dense_mask, window_pairs
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.model.counts import flavor_table, parameter_counts, training_flops, training_flops_per_token
from tests.model.tiny import ALL_MLA, ALL_SWA, TINY, build, random_tokens

TABLE = """
| flavor | layers | dim | heads | FFN | parameters | without embeddings |
|---|---|---|---|---|---|---|
| `debug` | 6 | 128 | 4 | 512 | 1.6M | 1.6M |
| `small` | 12 | 1024 | 16 | 2816 | 215.4M | 163.9M |
| `base` | 24 | 1536 | 16 | 4096 | 756.6M | 679.3M |
| `large` | 28 | 2048 | 16 | 5632 | 1,500.5M | 1,397.5M |
| `xl` | 32 | 4096 | 32 | 11008 | 6,464.7M | 6,258.7M |
| `150m` | 12 | 768 | 6 | 3072 | 150.9M | 112.3M |
| `400m` | 12 | 1536 | 12 | 4096 | 408.0M | 330.7M |
| `medium` | 12 | 1536 | 12 | 4096 | 408.0M | 330.7M |
| `800m` | 15 | 2048 | 16 | 5120 | 803.7M | 700.6M |
| `2b` | 24 | 2560 | 20 | 6912 | 1,970.5M | 1,841.7M |
"""


def test_table_of_true_sizes():
    assert flavor_table() == TABLE.strip().splitlines()


@pytest.mark.parametrize("name, size", [("150m", 150e6), ("400m", 400e6), ("800m", 800e6), ("2b", 2e9)])
def test_sizes_in_names_are_true(name, size):
    config = FLAVORS[name]
    assert parameter_counts(config)[0] == pytest.approx(size, rel=0.03)
    assert config.head_dim == 128
    assert config.dim % 256 == 0
    assert config.ffn_width % 256 == 0


def test_debug_is_small():
    assert parameter_counts(FLAVORS["debug"])[0] < 5e6


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_real_model(tied):
    model = build(tie_embeddings=tied)
    total = sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())
    inner = sum(p.numel() for p in model.blocks.parameters()) + model.norm.weight.numel()
    assert parameter_counts(model.config) == (total, inner)


@pytest.mark.parametrize("seq_len, window, sink", [(1, 4, 2), (20, 4, 2), (20, 2, 6), (20, 1, 0), (20, 40, 3)])
def test_pairs_are_the_sums_of_the_masks(seq_len, window, sink):
    starts = torch.zeros(1, seq_len, dtype=torch.int64)
    assert window_pairs(seq_len, window, sink) == dense_mask(starts, window, sink).sum()
    assert causal_pairs(seq_len) == dense_mask(starts, None, 0).sum()


@pytest.mark.parametrize(
    "changes", [{}, ALL_SWA, ALL_MLA, {"tie_embeddings": False, "q_lora_rank": 14, "num_kv_heads": 2, "qk_norm": True}]
)
def test_formula_with_dense_pairs_equals_torchs_count(changes):
    model = build(torch.float32, **changes).train()
    model.attention_backend = "reference"  # makes all T x T scores
    tokens = random_tokens(3, 24)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == 3 * training_flops(model.config, 24, {"swa": 24 * 24, "mla": 24 * 24})


def test_per_token_figure_uses_the_visible_pairs():
    pairs = {"swa": window_pairs(30, TINY.swa_window, TINY.swa_sink_size), "mla": 30 * 31 // 2}
    assert training_flops_per_token(TINY, 30) == training_flops(TINY, 30, pairs) / 30
    # Six per parameter is the rule of thumb; attention comes on top.
    config = FLAVORS["base"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in SWAMLAModel(config).parameters())
    assert 1.0 < training_flops_per_token(config, 2048) / (6 * weights) < 1.2
