"""Compressed vocabularies: tokens whose texts differ only in case, accents or white space share an id.

For n-grams (model/engram.py), as in Engram (arXiv:2601.07372): " The", "the" and "THE" begin the same ones. Texts are
compared as they are decoded. The strings of vocabulary files have marks for spaces, such as GPT-2's U+0120, which is a
letter with an accent: stripped of it " old" would become "gold".
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from swamla_titan.data.tokenizer import Tokenizer

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class CompressedVocabulary:
    """`ids` [vocabulary] int32: of each token, of `size` different ids from 0 on. `tokenizer`: its fingerprint."""

    ids: np.ndarray
    size: int
    tokenizer: str

    @property
    def digest(self) -> str:
        """Of all ids."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:32]


def compress(tokenizer: Tokenizer) -> CompressedVocabulary:
    """The compressed vocabulary of a tokenizer, which is computed once. Ids are in the order of first tokens."""
    if tokenizer.fingerprint not in _KNOWN:
        of_key: dict[str | bytes | int, int] = {}
        keys = (_key(token, tokenizer) for token in range(tokenizer.vocab_size))
        ids = np.array([of_key.setdefault(key, len(of_key)) for key in keys], dtype=np.int32)
        _KNOWN[tokenizer.fingerprint] = CompressedVocabulary(ids, len(of_key), tokenizer.fingerprint)
    return _KNOWN[tokenizer.fingerprint]


_KNOWN: dict[str, CompressedVocabulary] = {}  # by the tokenizer's fingerprint; GPT-2's takes 0.2 s


def _key(token: int, tokenizer: Tokenizer) -> str | bytes | int:
    """What tokens with one compressed id have in common; bytes that are no text, and end of text, are unlike others."""
    data = tokenizer.token_bytes(token)
    if token == tokenizer.eot_id:
        return token
    try:
        return normal_form(data.decode())
    except UnicodeDecodeError:
        return data


def normal_form(text: str) -> str:
    """NFKC, without accents, in lower case, with single spaces within and none around; a lone space stays.

    A text of which nothing would be left, as an accent alone, stays as it is.
    """
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(character for character in decomposed if not unicodedata.category(character).startswith("M"))
    single = _SPACES.sub(" ", bare.lower())
    return (single if single == " " else single.strip()) or text
