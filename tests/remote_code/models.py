"""Models of this package beside the same ones as the exported code builds them."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from swamla_titan.checkpoint.hugging_face import model_settings
from swamla_titan.model import FLAVORS, ModelConfig, SWAMLAModel
from swamla_titan.model.engram import EngramConfig
from swamla_titan.remote_code.configuration_swamla import SwamlaConfig
from swamla_titan.remote_code.modeling_swamla import SwamlaForCausalLM
from swamla_titan.tools.export import exported_tensors
from tests.model.tiny import ALL_MLA, ALL_SWA, TINY

ENGRAM = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, d_mem=16, table_size=40, kernel=3)
SHAPES: dict[str, ModelConfig] = {
    "tiny": TINY,
    "debug": FLAVORS["debug"],
    # `small` with its proportions: an eighth as wide, and less deep.
    "small": ModelConfig(
        num_layers=4,
        dim=128,
        num_heads=16,
        vocab_size=300,
        swa_window=16,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
    "qk-norm": replace(TINY, qk_norm=True),
    "grouped-queries": replace(TINY, num_kv_heads=2),
    "untied": replace(TINY, tie_embeddings=False),
    "dynamic-tanh": replace(TINY, norm="dynamic_tanh"),
    "rope-scaling": replace(TINY, rope_scaling=2.5, swa_rope_theta=300.0, mla_rope_theta=5000.0),
    "query-rank": replace(TINY, q_lora_rank=14),
    "engram": replace(TINY, engram=ENGRAM),
    "sharpened-engram": replace(TINY, engram=replace(ENGRAM, orders=(2, 4), sharpen_gate=True)),
    "selective": replace(TINY, mla_selective=True, selection_head=2),
    "selective-engram": replace(TINY, mla_selective=True, engram=ENGRAM),
    "no-sinks": replace(TINY, swa_sink_size=0),
    "window-of-one": replace(TINY, swa_window=1),
    "all-sliding": replace(TINY, **ALL_SWA),
    "all-latent": replace(TINY, **ALL_MLA),
}


def of_shape(name: str, dtype: torch.dtype = torch.float64) -> tuple[SWAMLAModel, SwamlaForCausalLM]:
    """A model with weights that matter, and the exported code with its tensors."""
    return _built(name, dtype)


@cache
def _built(name: str, dtype: torch.dtype) -> tuple[SWAMLAModel, SwamlaForCausalLM]:
    generator = torch.Generator().manual_seed(1)
    ours = SWAMLAModel(SHAPES[name]).to(dtype).eval()
    if SHAPES[name].engram.layers:
        ours.annexes.use((torch.arange(SHAPES[name].vocab_size) // 2).numpy(), -(-SHAPES[name].vocab_size // 2))
    with torch.no_grad():
        for parameter in ours.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.mul_(6) if parameter.dim() == 2 else parameter.add_(0.2 * noise)
    return ours, exported(ours)


def exported(ours: SWAMLAModel, **changes: Any) -> SwamlaForCausalLM:
    """The exported code with the tensors of a model."""
    settings = model_settings(ours) | changes
    theirs = SwamlaForCausalLM(SwamlaConfig(**settings)).to(next(ours.parameters()).dtype).eval()
    missing = theirs.load_state_dict(exported_tensors(ours, next(ours.parameters()).dtype), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys in ([], ["lm_head.weight"])
    theirs.tie_weights()
    return theirs


def random_tokens(name: str, *shape: int) -> torch.Tensor:
    return torch.randint(0, SHAPES[name].vocab_size, shape, generator=torch.Generator().manual_seed(3))
