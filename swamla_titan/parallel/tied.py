"""Tied embedding and head on different stages of a pipeline: two copies of one weight that move as one."""

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.parallel.model_stage import ModelStage


class TiedEmbedding:
    """`embedding.weight` of the first stage and `head.weight` of the last.

    The whole model's gradient is the sum of the two. With that sum on both, starting alike, an optimizer whose update
    of an element depends on that parameter's own history alone keeps them alike to the last bit.
    """

    def __init__(self, world: World, stages: list[ModelStage], first_holder: int, last_holder: int) -> None:
        """`stages` are this rank's; the holders are pipeline ranks. All processes must come here: it makes groups."""
        self._embedding = next((stage for stage in stages if stage.is_rank_0), None)
        self._head = next((stage for stage in stages if stage.is_last), None)
        self._group: dist.ProcessGroup | None = None
        if first_holder != last_holder:
            assert world.weights is not None
            columns = world.weights.mesh.flatten(1).T.tolist()  # each: the ranks that differ in their stages alone
            pairs = [[column[first_holder], column[last_holder]] for column in columns]
            self._group, _ = dist.new_subgroups_by_enumeration(pairs)
        self._compared = False

    @property
    def copy(self) -> Tensor | None:
        """The head's weight, where this rank holds it: what a sum over all parameters must leave out."""
        return None if self._head is None else self._head.head.weight

    @torch.no_grad()
    def reduce(self) -> None:
        """Put the sum of both gradients on both; after the backward passes, once a step. Waits for the other rank."""
        ours = [weight.grad for weight in self._weights()]
        if not ours:
            return
        assert all(grad is not None for grad in ours), "both copies take part in every step"
        held = [local(grad) for grad in ours if grad is not None]
        if len(held) == 2:
            held[0] += held[1]
            held[1].copy_(held[0])
            return
        if not self._compared:
            self._require_alike(held[0])
        dist.all_reduce(held[0], group=self._group)

    def _weights(self) -> list[Tensor]:
        found = [] if self._embedding is None else [self._embedding.embedding.weight]
        return found if self._head is None else [*found, self._head.head.weight]

    def _require_alike(self, held: Tensor) -> None:
        # Sums of differently cut weights would be silently wrong, so the two ranks compare what they hold, once.
        mine = (tuple(held.shape), str(held.dtype), [getattr(w, "placements", None) for w in self._weights()])
        both: list[object] = [None, None]
        dist.all_gather_object(both, mine, group=self._group)
        assert both[0] == both[1], f"embedding and head are cut differently: {both[0]}, {both[1]}"
        self._compared = True
