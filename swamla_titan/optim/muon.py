"""Muon (Jordan et al., 2024; for large models Moonlight, arXiv:2502.16982), each matrix orthogonalized on one rank.

Momentum and weights stay sharded; ranks exchange the update, in bfloat16, in which it is orthogonalized. Matrices are
sorted by work and assigned to owners in rounds of one matrix per rank, so that the owners of a round have about the
same work. In a round the ranks that hold a matrix's shards send them to its owner (one all-to-all); owners
orthogonalize, and send every rank its shard back (another). The next round's shards are sent meanwhile. In a step a
rank so receives each element of its own matrices and of its own shards once, where an all-gather would bring all
matrices to all ranks, which would all orthogonalize all of them.

Muon equalizes the singular values of an update, so it matters what counts as one matrix. Here it is one linear map of
the paper's equations, as if each had a weight of its own: queries, keys and values (split by Jordan's Muon and by
Megatron too), gate and up projections, MLA's latent and rotary key, and its up projections to keys and to values. MLA's
queries are one matrix, because their parts with and without position add up to one score, and so are output
projections, as in Moonlight.
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

from swamla_titan.config.sections import MuonAdjustment
from swamla_titan.distributed.dtensor import is_replicated, local, num_shards, slices_at
from swamla_titan.model.layers import linear_weights

# Coefficients of the quintic iteration, and the epsilon of its initial norm: Jordan's, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7

Slices = tuple[slice, ...]  # of a full matrix
Coordinate = tuple[int, ...]  # of a rank on a mesh


def separate_rows(model: nn.Module) -> dict[Tensor, list[Tensor]]:
    """For each fused weight, the row indices (int64) of each of its matrices; weights of one matrix are left out."""
    return {
        weight: [rows.flatten() for rows in spec.split(torch.arange(weight.shape[0]).unsqueeze(1))]
        for weight, spec in linear_weights(model)
        if spec.is_fused
    }


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Approximate U V^T of a bfloat16 matrix U S V^T by Newton-Schulz iterations; singular values end in 0.5 to 1.5."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)  # so that no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x


def orthogonalize_fused(matrix: Tensor, rows: Sequence[Tensor], steps: int) -> Tensor:
    """`orthogonalize` each of the matrices that have these rows of a fused weight; without rows, the whole weight."""
    if not rows:
        return orthogonalize(matrix, steps)
    out = torch.empty_like(matrix)
    for own in rows:
        out[own] = orthogonalize(matrix[own], steps)
    return out


def step_sizes(shape: torch.Size, rows: Sequence[Tensor], adjust_lr_fn: MuonAdjustment) -> Tensor:
    """The factor of the learning rate for each row, float32 [rows, 1], by the shape of the matrix that has the row.

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
    """A weight and what ranks exchange for it: nothing if this process holds it in full."""

    weight: nn.Parameter
    is_sent: bool = False  # from this rank, to the owner
    rows: Sequence[Tensor] = ()  # only on the owner: the rows of each matrix of a fused weight
    shards: Sequence[Slices] = ()  # only on the owner: the slices that each rank holds
    receives: Sequence[int] = ()  # only on the owner: elements from each rank; 0 for a further copy


class Orthogonalizer:
    """Orthogonalizes all matrices of a model, each on its owner, and exchanges shards with the other ranks."""

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        rows: Mapping[Tensor, list[Tensor]],
        steps: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """`rows`: from `separate_rows`; `group`: the ranks that hold shards of the weights, None: a single process."""
        self._steps = steps
        self._group = group if group is not None and group.size() > 1 else None
        self._size, self._rank = (self._group.size(), self._group.rank()) if self._group else (1, 0)
        self._device = local(weights[0]).detach().device
        by_work = sorted(weights, key=lambda weight: _work(weight, rows.get(weight, [])), reverse=True)
        coordinates: dict[DeviceMesh, list[Coordinate]] = {}
        self._rounds = [
            [self._matrix(weight, rows.get(weight, []), owner, coordinates) for owner, weight in enumerate(each)]
            for each in (by_work[begin : begin + self._size] for begin in range(0, len(by_work), self._size))
        ]

    def __call__(
        self, update_of: Callable[[nn.Parameter], Tensor], apply: Callable[[nn.Parameter, Tensor], None]
    ) -> None:
        """Call `apply(weight, direction)` for each weight, with the local shard of the orthogonalized update.

        `update_of(weight)` gives the local shard of the update, bfloat16 as the direction is. A collective: all ranks
        of the group call it.
        """
        # The receives of a round wait as late as they can: those of its matrices until the round begins, those of its
        # directions until the next round has been orthogonalized.
        finish: Callable[[], None] | None = None  # of the round before
        gathered = self._gather(self._rounds[0], update_of)
        for number, each in enumerate(self._rounds):
            full = gathered()
            if number + 1 < len(self._rounds):
                gathered = self._gather(self._rounds[number + 1], update_of)
            if full is not None:
                full = orthogonalize_fused(full, each[self._rank].rows, self._steps)
            if finish:
                finish()
            finish = self._scatter(each, full, apply)
        if finish:
            finish()

    def _gather(
        self, matrices: list[_Matrix], update_of: Callable[[nn.Parameter], Tensor]
    ) -> Callable[[], Tensor | None]:
        """Begin to send shards to their owners; the result waits, and returns the full matrix that this rank owns."""
        updates = [update_of(matrix.weight) for matrix in matrices]
        if self._group is None:
            return lambda: updates[0]
        mine = self._owned(matrices)
        sent = [
            update.flatten() if matrix.is_sent else update.new_empty(0) for matrix, update in zip(matrices, updates)
        ]
        received = self._all_to_all(sent, mine.receives if mine else [])

        def assembled() -> Tensor | None:
            pieces = received()
            if mine is None:
                return None
            full = pieces[0].new_empty(mine.weight.shape)
            for rank, elements in enumerate(mine.receives):
                if elements:
                    shard = full[mine.shards[rank]]
                    shard.copy_(pieces[rank].view_as(shard))
            return full

        return assembled

    def _scatter(
        self, matrices: list[_Matrix], full: Tensor | None, apply: Callable[[nn.Parameter, Tensor], None]
    ) -> Callable[[], None]:
        """Begin to send every rank its shard of this rank's matrix; the result waits for shards and applies them."""
        if self._group is None:
            assert full is not None
            apply(matrices[0].weight, full)
            return lambda: None
        mine = self._owned(matrices)
        sent = [full[shard].flatten() for shard in mine.shards] if mine and full is not None else []
        received = self._all_to_all(sent, [local(matrix.weight).numel() for matrix in matrices])

        def applied() -> None:
            for matrix, piece in zip(matrices, received()):
                apply(matrix.weight, piece.view_as(local(matrix.weight)))

        return applied

    def _owned(self, matrices: list[_Matrix]) -> _Matrix | None:
        return matrices[self._rank] if self._rank < len(matrices) else None

    def _all_to_all(self, sent: list[Tensor], sizes: Sequence[int]) -> Callable[[], Sequence[Tensor]]:
        """Begin to send `sent[i]`, bfloat16, to rank i of the group, and to receive `sizes[i]` elements from it.

        Ranks from the lists' ends on get and give nothing. The result waits, and returns what was received, by rank.
        """
        splits = [[len(each) for each in sent], list(sizes)]
        sent_sizes, received_sizes = ([*each, *[0] * (self._size - len(each))] for each in splits)
        outgoing = torch.cat(sent) if sent else torch.empty(0, dtype=torch.bfloat16, device=self._device)
        incoming = torch.empty(sum(received_sizes), dtype=torch.bfloat16, device=self._device)
        work = dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=self._group, async_op=True)

        def received() -> Sequence[Tensor]:
            work.wait()
            return incoming.split(received_sizes)

        return received

    def _matrix(
        self, weight: nn.Parameter, rows: list[Tensor], owner: int, coordinates: dict[DeviceMesh, list[Coordinate]]
    ) -> _Matrix:
        """The exchange of one weight; `coordinates` caches those of the group's ranks on each mesh."""
        if self._group is None:
            assert num_shards(weight) == 1, "other ranks hold shards of this weight: name their group"
            return _Matrix(weight, rows=[each.to(self._device) for each in rows])
        assert isinstance(weight, DTensor)
        mesh = weight.device_mesh
        if mesh not in coordinates:
            coordinates[mesh] = _coordinates(mesh, self._group)
        of_rank = coordinates[mesh]
        # Of several copies of a shard, that in the owner's part of the mesh is sent.
        replicated = [i for i, placement in enumerate(weight.placements) if is_replicated(placement)]
        senders = [all(coordinate[i] == of_rank[owner][i] for i in replicated) for coordinate in of_rank]
        if owner != self._rank:
            return _Matrix(weight, senders[self._rank])
        shards = [slices_at(weight, coordinate) for coordinate in of_rank]
        receives = [_elements(shard) if is_sent else 0 for shard, is_sent in zip(shards, senders)]
        return _Matrix(weight, True, [each.to(self._device) for each in rows], shards, receives)


def _coordinates(mesh: DeviceMesh, group: dist.ProcessGroup) -> list[Coordinate]:
    """The coordinate of each rank of the group; computed once per mesh, because on a large one it takes long."""
    ranks = mesh.mesh.flatten().tolist()
    assert len(ranks) == group.size(), "shards are held by other ranks than those of the group"
    found = {
        dist.get_group_rank(group, rank): coordinate
        for rank, coordinate in zip(ranks, itertools.product(*map(range, mesh.shape)))
    }
    return [found[rank] for rank in range(len(ranks))]


def _elements(shard: Slices) -> int:
    return math.prod(axis.stop - axis.start for axis in shard)


def _work(weight: nn.Parameter, rows: list[Tensor]) -> int:
    """Multiplications of one iteration, for all matrices of a weight."""
    heights = [len(each) for each in rows] or [weight.shape[0]]
    sides = [sorted((height, weight.shape[1])) for height in heights]
    return sum(2 * short * short * long + short**3 for short, long in sides)
