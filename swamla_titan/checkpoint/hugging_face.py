"""A model in Hugging Face's terms: the settings of config.json, and the names of the tensors.

`export` writes them, and initial weights from an exported folder are compared and read by them.
"""

from typing import Any

from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import ANNEXES, annexes_of
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.layers import EPS

MODEL_TYPE = "swamla"
COMPRESSED_IDS = "model.compressed_ids.ids"  # of a model with annexes, the ids that stand for tokens in look-ups
OWN_SETTINGS = "swamla_titan"  # of config.json: [model] of the run as its configuration has it
RECORD, PAD_ID = "hashes", "pad_id"  # of the settings of each annex: its record, and the id before a document
LAYER_TYPES = {"swa": "sliding_attention", "mla": "full_attention"}


def tensor_name(name: str) -> str:
    """The name of the parameter `name` in an exported folder. A tied head is not among its tensors."""
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


def own_name(name: str) -> str:
    """The name of a parameter that has the name `name` in an exported folder."""
    return "head.weight" if name == "lm_head.weight" else name.removeprefix("model.")


def model_settings(model: SWAMLAModel) -> dict[str, Any]:
    """The part of config.json that determines the shape and the function of a model: equal for equal models.

    Raises UserError for a kind of block or annex that remote_code/modeling_swamla.py does not have.
    """
    config = model.config
    annexes = {name: annex.exported(config) for name, annex in annexes_of(config).items()}
    unknown = [kind for kind in dict.fromkeys(config.block_kinds) if kind not in LAYER_TYPES]
    unknown += [name for name, exported in annexes.items() if exported is None]
    if unknown:
        raise UserError(f"the model has {', '.join(unknown)}, which the exported code does not implement")
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "intermediate_group": config.ffn_group,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "norm": config.norm,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_types": [LAYER_TYPES[kind] for kind in config.block_kinds],
        "sliding_window": config.swa_window,
        "sliding_window_sinks": config.swa_sink_size,
        "qk_norm": config.qk_norm,
        "q_lora_rank": config.q_lora_rank or None,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "selection_head": config.selection_head if config.mla_selective else None,
        "rope_parameters": _rope_parameters(config),
        **dict.fromkeys(ANNEXES),
        **{name: _annex(name, exported or {}, model) for name, exported in annexes.items()},
    }


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Of each type of layer that the model has."""
    scaled = {"rope_type": "linear", "factor": config.rope_scaling}
    scaling = {"rope_type": "default"} if config.rope_scaling == 1 else scaled
    rotaries = {LAYER_TYPES[kind]: attention.rotary(config) for kind, attention in attention_kinds(config).items()}
    return {name: {"rope_theta": rotary.theta, **scaling} for name, rotary in rotaries.items()}


def _annex(name: str, exported: dict[str, Any], model: SWAMLAModel) -> dict[str, Any]:
    layers, record = list(getattr(model.config, name).layers), ANNEXES[name].record(model.config)
    return {"layers": layers, **exported, RECORD: record, PAD_ID: model.annexes.compressed_ids.pad}
