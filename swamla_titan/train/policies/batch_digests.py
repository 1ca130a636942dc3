"""A log of what each step trained on: a digest of every global batch, to compare runs with."""

import hashlib
import json
import logging
from pathlib import Path

from swamla_titan.config.sections import Metrics
from swamla_titan.data import StepBatch
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise
from swamla_titan.errors import UserError
from swamla_titan.system.line_file import LineFile
from swamla_titan.train.policy import Policy

logger = logging.getLogger(__name__)

NAME = "batch_digests.jsonl"


def batch_digests(config: Metrics, folder: Path, world: World) -> list[Policy]:
    """The policy if [metrics] asks for it; all ranks call this. UserError if its file cannot be written."""
    return [BatchDigests(folder / NAME, world)] if config.batch_digests else []


class BatchDigests(Policy):
    """Appends a line for each step to the file `path`: {"step": 7, "digest": "..."}.

    The digest is that of the digests of all sequences, tokens and targets, in the order of their numbers. So it does
    not depend on which rank read a sequence, nor on how many ranks read the same one.
    """

    def __init__(self, path: Path, world: World) -> None:
        self._world = world
        self._file = all_ranks_or_raise(world, lambda: _opened(path) if world.is_rank_0 else None)

    def take_batch(self, step: int, batch: StepBatch) -> None:
        """Write the line of the step before it is trained; all ranks call this."""
        rows = zip(batch.sequences.tolist(), batch.tokens, batch.targets)
        own = {number: _digest(tokens.numpy().tobytes(), targets.numpy().tobytes()) for number, tokens, targets in rows}
        every = all_gather_dict(self._world, own)
        if self._file:
            digest = _digest(*(every[number] for number in sorted(every))).hex()
            if warning := self._file.write(json.dumps({"step": step, "digest": digest})):
                logger.warning("%s", warning)

    def close(self, discard: bool) -> None:
        """Write what waits in memory because the disk was full."""
        if self._file and (lost := self._file.close()):
            logger.warning("%s", lost)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _opened(path: Path) -> LineFile:
    try:
        return LineFile(path)
    except OSError as error:
        raise UserError(f"metrics.batch_digests: {path} cannot be written ({error.strerror or error})") from None
