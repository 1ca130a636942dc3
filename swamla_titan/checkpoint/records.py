"""What a checkpoint holds beside its tensors: train state, data record, annex record; reading validates them."""

import functools
import gzip
import hashlib
import json
import logging
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

import swamla_titan
from swamla_titan.checkpoint.manifest import ANNEX_RECORD, DATA, MOST_TRAIN_STATE, TRAIN_STATE
from swamla_titan.config import Config
from swamla_titan.config.shipped import checkout
from swamla_titan.data import (
    CompressedVocabulary,
    Exclusion,
    Tokenizer,
    TrainingData,
    compress,
    load_tokenizer,
    taken_from_cursors,
)
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.system.bounded import Count, Within, fit, inflated, key_of, parse_json, read_regular

logger = logging.getLogger(__name__)

_MOST_FINGERPRINT = 1 << 15  # characters; 2,000 are usual, 300 more for each source of a mixture
_MOST_STREAMS = 1 << 24
_MOST_TOKENS = 1 << 24
_MOST_PACKED = 64 << 20  # bytes, compressed or not; of 400,000 files there are 30 MB, of 4M compressed ids 32 MB


def _packed(record: dict[str, Any]) -> bytes:
    """A record as compressed JSON, always the same bytes."""
    return gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0)


def _unpacked(path: Path) -> Any:
    return parse_json(inflated(read_regular(path, _MOST_PACKED), _MOST_PACKED))


@functools.cache
def _versions() -> dict[str, str]:
    """Of the program and what it runs on; the commit where it runs from a checkout with git, "-dirty" if changed."""
    found = {
        "swamla_titan": swamla_titan.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if root := checkout():
        # No repository above the checkout is meant, and its index is not to be refreshed on disk.
        own = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.run(
                command, env=own, check=True, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
            ).stdout.strip()
    return found


@dataclass
class TrainState:
    """Where a run stands after `step`: the file train.json.

    `sequences` is the index of the next global sequence. `cursors` maps each stream's number to its position; empty
    means that the data start from the beginning. `excluded` is the job's list of what could not be read; the file has
    no such key if that is nothing. `fingerprint` has all that must be equal for a run to continue from the checkpoint:
    the model's shape, data, tokenizer, and what determines the order of the data.

    Reading validates the file against the types here, see system/bounded.py.
    """

    step: Count
    tokens: Count
    sequences: Count
    cursors: dict[int, dict[str, Any]]
    fingerprint: dict[str, Any] = field(metadata={"key": "identity"})
    replaced_bytes: Count = 0
    excluded: list[Exclusion] = field(default_factory=list)
    source_tokens: dict[str, Count] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {**_versions()})

    def to_json(self) -> str:
        """The content of train.json."""
        content = {key_of(each): getattr(self, each.name) for each in fields(self)}
        for name in ("excluded", "source_tokens"):
            if not content[name]:
                del content[name]
        return json.dumps(content, indent=1, default=asdict)


def read_train_state(checkpoint: Path) -> TrainState:
    """The train state of a checkpoint; raises UserError if it cannot be read."""
    path = checkpoint / TRAIN_STATE
    try:
        state: TrainState = fit(TrainState, parse_json(read_regular(path, MOST_TRAIN_STATE)))
        state.excluded += taken_from_cursors(state.cursors)  # of checkpoints before 0.2
        _require_consistent(state)
        return state
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a train state of this program's checkpoints ({error})") from None


def _require_consistent(state: TrainState) -> None:
    if len(json.dumps(state.fingerprint)) > _MOST_FINGERPRINT:
        raise ValueError("its fingerprint has more text than this program writes")
    streams = state.fingerprint.get("data.streams")
    sources = state.fingerprint.get("data.sources")
    if type(streams) is int and isinstance(sources, dict):
        streams *= len(sources)
    if state.cursors and type(streams) is int and state.cursors.keys() != {*range(min(streams, _MOST_STREAMS))}:
        raise ValueError(f"it has the cursors of {len(state.cursors)} streams, and its fingerprint has {streams}")


@dataclass
class _Validation:
    """The result of `validation_record`."""

    set: Count
    fingerprint: str


def validation_record(recorded: dict[str, Any] | None, held_out: str | None) -> dict[str, Any] | None:
    """Which text validation reads, and a number that increases whenever a run changes it.

    The settings of validation may change in a run, and losses on other text are another curve. `recorded` is the data
    record of the checkpoint to resume from, `held_out` the fingerprint of the text; None: there is no validation.
    """
    before: dict[str, Any] | None = (recorded or {}).get("validation")
    if held_out is None or (before and before["fingerprint"] == held_out):
        return before
    if before:
        logger.warning(
            "validation reads other text than before: from here on val_loss is another curve, marked val_set = %d",
            before["set"] + 1,
        )
    return {"set": before["set"] + 1 if before else 1, "fingerprint": held_out}


def data_record(corpus: TrainingData, validation: dict[str, Any] | None) -> bytes:
    """The content of data.json.gz: the files of the data, how streams divide them, and the `validation_record`."""
    return _packed(corpus.record() | ({"validation": validation} if validation else {}))


def read_data_record(checkpoint: Path) -> dict[str, Any] | None:
    """The data record of a checkpoint; None if it is so old that it has none. Raises UserError if it is unreadable."""
    path = checkpoint / DATA
    if not os.path.lexists(path):
        return None
    try:
        record: dict[str, Any] = fit(dict[str, Any], _unpacked(path))
        if "validation" in record:
            fit(_Validation, record["validation"], "validation")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a data record of this program's checkpoints ({error})") from None


@dataclass
class _Ids:
    """A CompressedVocabulary."""

    tokenizer: str
    digest: str
    size: Count
    ids: Annotated[list[int], Within(1, _MOST_TOKENS)]


@dataclass
class _Record:
    vocabulary: _Ids
    annexes: dict[str, Any]


@dataclass(frozen=True)
class AnnexRecord:
    """What annexes' parameters mean beside the configuration: hashes and compressed ids, in the file annexes.json.gz.

    The hashes follow from the configuration, and the ids from the tokenizer and this Python's Unicode tables. The
    record has them as they were when the parameters were learned. A resumed run keeps the ids, generation uses them,
    and both refuse hashes that this version computes differently.

    `hashes`: the `record` of each annex of the model, by its name.
    """

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
        return _packed(asdict(_Record(ids, self.hashes)))

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
        found: _Record = fit(_Record, _unpacked(path))
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
    """The vocabulary of the checkpoint to resume from if it has this tokenizer, else the one of this version."""
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
    """Give annexes the ids that the checkpoint recorded; UserError if this version cannot look up as they did then."""
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
