"""Where a model is cut into pipeline stages: consecutive layers, so that the slowest stage is as fast as it can be.

A pipeline runs at the pace of its slowest stage, so what is minimised is the largest cost; among the cuts that reach
that minimum, the one whose costs are the most alike. Both are found exactly, by dynamic programming over
(stages, layers). Costs are floating-point operations as model/counts.py counts them, and the loss beside the head.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from swamla_titan.model.config import ModelConfig
from swamla_titan.model.counts import annex_flops, block_flops

# The loss is bound by memory, not by arithmetic: forward and backward move each logit three times, two bytes each, and
# in the time of a byte a GPU multiplies some 250 numbers (H100: 0.8e15 operations a second, 3.3e12 bytes).
_LOSS_OPERATIONS_PER_LOGIT = 3 * 2 * 250


@dataclass(frozen=True)
class StageCost:
    """One stage: the numbers of its layers, its operations to train on a sequence, and its share of the total."""

    layers: range
    operations: int
    share: float


def piece_costs(config: ModelConfig, seq_len: int) -> list[int]:
    """Operations to train on a sequence of `seq_len` tokens: [embedding, each layer ..., final norm, head and loss].

    The embedding is a look-up and counts nothing. Without the loss, the sum is `training_flops` of model/counts.py.
    """
    layer = {kind: block_flops(config, kind, seq_len) for kind in set(config.block_kinds)}
    logits = seq_len * config.padded_vocab_size
    head = logits * (6 * config.dim + _LOSS_OPERATIONS_PER_LOGIT)
    layers = [layer[kind] + annex_flops(config, number, seq_len) for number, kind in enumerate(config.block_kinds)]
    return [0, *layers, head]


def balanced(costs: Sequence[int], stages: int) -> list[range]:
    """The layers of each stage, given `piece_costs`; every stage gets at least one.

    A stage without a layer would still cost a transfer of the activations for every micro-batch, there and back;
    config/parallel_rules.py refuses more stages than layers.
    """
    layers = len(costs) - 2
    assert stages <= layers, f"{layers} layers cannot fill {stages} pipeline stages with one each"
    before = [0]  # before[i]: cost of the layers before layer i
    for operations in costs[1:-1]:
        before.append(before[-1] + operations)

    def cost(first: int, end: int) -> int:
        """Of a stage with the layers first .. end-1."""
        ends = (costs[0] if first == 0 else 0) + (costs[-1] if end == layers else 0)
        return before[end] - before[first] + ends

    # largest[end]: the smallest possible largest cost of the first s stages over the layers before `end`
    largest = [cost(0, end) for end in range(layers + 1)]
    for s in range(2, stages + 1):
        for end in range(layers, s - 1, -1):  # downwards: largest[cut] is still that of s - 1 stages
            largest[end] = min(max(largest[cut], cost(cut, end)) for cut in range(s - 1, end))
    bound = largest[layers]

    # squares[end]: the least sum of squared costs with no cost above the bound, and the cuts that give it
    squares: dict[int, tuple[int, tuple[int, ...]]] = {
        end: (cost(0, end) ** 2, (0,)) for end in range(1, layers + 1) if cost(0, end) <= bound
    }
    for s in range(2, stages + 1):
        squares = {
            end: min(
                (squares[cut][0] + cost(cut, end) ** 2, (*squares[cut][1], cut))
                for cut in squares
                if s - 1 <= cut < end and cost(cut, end) <= bound
            )
            for end in range(s, layers + 1)
            if any(s - 1 <= cut < end and cost(cut, end) <= bound for cut in squares)
        }
    cuts = (*squares[layers][1], layers)
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def stage_costs(config: ModelConfig, seq_len: int, stages: int) -> list[StageCost]:
    """The balanced cut of a model for sequences of `seq_len` tokens."""
    costs = piece_costs(config, seq_len)
    total = sum(costs)
    found = []
    for number, layers in enumerate(balanced(costs, stages)):
        operations = sum(costs[1 + layer] for layer in layers)
        operations += costs[0] if number == 0 else 0
        operations += costs[-1] if number == stages - 1 else 0
        found.append(StageCost(layers, operations, operations / total))
    return found


def stage_layers(config: ModelConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage in the balanced cut."""
    return [stage.layers for stage in stage_costs(config, seq_len, stages)]


def stage_table(config: ModelConfig, seq_len: int, stages: int) -> list[str]:
    """Lines that show the cut: each stage's layers and its share of the operations, then the slowest over the mean."""
    costs = stage_costs(config, seq_len, stages)
    lines = []
    for number, stage in enumerate(costs):
        ends = (["embedding"] if number == 0 else []) + [f"layers {stage.layers[0]}-{stage.layers[-1]}"]
        ends += ["head, loss"] if number == stages - 1 else []
        lines.append(f"stage {number}: {', '.join(ends)}: {stage.share:.1%}")
    slowest = max(stage.share for stage in costs) * stages
    lines.append(f"slowest stage: {slowest:.2f} of the mean")
    return lines
