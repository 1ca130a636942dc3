"""A step's batch, and how it is cut into micro-batches of one fixed shape."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from swamla_titan.config.schedule import Schedule
from swamla_titan.data.document import Cursor
from swamla_titan.data.exclusions import Exclusion
from swamla_titan.data.mixture import SequenceOrder

IGNORED = -100  # as a target: not counted in the loss


class Shape(NamedTuple):
    """The shape of the global batches that begin with global sequence `first` or a later one, until the next Shape."""

    first: int
    global_batch_size: int
    seq_len: int


def shape_at(shapes: Sequence[Shape], first: int) -> Shape:
    """The shape of the global batch that begins with sequence `first`; `shapes` are ascending."""
    return next(shape for shape in reversed(shapes) if shape.first <= first)


def shapes_of(schedule: Schedule) -> list[Shape]:
    """The shapes of a run's batches."""
    return [
        Shape(stage.begin.sequences, stage.training.global_batch_size, stage.training.seq_len)
        for stage in schedule.stages
    ]


@dataclass(frozen=True)
class StepBatch:
    """One rank's slice of a step's global batch; it may be empty.

    The global batch begins with sequence number `first`, and `sequences` are the numbers of the sequences here,
    ascending. `replaced` counts invalid UTF-8 byte sequences, which became U+FFFD, in documents that begin in this
    step. `cursors`: of all streams that the rank owns, after the batch. `excluded`: what these streams found unreadable
    in this step, and exclude from now on. `largest`: sequences of the rank that has the most of the global batch.
    """

    first: int
    sequences: torch.Tensor  # [n] int64
    tokens: torch.Tensor  # [n, T] int64
    targets: torch.Tensor  # [n, T] int64
    document_ids: torch.Tensor | None  # [n, T] int64, with data.document_mask
    replaced: int
    cursors: dict[int, Cursor] = field(default_factory=dict)
    excluded: list[Exclusion] = field(default_factory=list)
    largest: int = 0
    sources: torch.Tensor | None = None  # [n] int64, of a mixture: the number of the source of each sequence

    def text(self, index: int) -> list[int]:
        """The tokens of a sequence, without padding."""
        last = int(torch.nonzero(self.targets[index] != IGNORED)[-1])  # whose target is the last token
        found: list[int] = self.tokens[index, : last + 2].tolist()
        return found


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch [local_batch_size, T]: `sequences` of the data, then padding whose targets are all -100."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None
    sequences: int
    sources: torch.Tensor | None = None  # [local_batch_size] int64, as in StepBatch; 0 for padding

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device; the copy does not wait where the memory is pinned."""
        ids = None if self.document_ids is None else self.document_ids.to(device, non_blocking=True)
        tokens, targets = (part.to(device, non_blocking=True) for part in (self.tokens, self.targets))
        sources = None if self.sources is None else self.sources.to(device, non_blocking=True)
        return MicroBatch(tokens, targets, ids, self.sequences, sources)


def micro_batches(batch: StepBatch, local_batch_size: int, count: int) -> Iterator[MicroBatch]:
    """Cut a rank's sequences into `count` micro-batches, padded to one shape; both are equal on all ranks."""
    assert len(batch.tokens) <= local_batch_size * count, "count comes from micro_batch_count"
    for index in range(count):
        own = slice(index * local_batch_size, (index + 1) * local_batch_size)
        yield micro_batch(batch.tokens, batch.targets, batch.document_ids, own, local_batch_size, batch.sources)


def micro_batch_count(
    first: int, global_batch_size: int, order: int | SequenceOrder, world_size: int, local_batch_size: int
) -> int:
    """Micro-batches of the step that begins with sequence `first`: as many as the rank with the most sequences needs.

    Every rank computes the same number without communication.
    """
    return -(-max(sequences_per_rank(first, global_batch_size, order, world_size)) // local_batch_size)


def micro_batch_size(local_batch_size: int, global_batch_size: int, world_size: int) -> int:
    """Sequences of a micro-batch: at most a rank's slice of the global batch."""
    return min(local_batch_size, -(-global_batch_size // world_size))


def sequences_per_rank(first: int, global_batch_size: int, order: int | SequenceOrder, world_size: int) -> list[int]:
    """Number of sequences that each rank reads, from its streams, of the global batch that begins with `first`.

    `order`: that of a mixture, or the number of streams of a single source.
    """
    if isinstance(order, SequenceOrder) and not order.has_one_source:
        slots = order.slots(np.arange(first, first + global_batch_size))
        mixed: list[int] = np.bincount(slots % world_size, minlength=world_size).tolist()
        return mixed
    streams = order.streams if isinstance(order, SequenceOrder) else order
    rounds, rest = divmod(global_batch_size, streams)  # rounds through all streams, and part of one
    owned = np.bincount(np.arange(streams) % world_size, minlength=world_size)
    numbers = np.arange(first, first + rest)
    counts: list[int] = (rounds * owned + np.bincount(numbers % streams % world_size, minlength=world_size)).tolist()
    return counts


def distinct_steps(global_batch_size: int, streams: int) -> int:
    """Number of steps after which the assignment of sequences to streams repeats; at most 1000."""
    return min(streams // math.gcd(streams, global_batch_size), 1000)


def waits_for_streams(
    global_batch_size: int, order: int | SequenceOrder, world_size: int, local_batch_size: int
) -> str | None:
    """A warning if ranks idle for over a tenth of the time, because others own more streams; else None."""
    streams = order.streams if isinstance(order, SequenceOrder) else order
    steps = distinct_steps(global_batch_size, streams)
    counts = [
        micro_batch_count(step * global_batch_size, global_batch_size, order, world_size, local_batch_size)
        for step in range(steps)
    ]
    fair_share = -(-global_batch_size // world_size)
    needed = -(-fair_share // local_batch_size)
    if sum(counts) <= 1.1 * needed * steps:
        return None
    return (
        f"data.streams = {streams} cannot be shared equally by the {world_size} ranks that read: a step takes "
        f"{sum(counts) / steps:.3g} micro-batches where {needed} would do. In a new run, set data.streams to a "
        f"multiple of {world_size}, such as {-(-streams // world_size) * world_size}"
    )


def micro_batch(
    tokens: torch.Tensor,
    targets: torch.Tensor,
    document_ids: torch.Tensor | None,
    chosen: slice,
    size: int,
    sources: torch.Tensor | None = None,
) -> MicroBatch:
    """A micro-batch of `size` sequences: the chosen ones of [n, T], padded with sequences without targets."""
    given = len(tokens[chosen])

    def filled(part: torch.Tensor, value: int) -> torch.Tensor:
        if given == size:
            return part[chosen]
        full = torch.full((size, *part.shape[1:]), value, dtype=part.dtype, pin_memory=part.is_pinned())
        full[:given] = part[chosen]
        return full

    ids = None if document_ids is None else filled(document_ids, 0)
    of_sources = None if sources is None else filled(sources, 0)
    return MicroBatch(filled(tokens, 0), filled(targets, IGNORED), ids, given, of_sources)


def document_ids(tokens: torch.Tensor, eot_id: int) -> torch.Tensor:
    """Number of each token's document within its sequence, from 0: [N, T] -> [N, T] int64.

    End of text belongs to the document it ends: ids[t] = number of eot in tokens[:t].
    """
    ends = tokens.numpy() == eot_id  # by NumPy, as the loader copies: torch would wake all its threads
    return torch.from_numpy(ends.cumsum(axis=-1, dtype=np.int64) - ends)
