"""What a checkpoint remembers of the data: their files and how they are divided, and which text validation reads."""

import gzip
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swamla_titan.data import Corpus, ValidationSet
from swamla_titan.distributed.agreement import all_gather_dict
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.system.bounded import Count, fit, inflated, parse_json, read_regular

logger = logging.getLogger(__name__)

NAME = "data.json.gz"
_MOST = 64 << 20  # bytes, packed or not; of 400,000 files there are 30 MB


@dataclass
class _Validation:
    """What `validation_record` gives."""

    set: Count
    fingerprint: str


def require_same_data(world: World, corpus: Corpus) -> None:
    """Raise UserError, on every rank, if ranks see different files: copies on several machines, one of them damaged."""
    found = all_gather_dict(world, {world.rank: corpus.fingerprint()})
    for rank, fingerprint in sorted(found.items()):
        for name in fingerprint:
            if fingerprint[name] != found[0][name]:
                raise UserError(
                    f"the processes see different training data; make the copies alike: {name} is {found[0][name]!r} "
                    f"for rank 0 and {fingerprint[name]!r} for rank {rank}"
                )


def validation_record(recorded: dict[str, Any] | None, held_out: ValidationSet | None) -> dict[str, Any] | None:
    """Which text validation reads, and the how-manieth of the run that is; `recorded` as in `read_data_record`.

    The settings of validation may change in a run, and losses on other text are another curve.
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
    """The content of the file NAME of a checkpoint; `validation` as made by `validation_record`."""
    content = corpus.record() | ({"validation": validation} if validation else {})
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def read_data_record(checkpoint: Path | None) -> dict[str, Any] | None:
    """What `data_record` was made of; None without a checkpoint, and for those of before there were such records."""
    if checkpoint is None or not os.path.lexists(checkpoint / NAME):
        return None
    try:
        content = inflated(read_regular(checkpoint / NAME, _MOST), _MOST)
        record: dict[str, Any] = fit(dict[str, Any], parse_json(content))
        if "validation" in record:
            fit(_Validation, record["validation"], "validation")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / NAME}: not a record of this program's checkpoints ({error})") from None
