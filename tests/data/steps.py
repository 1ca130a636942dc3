"""The steps of any number of ranks and loader processes, read in one process."""

from collections.abc import Sequence

from swamla_titan.data import Shape
from swamla_titan.data.corpus import Corpus
from swamla_titan.data.loader import StepReader
from swamla_titan.data.streams import initial_cursor


def steps_read(corpus: Corpus, shapes: Sequence[Shape], world_size: int, workers: int) -> list[dict[int, list[int]]]:
    """The first nine global batches: {number of the sequence: its tokens} of each."""
    parts = []
    for rank in range(world_size):
        own = list(range(rank, corpus.data.streams, world_size))
        cursors = {stream: initial_cursor() for stream in own}
        parts += [iter(StepReader(corpus, own[worker::workers], shapes, 0, cursors)) for worker in range(workers)]
    steps = [[next(part) for part in parts] for _ in range(9)]
    return [
        {number: row for part in step for number, row in zip(part.sequences.tolist(), part.tokens.tolist())}
        for step in steps
    ]
