"""Which tokens of a sequence ranks hold, and how they get those before: all ranks' plans in one process."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from swamla_titan.parallel.stream import HaloExchange, SharedStream, StreamSlice, plan_halos, stretches


@dataclass(frozen=True)
class Exchanged(StreamSlice):
    """Takes what the collective would give from the other ranks' tokens and plans."""

    index: int
    ranks: list[tuple[Tensor, HaloExchange]]

    def _received(self, x: Tensor, exchange: HaloExchange) -> Tensor:
        found = [
            tokens[:, start : start + length] for tokens, plan in self.ranks for start, length in plan.sends[self.index]
        ]
        assert exchange.receives == tuple(sum(n for _, n in plan.sends[self.index]) for _, plan in self.ranks)
        return torch.cat([x[:, :0], *found], dim=1)


@pytest.mark.parametrize("context, tensor", [*itertools.product(range(1, 5), repeat=2)])
@pytest.mark.parametrize("tokens", [2, 6])
def test_each_stretch_is_given_the_tokens_before_it(context: int, tensor: int, tokens: int):
    """Each rank holds `tokens` tokens; halos are shorter than that, or reach over several ranks, or all."""
    number = context * tensor
    seq_len = tokens * number
    sequence = torch.arange(1.0, seq_len + 1)[None, :, None]
    for halo in (0, 1, 5, 12, seq_len + 3):
        plans = [plan_halos(seq_len, context, tensor, index, halo) for index in range(number)]
        streams = [SharedStream(context, tensor, index, "", frozenset({halo})) for index in range(number)]
        held = [stream.local(sequence) for stream in streams]
        assert torch.equal(torch.cat(held, dim=1).flatten().sort().values, sequence.flatten())
        assert {part.shape[1] for part in held} == {tokens}
        for index, (own, plan) in enumerate(zip(held, plans)):
            assert plan.sends[index] == ()
            context_of_rank = Exchanged(own, (plan,), "", index, list(zip(held, plans)))
            sections = [section.flatten().tolist() for section in context_of_rank.with_halos(own, halo)]
            parts = stretches(seq_len, context, tensor, index)
            assert len(parts) == len(sections) <= 2
            for part, section in zip(parts, sections):
                before = [max(0.0, float(t + 1)) for t in range(part.start - halo, part.start)]
                assert section == before + [float(t + 1) for t in part]
