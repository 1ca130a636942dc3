"""Where in the data the batches of bad steps come from, for who looks into a run that stopped for them."""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swamla_titan.data import BatchLoader
from swamla_titan.distributed.agreement import all_gather_dict
from swamla_titan.distributed.mesh import World
from swamla_titan.train.policies.bad_steps import BadStep

logger = logging.getLogger(__name__)

Cursor = dict[str, Any]


class BatchPlaces:
    """Remembers where in its streams each of the last batches began: this rank's streams, the last `steps` batches."""

    def __init__(self, loader: BatchLoader, steps: int) -> None:
        self._loader = loader
        self._places: deque[tuple[int, Callable[[], dict[int, Cursor]]]] = deque(maxlen=steps)

    def before_batch(self, step: int) -> None:
        """The batch of `step` (from 1) is about to be taken from the loader."""
        self._places.append((step, self._loader.place()))

    def write(
        self, path: Path, bad: Sequence[BadStep], first: int, global_batch_size: int, streams: int, world: World
    ) -> None:
        """`write_bad_batches` with the places of all ranks; all must call it. A disk that refuses is merely told of."""
        cursors = self.everywhere(world)
        if world.is_rank_0:
            try:
                write_bad_batches(path, bad, first, global_batch_size, streams, cursors)
            except OSError as error:  # what matters is what becomes of the run
                logger.error("%s could not be written: %s", path, error.strerror)

    def everywhere(self, world: World) -> dict[tuple[int, int], Cursor]:
        """(step, stream) -> cursor of all ranks' streams, on every rank; all must call it."""
        return all_gather_dict(
            world, {(step, stream): place for step, own in self._places for stream, place in own().items()}
        )


def write_bad_batches(
    path: Path,
    bad: Sequence[BadStep],
    first: int,
    global_batch_size: int,
    streams: int,
    cursors: dict[tuple[int, int], Cursor],
) -> None:
    """Write a JSON list with an object for each bad step: its numbers, and what its batch consisted of.

    `first_sequence` .. `last_sequence` are global sequence numbers, counted so that step 1 would begin with `first`, 0
    where batches had one size from the beginning; sequence g is stream g % streams's next one.
    `cursors` maps each stream that gave some to its place before the batch; it lacks steps before a restart. JSON has
    no word for NaN and infinities: they are the strings "nan", "inf" and "-inf". A limit that there was not is absent.
    Raises OSError.
    """
    objects: list[dict[str, Any]] = []
    for step in bad:
        begin = first + (step.step - 1) * global_batch_size
        numbers = range(begin, begin + global_batch_size)
        read = sorted({number % streams for number in numbers})
        entry: dict[str, Any] = {"step": step.step, "loss": _number(step.loss), "grad_norm": _number(step.grad_norm)}
        if math.isfinite(step.limit):
            entry["limit"] = step.limit
        entry |= {"first_sequence": numbers[0], "last_sequence": numbers[-1], "streams": streams}
        places = {stream: cursors[step.step, stream] for stream in read if (step.step, stream) in cursors}
        if places:
            entry["cursors"] = places
        objects.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(objects, indent=1) + "\n", encoding="utf-8")


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
