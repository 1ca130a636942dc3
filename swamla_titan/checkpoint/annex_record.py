"""What annexes' parameters mean beside the configuration, as a file of a checkpoint: hashes, and the compressed ids.

The hashes follow from the configuration, and the ids from the tokenizer and this Python's Unicode tables. The record
says what they were when the parameters were learned: a run that continues keeps the ids, generation uses them, and
neither takes hashes that this version computes otherwise.
"""

import gzip
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from swamla_titan.checkpoint.manifest import ANNEX_RECORD
from swamla_titan.config import Config
from swamla_titan.data import CompressedVocabulary, Tokenizer, compress, load_tokenizer
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.system.bounded import Count, Within, fit, inflated, parse_json, read_regular

logger = logging.getLogger(__name__)

_MOST = 64 << 20  # bytes, compressed or not; of 4M tokens there are 32 MB


@dataclass
class _Ids:
    """A CompressedVocabulary."""

    tokenizer: str
    digest: str
    size: Count
    ids: Annotated[list[int], Within(1, 1 << 24)]


@dataclass
class _Record:
    vocabulary: _Ids
    annexes: dict[str, Any]


@dataclass(frozen=True)
class AnnexRecord:
    """`hashes`: what each annex of a model gives as its `record`, by its name."""

    vocabulary: CompressedVocabulary
    hashes: dict[str, Any]

    @classmethod
    def of(cls, model: ModelConfig, vocabulary: CompressedVocabulary) -> "AnnexRecord":
        """The record of a model, as this version computes it."""
        return cls(vocabulary, {name: annex.record(model) for name, annex in annexes_of(model).items()})

    def fingerprint(self) -> dict[str, str]:
        """Flat name -> value, for the fingerprint of a run."""
        digests = {f"annexes.{name}": _digest(record) for name, record in self.hashes.items()}
        return {"annexes.vocabulary": self.vocabulary.digest} | digests

    def to_bytes(self) -> bytes:
        """The content of the file."""
        own = self.vocabulary
        ids = _Ids(own.tokenizer, own.digest, own.size, own.ids.tolist())
        content = json.dumps(asdict(_Record(ids, self.hashes)), separators=(",", ":"))
        return gzip.compress(content.encode(), mtime=0)

    def require_equal(self, model: ModelConfig, checkpoint: Path) -> None:
        """Raise UserError if this version gives the annexes of `model` another record."""
        now = AnnexRecord.of(model, self.vocabulary)
        for name, record in now.hashes.items():
            if record != self.hashes.get(name):
                raise UserError(f"{checkpoint}: this version's {name} hashes otherwise than the one that wrote it")


def read_annex_record(checkpoint: Path) -> AnnexRecord | None:
    """The record of a checkpoint; None if it has none. Raises UserError if it is unreadable."""
    path = checkpoint / ANNEX_RECORD
    if not os.path.lexists(path):
        return None
    try:
        found: _Record = fit(_Record, parse_json(inflated(read_regular(path, _MOST), _MOST)))
        own = found.vocabulary
        ids = np.array(own.ids, dtype=np.int64)
        if not 0 <= ids.min() <= ids.max() < own.size <= len(ids):
            raise ValueError(f"its ids are not those of a vocabulary of {own.size}")
        vocabulary = CompressedVocabulary(ids.astype(np.int32), own.size, own.tokenizer)
        if vocabulary.digest != own.digest:
            raise ValueError("its ids do not have its digest")
        return AnnexRecord(vocabulary, found.annexes)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a record of this program's checkpoints ({error})") from None


def compressed_vocabulary(tokenizer: Tokenizer, recorded: AnnexRecord | None) -> CompressedVocabulary:
    """That of the checkpoint to resume from, if it is of this tokenizer; else this version's."""
    own = compress(tokenizer)
    if recorded is None or recorded.vocabulary.tokenizer != tokenizer.fingerprint:
        return own
    if recorded.vocabulary.digest != own.digest:
        logger.warning(
            "this Python's tables of Unicode would compress the vocabulary to %d ids; the run keeps the %d that it "
            "began with",
            own.size,
            recorded.vocabulary.size,
        )
    return recorded.vocabulary


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def use_annex_record(path: Path, config: Config, model: SWAMLAModel, tokenizer: Tokenizer | None) -> None:
    """Let annexes look up as they did when the checkpoint was written; UserError if this version cannot."""
    if not len(model.annexes):
        return
    record = read_annex_record(path)
    if record is None:
        raise UserError(f"{path} lacks {ANNEX_RECORD}")
    record.require_equal(config.model, path)
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    if record.vocabulary.tokenizer != tokenizer.fingerprint or len(record.vocabulary.ids) > config.model.vocab_size:
        raise UserError(f"{path / ANNEX_RECORD} has the vocabulary of another tokenizer than {config.data.tokenizer}")
    model.annexes.use(record.vocabulary.ids, record.vocabulary.size)
