"""Muon (Jordan et al., 2024; for large models Moonlight, arXiv:2502.16982), each matrix orthogonalized on one rank.

Momentum and weights stay where they are; what travels is the update, in the bfloat16 that its orthogonalization is
computed in. The matrices are dealt out to the ranks by size, so that every round gives each rank one, all of about the
same work. In a round the ranks that hold a copy of each matrix's parts send them to its owner (one all-to-all), owners
orthogonalize, and send every rank its part back (another). The next round's parts travel meanwhile. Over a whole step a
rank receives each number of its matrices and of its own shards once, where an all-gather brings all matrices to all
ranks, each of which then computes the same.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from swamla_titan.distributed.dtensor import is_replicated, local, num_shards, slices_at

# Of the quintic iteration, and of the norm it begins with: Jordan's, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7

Part = tuple[slice, ...]
Place = tuple[int, ...]


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """About U V^T of a bfloat16 matrix U S V^T, by Newton-Schulz iterations; singular values end near 1, 0.5 to 1.5."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)  # so that no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x


def orthogonalized_apart(matrix: Tensor, rows: Sequence[Tensor], steps: int) -> Tensor:
    """`orthogonalized`, of each of the matrices that lie in these rows of a fused one."""
    if not rows:
        return orthogonalized(matrix, steps)
    out = torch.empty_like(matrix)
    for own in rows:
        out[own] = orthogonalized(matrix[own], steps)
    return out


def step_sizes(shape: torch.Size, rows: Sequence[Tensor], adjust_lr_fn: str) -> Tensor:
    """What the learning rate is multiplied by in each row, float32 [rows, 1], by the shape of the matrix it is of.

    original: sqrt(max(1, rows / columns)). match_rms_adamw: 0.2 sqrt(max(rows, columns)), which makes the update's root
    mean square that of AdamW's, so that its learning rate and weight decay serve both.
    """
    sizes = torch.empty(shape[0], 1)
    for own in rows or [torch.arange(shape[0])]:
        height, width = len(own), shape[1]
        is_original = adjust_lr_fn == "original"
        sizes[own] = math.sqrt(max(1, height / width)) if is_original else 0.2 * math.sqrt(max(height, width))
    return sizes


@dataclass(frozen=True)
class _Matrix:
    """A weight, and what of it travels: nothing, if it is here whole. What only its owner asks for, only that has."""

    weight: nn.Parameter
    is_sent: bool = False  # from this rank, to the owner
    rows: Sequence[Tensor] = ()  # the owner's: of the weight's matrices
    parts: Sequence[Part] = ()  # the owner's: each rank's
    arriving: Sequence[int] = ()  # the owner's: elements from each rank; from some, which together hold the whole once


class Orthogonalizer:
    """The owners of all matrices, and what passes between them and the ranks that hold parts."""

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        rows: Mapping[Tensor, list[Tensor]],
        steps: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """`rows` as by `separate_rows`; `group`: the ranks that hold parts of the weights, None: this one alone."""
        self._steps = steps
        self._group = group if group is not None and group.size() > 1 else None
        self._size, self._rank = (self._group.size(), self._group.rank()) if self._group else (1, 0)
        self._device = local(weights[0]).detach().device
        by_work = sorted(weights, key=lambda weight: _work(weight, rows.get(weight, [])), reverse=True)
        places: dict[DeviceMesh, list[Place]] = {}
        self._rounds = [
            [self._matrix(weight, rows.get(weight, []), owner, places) for owner, weight in enumerate(each)]
            for each in (by_work[begin : begin + self._size] for begin in range(0, len(by_work), self._size))
        ]

    def __call__(
        self, update_of: Callable[[nn.Parameter], Tensor], apply: Callable[[nn.Parameter, Tensor], None]
    ) -> None:
        """For each weight `apply(weight, direction)`, of this rank's part of the orthogonalized update.

        `update_of(weight)`: this rank's part of it before, bfloat16 like the direction. All ranks of the group come.
        """
        finish: Callable[[], None] | None = None  # the round before
        coming = self._collected(self._rounds[0], update_of)
        for number, each in enumerate(self._rounds):
            whole = coming()
            if number + 1 < len(self._rounds):
                coming = self._collected(self._rounds[number + 1], update_of)
            if whole is not None:
                whole = orthogonalized_apart(whole, each[self._rank].rows, self._steps)
            if finish:
                finish()
            finish = self._handed_back(each, whole, apply)
        if finish:
            finish()

    def _collected(
        self, matrices: list[_Matrix], update_of: Callable[[nn.Parameter], Tensor]
    ) -> Callable[[], Tensor | None]:
        """Send parts to their owners; what is returned waits for them, and gives this rank's matrix if it has one."""
        updates = [update_of(matrix.weight) for matrix in matrices]
        if self._group is None:
            return lambda: updates[0]
        mine = self._own(matrices)
        sent = [
            update.flatten() if matrix.is_sent else update.new_empty(0) for matrix, update in zip(matrices, updates)
        ]
        arrived = self._exchanged(sent, mine.arriving if mine else [])

        def assembled() -> Tensor | None:
            pieces = arrived()
            if mine is None:
                return None
            whole = pieces[0].new_empty(mine.weight.shape)
            for rank, elements in enumerate(mine.arriving):
                if elements:
                    part = whole[mine.parts[rank]]
                    part.copy_(pieces[rank].view_as(part))
            return whole

        return assembled

    def _handed_back(
        self, matrices: list[_Matrix], whole: Tensor | None, apply: Callable[[nn.Parameter, Tensor], None]
    ) -> Callable[[], None]:
        """Send every rank its part of this rank's matrix; what is returned waits for those of all, and applies them."""
        if self._group is None:
            assert whole is not None
            apply(matrices[0].weight, whole)
            return lambda: None
        mine = self._own(matrices)
        sent = [whole[part].flatten() for part in mine.parts] if mine and whole is not None else []
        arrived = self._exchanged(sent, [local(matrix.weight).numel() for matrix in matrices])

        def applied() -> None:
            for matrix, piece in zip(matrices, arrived()):
                apply(matrix.weight, piece.view_as(local(matrix.weight)))

        return applied

    def _own(self, matrices: list[_Matrix]) -> _Matrix | None:
        return matrices[self._rank] if self._rank < len(matrices) else None

    def _exchanged(self, sent: list[Tensor], sizes: Sequence[int]) -> Callable[[], Sequence[Tensor]]:
        """Begin to send the first ranks of the group these, bfloat16, and to receive so many elements from its first.

        Waits when what is returned is called, which gives what came, by rank.
        """
        splits = [[len(each) for each in sent], list(sizes)]
        sent_sizes, received_sizes = ([*each, *[0] * (self._size - len(each))] for each in splits)
        outgoing = torch.cat(sent) if sent else torch.empty(0, dtype=torch.bfloat16, device=self._device)
        incoming = torch.empty(sum(received_sizes), dtype=torch.bfloat16, device=self._device)
        work = dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=self._group, async_op=True)

        def arrived() -> Sequence[Tensor]:
            work.wait()
            return incoming.split(received_sizes)

        return arrived

    def _matrix(
        self, weight: nn.Parameter, rows: list[Tensor], owner: int, places: dict[DeviceMesh, list[Place]]
    ) -> _Matrix:
        """`places`: of the group's ranks on the meshes seen so far."""
        if self._group is None:
            assert num_shards(weight) == 1, "other ranks hold parts of this weight: name their group"
            return _Matrix(weight, rows=[each.to(self._device) for each in rows])
        assert isinstance(weight, DTensor)
        mesh = weight.device_mesh
        if mesh not in places:
            places[mesh] = _places(mesh, self._group)
        of_rank = places[mesh]
        # Of copies, those that the owner's neighbours hold.
        copies = [i for i, placement in enumerate(weight.placements) if is_replicated(placement)]
        senders = [all(place[i] == of_rank[owner][i] for i in copies) for place in of_rank]
        if owner != self._rank:
            return _Matrix(weight, senders[self._rank])
        parts = [slices_at(weight, place) for place in of_rank]
        arriving = [_elements(part) if is_sent else 0 for part, is_sent in zip(parts, senders)]
        return _Matrix(weight, True, [each.to(self._device) for each in rows], parts, arriving)


def _places(mesh: DeviceMesh, group: dist.ProcessGroup) -> list[Place]:
    """Where on the mesh each rank of the group is. Asked once for all weights: on a large mesh it takes long."""
    ranks = mesh.mesh.flatten().tolist()
    assert len(ranks) == group.size(), "held by other ranks than those that share the work"
    found = {
        dist.get_group_rank(group, rank): place
        for rank, place in zip(ranks, itertools.product(*map(range, mesh.shape)))
    }
    return [found[rank] for rank in range(len(ranks))]


def _elements(part: Part) -> int:
    return math.prod(axis.stop - axis.start for axis in part)


def _work(weight: nn.Parameter, rows: list[Tensor]) -> int:
    """Multiplications of an iteration, for all matrices of a weight."""
    heights = [len(each) for each in rows] or [weight.shape[0]]
    sides = [sorted((height, weight.shape[1])) for height in heights]
    return sum(2 * short * short * long + short**3 for short, long in sides)
