"""Log-likelihoods of continuations, which all ranks compute together."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swamla_titan.data import IGNORED, MicroBatch
from swamla_titan.data.batches import micro_batch
from swamla_titan.distributed.mesh import World, all_gather_dict


class Request(NamedTuple):
    """Tokens of a text, of which the last are predicted from all before them."""

    context: list[int]  # at least one
    continuation: list[int]


class Score(NamedTuple):
    """The log-probability of a continuation, in nats, and whether each of its tokens is the likeliest one."""

    log_likelihood: float
    is_greedy: bool


class _Window(NamedTuple):
    """Tokens [n + 1], whose last `scored` are targets: [:-1] are inputs, [1:] their targets."""

    request: int
    tokens: list[int]
    scored: int


ScoreMicroBatches = Callable[[Sequence[MicroBatch]], Iterable[Tensor]]
"""Of each micro-batch the scores of its targets, see model/loss_head.py."""


class Scorer:
    """Scores requests by a model, in sequences of `seq_len` tokens that all ranks share.

    Requests are packed into sequences as documents, which see nothing of each other, the longest first. So all
    micro-batches have one shape, as in training, whatever the plan is, and each rank has equally many of them.
    """

    def __init__(self, world: World, seq_len: int, micro_batch_size: int, score: ScoreMicroBatches) -> None:
        self.world, self.seq_len, self.micro_batch_size, self.score = world, seq_len, micro_batch_size, score

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """The score of each request; all ranks call this with the same ones, and have the same result.

        A context that does not fit into a sequence loses its beginning. A continuation that does not fit is predicted
        in several windows, each with as much before it as fits.
        """
        windows = [
            window for number, request in enumerate(requests) for window in _windows(number, request, self.seq_len)
        ]
        rows = _packed(windows, self.seq_len)
        found = all_gather_dict(self.world, dict(self._scores_of_rank(windows, rows)))
        totals = [Score(0.0, True) for _ in requests]
        for index, window in enumerate(windows):
            before, each = totals[window.request], found[index]
            totals[window.request] = Score(before[0] + each[0], before[1] and each[1])
        return totals

    def _scores_of_rank(self, windows: list[_Window], rows: list[list[int]]) -> Iterator[tuple[int, Score]]:
        """Index and score of the windows in this rank's rows."""
        rank, ranks, size = self.world.data_rank, self.world.degrees.data, self.micro_batch_size
        if not rows:
            return
        tensors = _tensors(windows, rows, self.seq_len)
        # Every rank runs as many micro-batches as the one with the most, because the model's collectives must match.
        own = [
            slice(rank + start * ranks, rank + (start + size) * ranks, ranks)
            for start in range(0, -(-len(rows) // ranks), size)
        ]
        batches = [micro_batch(*tensors, each, size) for each in own]
        for each, scores in zip(own, self.score(batches), strict=True):
            for row, of_row in zip(rows[each], scores.double().cpu()):
                yield from _of_windows(windows, row, of_row)


def _windows(number: int, request: Request, seq_len: int) -> Iterator[_Window]:
    """The windows that cover a continuation: all of it, or as many targets as fit into a sequence at a time."""
    tokens, first = request.context + request.continuation, len(request.context)
    for start in range(first, len(tokens), seq_len):
        end = min(start + seq_len, len(tokens))
        yield _Window(number, tokens[max(0, end - seq_len - 1) : end], end - start)


def _packed(windows: list[_Window], seq_len: int) -> list[list[int]]:
    """Rows of windows, by index: each window into the row that it fills best, the longest first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are left, row), ascending
    for index in sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens)):
        length = len(windows[index].tokens) - 1
        place = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def _tensors(windows: list[_Window], rows: list[list[int]], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document ids of the rows, [N, T] int64 each; what is left of a row is one more document."""
    tokens = torch.zeros(len(rows), seq_len, dtype=torch.int64)
    targets, ids = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for row, indices in enumerate(rows):
        start = 0
        for number, index in enumerate(indices):
            each = torch.tensor(windows[index].tokens)
            end = start + len(each) - 1
            tokens[row, start:end], ids[row, start:] = each[:-1], number
            targets[row, end - windows[index].scored : end] = each[len(each) - windows[index].scored :]
            start = end
        ids[row, start:] = len(indices)
    return tokens, targets, ids


def _of_windows(windows: list[_Window], row: list[int], scores: Tensor) -> Iterator[tuple[int, Score]]:
    """Index and score of each window of a row, whose targets have `scores` [T, 2]."""
    end = 0
    for index in row:
        end += len(windows[index].tokens) - 1
        log_probabilities, likeliest = scores[end - windows[index].scored : end].unbind(dim=-1)
        yield index, Score(float(log_probabilities.sum()), bool(likeliest.all()))
