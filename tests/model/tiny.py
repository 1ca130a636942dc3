"""A model small enough for exhaustive tests, with every size distinct so that a mix-up of two of them shows."""

from dataclasses import replace

import torch

from swamla_titan.model import ModelConfig, SWAMLAModel

TINY = ModelConfig(
    num_layers=3,
    dim=32,
    num_heads=4,
    vocab_size=50,
    max_seq_len=64,
    ffn_hidden_dim=48,
    swa_window=6,
    swa_sink_size=3,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=9,
)
ALL_SWA = {"swa_layers_per_cycle": 1, "mla_layers_per_cycle": 0}
ALL_MLA = {"swa_layers_per_cycle": 0, "mla_layers_per_cycle": 1}


def build(dtype=torch.float64, **changes):
    """A tiny model in evaluation mode whose matrices are large enough for each part to matter in the output."""
    model = SWAMLAModel(replace(TINY, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_tokens(*shape, vocab_size=TINY.vocab_size):
    return torch.randint(0, vocab_size, shape)
