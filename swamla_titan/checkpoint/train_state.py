"""What a checkpoint holds beside its tensors: the train state of its step, and which data the run reads."""

import gzip
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import swamla_titan
from swamla_titan.checkpoint.manifest import DATA, MOST_TRAIN_STATE, TRAIN_STATE
from swamla_titan.data import Corpus, Exclusion, ValidationSet, taken_from_cursors
from swamla_titan.errors import UserError
from swamla_titan.system.bounded import Count, fit, inflated, key_of, parse_json, read_regular

logger = logging.getLogger(__name__)

_MOST_FINGERPRINT = 1 << 13  # characters; 2,000 are usual, and messages quote what differs
_MOST_STREAMS = 1 << 24
_MOST_DATA = 64 << 20  # bytes, compressed or not; of 400,000 files there are 30 MB


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
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "swamla_titan": swamla_titan.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )

    def to_json(self) -> str:
        """The content of train.json."""
        content = {key_of(each): getattr(self, each.name) for each in fields(self)}
        if not self.excluded:
            del content["excluded"]
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
    if state.cursors and type(streams) is int and state.cursors.keys() != {*range(min(streams, _MOST_STREAMS))}:
        raise ValueError(f"it has the cursors of {len(state.cursors)} streams, and its fingerprint has {streams}")


@dataclass
class _Validation:
    """The result of `validation_record`."""

    set: Count
    fingerprint: str


def validation_record(recorded: dict[str, Any] | None, held_out: ValidationSet | None) -> dict[str, Any] | None:
    """Which text validation reads, and a number that increases whenever a run changes it.

    The settings of validation may change in a run, and losses on other text are another curve. `recorded` is the data
    record of the checkpoint to resume from.
    """
    before: dict[str, Any] | None = (recorded or {}).get("validation")
    if held_out is None or (before and before["fingerprint"] == held_out.fingerprint):
        return before
    if before:
        logger.warning(
            "validation reads other text than before: from here on val_loss is another curve, marked val_set = %d",
            before["set"] + 1,
        )
    return {"set": before["set"] + 1 if before else 1, "fingerprint": held_out.fingerprint}


def data_record(corpus: Corpus, validation: dict[str, Any] | None) -> bytes:
    """The content of data.json.gz: the files of the data, how streams divide them, and the `validation_record`."""
    content = corpus.record() | ({"validation": validation} if validation else {})
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def read_data_record(checkpoint: Path) -> dict[str, Any] | None:
    """The data record of a checkpoint; None if it is so old that it has none. Raises UserError if it is unreadable."""
    path = checkpoint / DATA
    if not os.path.lexists(path):
        return None
    try:
        content = inflated(read_regular(path, _MOST_DATA), _MOST_DATA)
        record: dict[str, Any] = fit(dict[str, Any], parse_json(content))
        if "validation" in record:
            fit(_Validation, record["validation"], "validation")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a data record of this program's checkpoints ({error})") from None
