"""A model in Hugging Face's terms: the settings of config.json, the names of the tensors, and the tokenizer's files.

`export` writes them, and initial weights from an exported folder are compared and read by them. The tokenizer is in the
form of the `tokenizers` package, which gives the same ids of every text.
"""

import json
import re
from itertools import pairwise
from typing import Any

from swamla_titan.data import Tokenizer
from swamla_titan.data.tokenizer import EOT, TiktokenTokenizer
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import ANNEXES, annexes_of
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.layers import EPS

MODEL_TYPE = "swamla"
COMPRESSED_IDS = "model.compressed_ids.ids"  # of a model with annexes, the ids that stand for tokens in look-ups
OWN_SETTINGS = "swamla_titan"  # of config.json: [model] of the run as its configuration has it
RECORD, PAD_ID = "hashes", "pad_id"  # of the settings of each annex: its record, and the id before a document
PAD = "<|pad|>"  # where a vocabulary has room for one
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


def tokenizer_files(tokenizer: Tokenizer, pad_id: int, max_length: int) -> dict[str, str]:
    """The content of tokenizer.json and tokenizer_config.json, by name.

    `pad_id` is of the padding, perhaps that of end of text; `max_length`, in tokens, is the longest that the model was
    built for.
    """
    special = {tokenizer.eot_id: EOT}
    special.setdefault(pad_id, PAD)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": special[pad_id],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a special token's name within a text is text
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token, name in sorted(special.items())
        ],
        "normalizer": None,
        "pre_tokenizer": _splitting(tokenizer),
        "post_processor": None,
        "decoder": _BYTES,
        "model": _byte_pairs(tokenizer, special),
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _splitting(tokenizer: Tokenizer) -> dict[str, Any]:
    """How text is split into words, within which byte pairs are merged; then bytes become characters."""
    if not isinstance(tokenizer, TiktokenTokenizer):
        return _BYTES
    words = {
        "type": "Split",
        "pattern": {"Regex": _in_oniguruma(tokenizer.encoding._pat_str)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [words, _BYTES]}


def _in_oniguruma(pattern: str) -> str:
    """tiktoken's pattern for the regular expressions of `tokenizers`, where x{1,3}+ is no possessive repetition."""
    return _POSSESSIVE_COUNT.sub(r"(?>\1\2)", pattern)


_POSSESSIVE_COUNT = re.compile(r"(\\p\{\w+\}|\[[^\]]*\]|\\?.)(\{\d+(?:,\d*)?\})\+")


def _byte_pairs(tokenizer: Tokenizer, special: dict[int, str]) -> dict[str, Any]:
    """Vocabulary and merges. A word that is a token as it stands is that token, also if no merges lead to it."""
    ranks = {bytes([token]): token for token in range(256)}
    if isinstance(tokenizer, TiktokenTokenizer):
        ranks = tokenizer.encoding._mergeable_ranks
    vocabulary = {_characters(token): rank for token, rank in ranks.items()}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": isinstance(tokenizer, TiktokenTokenizer),
        "vocab": vocabulary | {name: token for token, name in special.items()},
        "merges": [[_characters(left), _characters(right)] for left, right in merges(ranks)],
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that make up each token, in the order in which they are merged.

    tiktoken merges whichever adjacent pair makes the token of the lowest rank. Within the bytes of a token it did the
    same merges before, whatever stands around, so the last of them always is of the same pair: that which it comes to
    if the token's bytes stand alone. A token that they do not come to is never merged.
    """
    found = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, _NEVER) for left, right in pairwise(parts)]
            lowest = min(pairs)
            if lowest == _NEVER:
                break
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


_NEVER = 1 << 62


def _characters(token: bytes) -> str:
    """The characters that stand for bytes in vocabularies of byte-level encodings: those of GPT-2."""
    return "".join(map(_CHARACTERS.__getitem__, token))


def _character_of_bytes() -> list[str]:
    """Printable bytes of Latin-1 stand for themselves, and the others for the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_CHARACTERS = _character_of_bytes()
