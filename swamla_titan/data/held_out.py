"""Held-out text: which documents training leaves out, by their text alone, and the sequences that validation reads."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swamla_titan.data.batches import IGNORED, MicroBatch, document_ids, micro_batch
from swamla_titan.data.document import Document
from swamla_titan.data.faults import one_line
from swamla_titan.data.tokenizer import Tokenizer
from swamla_titan.errors import UserError

logger = logging.getLogger(__name__)

HELD_OUT_TEXT = "held_out.npz"  # in the dump folder

# A corpus within both limits is small: it is read in full at start-up, and the fraction held out is exact.
SMALL_DOCUMENTS = 2048
SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class HeldOut:
    """Documents whose hash is less than `threshold` (0 holds out none) or in `exact`.

    The text decides, not the place: either all copies of a document are held out or none, and moving or splitting files
    changes nothing.
    """

    threshold: int
    exact: frozenset[int] = frozenset()

    def __contains__(self, document: Document) -> bool:
        if not self.threshold and not self.exact:
            return False
        number = document.hash
        return number < self.threshold or number in self.exact

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """Which documents with these hashes are held out: uint64 [n] -> bool [n]."""
        found = np.isin(hashes, np.array(sorted(self.exact), dtype=np.uint64))
        return found | (hashes <= np.uint64(self.threshold - 1)) if self.threshold else found

    @property
    def fingerprint(self) -> int | str:
        if not self.exact:
            return self.threshold
        digest = hashlib.blake2b(repr(sorted(self.exact)).encode(), digest_size=16).hexdigest()
        return f"{self.threshold} {digest}"


def choose_held_out(documents: Iterable[Document], fraction: float, separator: str = "") -> HeldOut:
    """Choose what to hold out of a corpus of `documents`, of which only as many are read as needed.

    In a large corpus a document is held out if its hash is in the lowest `fraction` of all possible hashes. In a small
    one this could by chance hold out nothing or everything, so a `fraction` of the documents is held out, those with
    the lowest hashes, at least one and never all. `separator` is data.text_separator, for a message.
    """
    if fraction == 0:
        return HeldOut(0)
    hashes: set[int] = set()
    size = 0
    for document in documents:
        if document.is_empty:
            continue
        if document.hash not in hashes:  # so that shards without duplicates have the same held out
            hashes.add(document.hash)
            size += document.size
        if len(hashes) > SMALL_DOCUMENTS or size > SMALL_BYTES:
            return HeldOut(int(fraction * 2**64))
    if len(hashes) < 2:
        split = "Split it by data.text_separator"
        if separator:
            split = (
                f"data.text_separator = {separator!r} does not divide it; it is taken literally, line ends of Windows "
                r"(\r\n) included, and on a command line a backslash stays one: write $'\n\n' in bash. Correct it"
            )
        raise UserError(
            f"validation.fraction: the training data is a single document, so none can be held out. {split}, or give "
            "validation.path, or set validation.fraction = 0 to train without validation."
        )
    count = max(1, min(len(hashes) - 1, round(fraction * len(hashes))))
    return HeldOut(sorted(hashes)[count - 1] + 1)


@dataclass(frozen=True)
class ValidationText:
    """The tokens that validation reads, and what they follow from.

    A run keeps held-out text in its dump folder, because finding it again may take minutes: 1% of the documents of a
    large corpus is spread over a hundred times as many tokens.
    """

    tokens: np.ndarray  # int32 [n]
    basis: dict[str, Any] | None = None  # of text to be kept: all that it follows from, as JSON types

    @classmethod
    def kept(cls, path: Path, basis: dict[str, Any]) -> "ValidationText | None":
        """The text in the file `path`; None if it is not there or, with a warning, damaged or of another basis."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                tokens, found = content["tokens"], json.loads(content["basis"].tobytes())
            if tokens.dtype != np.int32 or tokens.ndim != 1 or not isinstance(found, dict):
                raise ValueError("it is not of this form")
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s): held-out text is chosen again", path, one_line(error))
            return None
        if found == basis:
            return cls(tokens)
        changed = ", ".join(name for name, value in basis.items() if found.get(name) != value)
        logger.warning("%s is held-out text of another %s: it is chosen again", path, changed)
        return None

    def keep(self, path: Path) -> None:
        """Write the file `path`; if that fails, the next start chooses the text again."""
        if self.basis is None:
            return
        new = path.with_name(f".{path.name}.new")
        try:
            new.unlink(missing_ok=True)  # also a link or a pipe, which must not be written to
            with new.open("xb") as file:
                np.savez(file, tokens=self.tokens, basis=np.frombuffer(json.dumps(self.basis).encode(), np.uint8))
            new.replace(path)
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next start chooses held-out text again", path, error)


@dataclass(frozen=True)
class ValidationSet:
    """N packed sequences, the same on all ranks. Bits per byte = sum of losses / ln 2 / sum of `target_bytes`."""

    tokens: torch.Tensor  # [N, T] int64
    targets: torch.Tensor  # [N, T] int64, -100 behind the last document
    document_ids: torch.Tensor | None  # [N, T] int64, with data.document_mask
    target_bytes: torch.Tensor  # [N, T] int64: bytes of text of each target, 0 for end of text and ignored targets

    @property
    def fingerprint(self) -> str:
        """The number of targets and a digest of them."""
        digest = hashlib.blake2b(self.targets.numpy().tobytes(), digest_size=8).hexdigest()
        return f"{int((self.targets != IGNORED).sum())} targets, {digest}"

    def micro_batches(self, rank: int, world_size: int, local_batch_size: int) -> Iterator[MicroBatch]:
        """Sequences rank, rank + world_size, ... in micro-batches; all ranks get equally many, padded if necessary."""
        most = -(-len(self.tokens) // world_size)
        for start in range(0, most, local_batch_size):
            own = slice(rank + start * world_size, rank + (start + local_batch_size) * world_size, world_size)
            yield micro_batch(self.tokens, self.targets, self.document_ids, own, local_batch_size)


def pack(text: np.ndarray, seq_len: int, tokenizer: Tokenizer, document_mask: bool) -> ValidationSet:
    """Cut tokens into sequences of `seq_len`, the last one padded; every token but the first is a target once."""
    count = -(-(len(text) - 1) // seq_len)
    tokens = np.full(count * seq_len, tokenizer.eot_id, dtype=np.int64)
    targets = np.full(count * seq_len, IGNORED, dtype=np.int64)
    tokens[: len(text) - 1] = text[:-1]
    targets[: len(text) - 1] = text[1:]
    lengths = np.where(targets == IGNORED, 0, tokenizer.byte_lengths[np.maximum(targets, 0)])
    packed = torch.from_numpy(tokens).view(count, seq_len)
    return ValidationSet(
        packed,
        torch.from_numpy(targets).view(count, seq_len),
        document_ids(packed, tokenizer.eot_id) if document_mask else None,
        torch.from_numpy(lengths.astype(np.int64)).view(count, seq_len),
    )
