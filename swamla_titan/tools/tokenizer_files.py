"""A tokenizer in the files of the `tokenizers` package, which gives the same ids of every text."""

import json
import re
from itertools import pairwise
from typing import Any

from swamla_titan.data import Tokenizer
from swamla_titan.data.tokenizer import EOT, TiktokenTokenizer

PAD = "<|pad|>"


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
