"""How a sequence is shared, in numbers: balance, what is refused, halos, and traffic that does not grow with it."""

import itertools
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from swamla_titan.kernels.attention.dispatch import FLEX, REFERENCE
from swamla_titan.kernels.attention.masks import MaskSpec, block_mask_of, dense_mask_of, document_starts
from swamla_titan.parallel.context import gathered_intervals, window_intervals
from swamla_titan.parallel.sequence_exchange import SharedStream, StreamSlice
from swamla_titan.parallel.sequence_layout import (
    HaloExchange,
    SequenceLayout,
    Traffic,
    plan_halos,
    plan_window_exchange,
    stretches,
    window_exchange_bytes,
)


def test_a_length_that_no_rule_let_pass_is_no_layout():
    SequenceLayout(48, 4, 0)
    SequenceLayout(47, 1, 0)
    with pytest.raises(AssertionError, match="50 tokens cannot be cut in 8 equal chunks"):
        SequenceLayout(50, 4, 0)


def test_the_layout_needs_no_torch():
    code = "import sys, swamla_titan.parallel.sequence_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_has_one_rank_and_all_see_as_many_pairs(size):
    seq_len = 12 * size
    layouts = [SequenceLayout(seq_len, size, rank) for rank in range(size)]
    held = [start + i for layout in layouts for start in layout.starts for i in range(layout.chunk)]
    assert sorted(held) == list(range(seq_len))
    starts = torch.zeros(1, seq_len, dtype=torch.int64)
    pairs = [dense_mask_of(gathered_intervals(starts, layout, MaskSpec()), seq_len).sum().item() for layout in layouts]
    assert len(set(pairs)) == 1
    assert sum(pairs) == seq_len * (seq_len + 1) // 2


@pytest.mark.parametrize("size", [2, 4])
def test_traffic_does_not_grow_with_the_row(size):
    def traffic(seq_len, rank):
        exchange = plan_window_exchange(SequenceLayout(seq_len, size, rank), 64, 4)
        return window_exchange_bytes(exchange, 2, 3, 16, 2)

    for rank in range(size):
        assert traffic(1024, rank) == traffic(65536, rank)
    token = 2 * 3 * 2 * 16 * 2
    # The first rank's first chunk has nothing before it; its second has 63 tokens from another rank.
    assert traffic(1024, 0) == Traffic(
        sent=(63 + 2 * (size - 1) * 4) * token, received=(63 + 2 * (size - 1) * 4) * token
    )
    # Each token that is sent is received.
    assert sum(traffic(1024, r).sent for r in range(size)) == sum(traffic(1024, r).received for r in range(size))


def random_starts(batch, seq_len, cut):
    return document_starts((torch.rand(batch, seq_len) < cut).cumsum(dim=1))


def check_tiles(intervals, keys):
    """The tiles and what is in them are those that torch finds by trying all pairs, and the booleans."""
    ours = block_mask_of(intervals, keys)
    batch, queries = intervals.first.shape
    torchs = create_block_mask(ours.mask_mod, batch, 1, queries, keys, device="cpu")
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, torchs.full_kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, torchs.full_q_num_blocks)
    assert ours.seq_lengths == torchs.seq_lengths == (queries, keys)
    b, q, k = torch.arange(batch), torch.arange(queries), torch.arange(keys)
    pairs = ours.mask_mod(b[:, None, None], torch.tensor(0), q[:, None], k)
    assert torch.equal(pairs[:, None], dense_mask_of(intervals, keys))


@pytest.mark.parametrize("cut", [0.0, 0.005])
@pytest.mark.parametrize("seq_len, window, sink", [(1024, 200, 4), (1024, 300, 0), (600, 90, 7), (600, 700, 4)])
@pytest.mark.parametrize("rank", [0, 1])
def test_tiles_of_a_part_of_the_row(seq_len, window, sink, cut, rank):
    layout = SequenceLayout(seq_len, 2, rank)
    exchange = plan_window_exchange(layout, window, sink)
    starts = random_starts(2, seq_len, cut)
    check_tiles(window_intervals(starts, exchange), 2 * exchange.section)
    check_tiles(gathered_intervals(starts, layout, MaskSpec()), seq_len)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [0.0, 0.005])
@pytest.mark.parametrize("rank", [0, 1])
def test_flex_over_a_part_of_the_row(rank, cut):
    torch._dynamo.reset()
    layout = SequenceLayout(2048, 2, rank)
    exchange = plan_window_exchange(layout, 256, 4)
    starts = random_starts(2, 2048, cut).cuda()
    for intervals, keys in (
        (window_intervals(starts, exchange), 2 * exchange.section),
        (gathered_intervals(starts, layout, MaskSpec()), layout.seq_len),
    ):
        shapes = [(2, 1024, 4, 64), (2, keys, 2, 64), (2, keys, 2, 64)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        ours = FLEX.call(*inputs, block_mask_of(intervals, keys), 0.125)
        exact = REFERENCE.call(*exact_inputs, dense_mask_of(intervals, keys), 0.125)
        upstream = torch.randn_like(ours)
        gradients = torch.autograd.grad(ours, inputs, upstream)
        exact_gradients = torch.autograd.grad(exact, exact_inputs, upstream.double())
        for a, b in zip((ours, *gradients), (exact, *exact_gradients)):
            assert (a.double() - b).norm() < 2e-2 * b.norm()


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
