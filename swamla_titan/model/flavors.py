"""Model shapes by name; model/sizes.py counts their parameters.

`small`, `base`, `large` and `xl` are given shapes. The names that are numbers say the size, embeddings included, within
3%: shaped for speed (heads of 128, widths divisible by 256, as wide as a sensible depth allows).
"""

from swamla_titan.model.config import ModelConfig

_400M = ModelConfig(num_layers=12, dim=1536, num_heads=12)

FLAVORS: dict[str, ModelConfig] = {
    # For a CPU: every part of the mathematics, small; a window and a sink that matter at 512 tokens.
    "debug": ModelConfig(
        num_layers=6,
        dim=128,
        num_heads=4,
        vocab_size=257,
        max_seq_len=512,
        swa_window=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "small": ModelConfig(num_layers=12, dim=1024, num_heads=16),
    "base": ModelConfig(num_layers=24, dim=1536, num_heads=16),
    "large": ModelConfig(num_layers=28, dim=2048, num_heads=16),
    "xl": ModelConfig(num_layers=32, dim=4096, num_heads=32),
    "150m": ModelConfig(num_layers=12, dim=768, num_heads=6, ffn_hidden_dim=3072),
    "400m": _400M,
    "medium": _400M,
    "800m": ModelConfig(num_layers=15, dim=2048, num_heads=16, ffn_hidden_dim=5120),
    "2b": ModelConfig(num_layers=24, dim=2560, num_heads=20),
}
