"""Compressed vocabularies: which tokens share an id."""

import base64
import unicodedata
from collections import defaultdict

import numpy as np
import pytest

from swamla_titan.data import compress, load_tokenizer
from swamla_titan.data.tokenizer import normal_form


def groups(tokenizer):
    """The texts of the tokens of each id, as bytes."""
    found = defaultdict(list)
    for token, number in enumerate(compress(tokenizer).ids.tolist()):
        found[number].append(tokenizer.token_bytes(token))
    return found


@pytest.mark.parametrize(
    "text, form",
    [
        (" The", "the"),
        ("THE ", "the"),
        ("naïve", "naive"),
        ("Ａﬁ", "afi"),
        ("a \t\n b", "a b"),
        (" ", " "),
        ("\n\n", " "),
        ("\u00a0", " "),
        ("İ", "i"),
        ("\u0301", "\u0301"),  # an accent alone
        ("x\u0301", "x"),
        ("Ġold", "gold"),  # a letter of a text, where vocabulary files mark a space by it
    ],
)
def test_normal_forms(text, form):
    assert normal_form(text) == form


def test_gpt2_is_compressed_by_34_percent():
    tokenizer = load_tokenizer("gpt2")
    own = compress(tokenizer)
    assert own.ids.shape == (50_257,)
    assert set(own.ids.tolist()) == set(range(own.size))
    assert abs(own.size - 32_974) < (1 if unicodedata.unidata_version == "14.0.0" else 10)  # that of Python 3.11
    assert compress(tokenizer) is own


def test_no_words_of_gpt2_merge_but_by_case_spaces_and_accents():
    """Had the marks of spaces been taken for letters, " old" were the same as "gold"."""
    tokenizer = load_tokenizer("gpt2")
    token = {tokenizer.token_bytes(each): each for each in range(tokenizer.vocab_size)}
    own = compress(tokenizer).ids
    assert own[token[b" old"]] == own[token[b"old"]] == own[token[b" Old"]]
    assert own[token[b" old"]] != own[token[b"gold"]]
    for texts in groups(tokenizer).values():
        words = {text.decode().strip().lower() for text in texts if text.isascii()}
        words = {word for word in words if word.isalnum()}
        assert len(words) <= 1, words


def test_bytes_that_are_no_text_keep_to_themselves():
    tokenizer = load_tokenizer("byte")
    own = compress(tokenizer)
    assert own.ids[ord("A")] == own.ids[ord("a")]
    assert own.ids[ord("\n")] == own.ids[ord(" ")]
    alone = own.ids[[*range(128, 256), tokenizer.eot_id]]
    assert len(set(alone.tolist())) == 129
    assert not np.isin(own.ids[:128], alone).any()


def test_a_vocabulary_file_is_compressed_too(tmp_path):
    words = [bytes([byte]) for byte in range(256)] + [b" t", b"th", b"The", b" the", "é".encode(), "É".encode()]
    path = tmp_path / "own.tiktoken"
    path.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)))
    tokenizer = load_tokenizer(str(path))
    own = compress(tokenizer)
    assert own.ids[258] == own.ids[259]
    assert own.ids[260] == own.ids[261] == own.ids[ord("e")]
    assert own.ids[256] == own.ids[ord("t")]
    assert own.tokenizer == tokenizer.fingerprint
    assert own.digest != compress(load_tokenizer("byte")).digest
