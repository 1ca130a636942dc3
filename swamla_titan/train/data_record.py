"""What a checkpoint remembers of the files of the training data, for runs that go on after some of them are damaged."""

import gzip
import json
from pathlib import Path
from typing import Any

from swamla_titan.data import Corpus
from swamla_titan.errors import UserError
from swamla_titan.parallel.agreement import merged
from swamla_titan.parallel.world import World

NAME = "data.json.gz"


def require_same_data(world: World, corpus: Corpus) -> None:
    """Raise UserError, on every rank, if ranks see different files: copies on several machines, one of them damaged."""
    found = merged(world, {world.rank: corpus.fingerprint()})
    for rank, fingerprint in sorted(found.items()):
        for name in fingerprint:
            if fingerprint[name] != found[0][name]:
                raise UserError(
                    f"the processes see different training data; make the copies alike: {name} is {found[0][name]!r} "
                    f"for rank 0 and {fingerprint[name]!r} for rank {rank}"
                )


def data_record(corpus: Corpus) -> bytes:
    """The content of the file NAME of a checkpoint."""
    return gzip.compress(json.dumps(corpus.record(), separators=(",", ":")).encode(), mtime=0)


def read_data_record(checkpoint: Path | None) -> dict[str, Any] | None:
    """What `data_record` was made of; None without a checkpoint, and for those of before there were such records."""
    if checkpoint is None or not (checkpoint / NAME).exists():
        return None
    try:
        content: dict[str, Any] = json.loads(gzip.decompress((checkpoint / NAME).read_bytes()))
        return content
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{checkpoint / NAME}: not a record of this program's checkpoints ({error})") from None
