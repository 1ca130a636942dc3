"""What a checkpoint says beside its tensors: where the run stood, and which run it is."""

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import swamla_titan
from swamla_titan.checkpoint.fingerprint import kind_of
from swamla_titan.checkpoint.manifest import MOST_RECORD, RECORD
from swamla_titan.config.rules import ALLOWED_DIFFERENCES
from swamla_titan.data import fingerprint_changes
from swamla_titan.errors import UserError
from swamla_titan.system.bounded import Count, fit, parse_json, read_regular
from swamla_titan.system.console import Lines, one_line

logger = logging.getLogger(__name__)

_MOST_IDENTITY = 1 << 13  # characters; 2,000 are usual, and what differs of them is shown
_MOST_STREAMS = 1 << 24
ANEW = {"data", "tokenizer"}  # with others of these the cursors mean nothing


@dataclass
class Record:
    """What a checkpoint holds beside tensors.

    `sequences` is the number of the global sequence that comes next. `identity` names what must be equal for the run to
    be the same run: shape of the model, data, tokenizer and what fixes the order of the data. `cursors` maps each
    stream's number to its position; empty: the data begin.

    What stands in a file is held against the types here, see system/bounded.py.
    """

    step: Count
    tokens: Count
    sequences: Count
    cursors: dict[int, dict[str, Any]]
    identity: dict[str, Any]
    replaced_bytes: Count = 0
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "swamla_titan": swamla_titan.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )


def read_record(path: Path) -> Record:
    """The record of a checkpoint; raises UserError if it cannot be read."""
    try:
        record: Record = fit(Record, parse_json(read_regular(path / RECORD, MOST_RECORD)))
        _require_consistent(record)
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{path / RECORD}: not a record of this program's checkpoints ({error})") from None


def optimizer_of(newest: Path | None) -> str | None:
    """optimizer.name of the run that wrote a checkpoint."""
    if newest is None:
        return None
    name = read_record(newest).identity.get("optimizer.name")
    return name if isinstance(name, str) else None


def _require_consistent(record: Record) -> None:
    if len(json.dumps(record.identity)) > _MOST_IDENTITY:
        raise ValueError("its identity has more text than this program writes")
    streams = record.identity.get("data.streams")
    if record.cursors and type(streams) is int and record.cursors.keys() != {*range(min(streams, _MOST_STREAMS))}:
        raise ValueError(f"it has the places of {len(record.cursors)} streams, and says that there are {streams}")


def record_to_resume(
    newest: Path | None, identity: dict[str, Any], allow: str = "", details: Mapping[str, str] | None = None
) -> Record:
    """The record of the checkpoint to resume from, or of a run that begins.

    `allow` names kinds of differences (rules.ALLOWED_DIFFERENCES), separated by commas. With other data or another
    tokenizer the data begin anew; with another batch they go on where they were. UserError for a difference that is not
    allowed. `details` has more to say of some names of the identity.
    """
    if newest is None:
        return Record(step=0, tokens=0, sequences=0, cursors={}, identity=identity)
    record = read_record(newest)
    allowed = {name.strip() for name in allow.split(",")}
    changes = fingerprint_changes(record.identity, identity, details)
    kinds = {name: kind_of(name) for name in changes}
    found = set(kinds.values())
    if refused := [change for name, change in changes.items() if kinds[name] not in allowed]:
        names = ",".join(sorted(found))
        possible = found <= {*ALLOWED_DIFFERENCES}
        raise UserError(
            f"{newest} belongs to another run:",
            *(f"  {line}" for line in refused),
            "  put these back, or give this run its own job.dump_folder"
            + (f". To go on from it all the same: --checkpoint.allow {names}" if possible else ""),
        )
    if changes:
        anew = ANEW & found
        logger.warning(
            "%s differs from this run, as checkpoint.allow permits%s:\n  %s",
            newest,
            "; the data begin anew" if anew else "",
            Lines("\n  ".join(map(one_line, changes.values()))),
        )
        if anew:
            return replace(record, sequences=0, cursors={})
    return record
