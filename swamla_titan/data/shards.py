"""The format of prepared shards: a folder of token ids, an index of documents, and a manifest.

    manifest.json       what the shards are of, sizes and digests; written last, so a folder with it is complete
    documents.index     a RECORD for each document, in order
    tokens-00000.bin    token ids of consecutive documents, each with its end-of-text token; little-endian, nothing else

A document's checksum covers its tokens and the rest of its record, so whatever is read is verified, from any place.
"""

import hashlib
import os
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from swamla_titan.data.document import Prepared
from swamla_titan.errors import UserError
from swamla_titan.system.bounded import Count, Within, fit, parse_json, read_regular

FORMAT, VERSION = "swamla-titan shards", 1
MANIFEST, INDEX = "manifest.json", "documents.index"
WORK = ".preparing"  # the folder of an unfinished preparation, in that of the shards
_MOST_BYTES = 64 << 20  # of a manifest

# `end`: tokens of the shard up to the document's end; `hash`: text_hash; `bytes`: of the text in UTF-8; `replaced`:
# invalid UTF-8 byte sequences, which became U+FFFD.
RECORD = np.dtype(
    [("end", "<u8"), ("hash", "<u8"), ("bytes", "<u8"), ("replaced", "<u4"), ("checksum", "<u4")], align=False
)
UNPACK = struct.Struct("<QQQII").unpack_from
_Name = Annotated[str, Within(0, 4096)]


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens."""

    name: _Name
    fingerprint: _Name
    vocab_size: Count
    eot_id: Count


@dataclass(frozen=True)
class ShardRecord:
    """Sizes of a shard and the digest of its file; `bytes`: of its texts."""

    documents: Count
    tokens: Count
    bytes: Count
    digest: _Name


@dataclass(frozen=True)
class Manifest:
    """Everything about prepared shards but the documents.

    `source`: what they were prepared from. `deduplicated`: whether only the first of equal documents was kept; the
    others are `duplicates`. `empty`: documents of nothing but white space, which were left out. `skipped`: what could
    not be read, and was left out by data.on_error = "skip_file".
    """

    tokenizer: TokenizerRecord
    dtype: _Name
    source: dict[str, Any]
    deduplicated: bool
    documents: Count
    tokens: Count
    bytes: Count
    replaced: Count
    empty: Count
    duplicates: Count
    skipped: list[_Name]
    index: _Name  # its digest
    shards: list[ShardRecord]

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their order, not of how they were made."""
        content = (self.dtype, self.tokenizer.fingerprint, self.index, [shard.digest for shard in self.shards])
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)

    def sizes(self) -> dict[str, int]:
        """The bytes of each file but the manifest."""
        shards = {shard_name(number): shard.tokens * self.token_dtype.itemsize for number, shard in self.numbered()}
        return {INDEX: self.documents * RECORD.itemsize, **shards}

    def digests(self) -> dict[str, str]:
        """The digest of each file but the manifest."""
        return {INDEX: self.index, **{shard_name(number): shard.digest for number, shard in self.numbered()}}

    def numbered(self) -> list[tuple[int, ShardRecord]]:
        return list(enumerate(self.shards))


def shard_name(number: int) -> str:
    return f"tokens-{number:05}.bin"


def dtype_for(vocab_size: int) -> str:
    """The smallest type that holds all ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def checksum(tokens: bytes | memoryview, hash: int, size: int, replaced: int) -> int:
    """The checksum of a document, from the bytes of its tokens and what its record holds beside."""
    return zlib.crc32(struct.pack("<QQI", hash, size, replaced), zlib.crc32(tokens))


def new_digest() -> "hashlib.blake2b":
    """The digest of files."""
    return hashlib.blake2b(digest_size=16)


def prepared(tokens: bytes, record: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Prepared, int]:
    """A document from its tokens and its record, and its invalid UTF-8 byte sequences; ValueError if they differ."""
    _, hash, size, replaced, expected = record
    if checksum(tokens, hash, size, replaced) != expected:
        raise ValueError("it is not what was prepared: its checksum differs")
    return Prepared(np.frombuffer(tokens, dtype), hash, size), replaced


def read_manifest(folder: str, setting: str) -> Manifest:
    """The manifest of a folder of shards; UserError if it is none, or unfinished. `setting` names what said so."""
    path = Path(os.path.realpath(os.path.join(folder, MANIFEST)))  # snapshots of the Hub are links
    try:
        content = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{setting}: {folder}{_what_it_is(folder)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _manifest(parse_json(content))
    except ValueError as error:
        raise UserError(f"{setting}: {path} is no manifest of shards: {error}") from None


def _what_it_is(folder: str) -> str:
    """What is wrong with a folder without a manifest, for a message."""
    if not os.path.isdir(folder):
        return " is no folder" if os.path.exists(folder) else " does not exist"
    if os.path.isdir(os.path.join(folder, WORK)):
        return " is not complete: its preparation is running, or was interrupted. The same command continues it"
    return (
        f" holds no prepared shards (no {MANIFEST}). `swamla-titan data prepare` makes them; data.source = "
        '"local" reads text'
    )


def _manifest(content: Any) -> Manifest:
    """The manifest of parsed JSON; ValueError if it is of another form, or contradicts itself."""
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError("another format")
    if (version := content.pop("version", None)) != VERSION:
        raise ValueError(
            f"version {version!r}, and this program reads {VERSION}. Update it, or prepare the shards again"
        )
    found: Manifest = fit(Manifest, content)
    if found.dtype not in ("uint16", "uint32") or dtype_for(found.tokenizer.vocab_size) != found.dtype:
        raise ValueError(f"tokens of type {found.dtype[:20]}")
    for name in ("documents", "tokens", "bytes"):
        total, parts = getattr(found, name), sum(getattr(shard, name) for shard in found.shards)
        if total != parts:
            raise ValueError(f"{total} {name}, but {parts} in its shards")
    if not found.documents or not all(0 < shard.documents <= shard.tokens for shard in found.shards):
        raise ValueError("shards without documents")
    return found
