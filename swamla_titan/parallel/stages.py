"""The stages of a pipeline without processes: where the model is cut, which rank holds which, how long ranks wait.

A pipeline runs at the pace of its slowest stage, so the cut minimizes the largest cost; among the cuts that reach that
minimum, it is the one whose costs are the most alike. Both are found exactly, by dynamic programming over (stages,
layers). Costs are floating-point operations as model/counts.py counts them, and the loss beside the head.

A simulation of the schedule gives how long ranks wait and how much each has in flight. An action begins when its rank
is free and its inputs are there; transfers take no time and nothing is recomputed, so the share of waiting is a lower
bound. With equal stages it is (P - 1) / (m + P - 1) for 1F1B (P ranks, m micro-batches; Narayanan et al.,
arXiv:2104.04473, section 2.2).
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swamla_titan.config.parallel_rules import STAGES_PER_RANK
from swamla_titan.config.sections import Parallel
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
    before = [*itertools.accumulate(costs[1:-1], initial=0)]  # before[i]: cost of the layers before layer i

    def cost(first: int, end: int) -> int:
        """Of a stage with the layers first .. end-1."""
        ends = (costs[0] if first == 0 else 0) + (costs[-1] if end == layers else 0)
        return before[end] - before[first] + ends

    def least(score: Callable[[int], float], join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
        """The least that the scores of all stages can be joined to, and where each of the stages then begins."""
        # found[end]: of the first s stages over the layers before `end`
        found: dict[int, tuple[float, tuple[int, ...]]]
        found = {end: (score(cost(0, end)), (0,)) for end in range(1, layers + 1)}
        for s in range(2, stages + 1):
            cuts = {
                end: min((join(found[cut][0], score(cost(cut, end))), found[cut][1], cut) for cut in range(s - 1, end))
                for end in range(s, layers + 1)
            }
            found = {end: (value, (*begins, cut)) for end, (value, begins, cut) in cuts.items()}
        return found[layers]

    largest, _ = least(lambda operations: operations, max)
    _, begins = least(lambda operations: operations**2 if operations <= largest else math.inf, operator.add)
    return [range(first, end) for first, end in itertools.pairwise((*begins, layers))]


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


def stages_per_rank(parallel: Parallel) -> int:
    """Stages that each pipeline rank holds."""
    return parallel.pipeline_stages_per_rank or STAGES_PER_RANK[parallel.pipeline_schedule]


def stage_count(parallel: Parallel) -> int:
    """Stages in all."""
    return parallel.pipeline * stages_per_rank(parallel)


def stages_of_rank(parallel: Parallel, rank: int) -> list[int]:
    """The stages of a pipeline rank, ascending.

    Assigned round-robin, and on ZBVZeroBubble there and back: rank 0 then holds the first and the last stage, and the
    last rank two consecutive ones.
    """
    stages = range(stage_count(parallel))
    if parallel.pipeline_schedule == "ZBVZeroBubble":
        return [rank, stages[-1 - rank]]
    return list(stages[rank :: parallel.pipeline])


def rank_of_stage(parallel: Parallel, stage: int) -> int:
    """The pipeline rank that holds a stage."""
    return next(rank for rank in range(parallel.pipeline) if stage in stages_of_rank(parallel, rank))


def runnable_micro_batches(parallel: Parallel, micro_batches: int) -> int:
    """The smallest number of micro-batches, at least `micro_batches`, that the schedule can run.

    1F1B needs one for each stage; the interleaved schedules run in equal rounds of about as many as there are ranks.
    """
    if parallel.pipeline_schedule == "1F1B":
        return max(micro_batches, stage_count(parallel))
    count = micro_batches
    if parallel.pipeline_schedule.startswith("Interleaved"):
        while count % max(1, count // parallel.pipeline):
            count += 1
    return count


# Torch's names of actions, each with its share of a stage's operations: a backward pass computes two matmuls for each
# matmul of the forward pass, for the gradients of inputs and for those of weights.
_SHARE = {"FORWARD": 1 / 3, "FULL_BACKWARD": 2 / 3, "BACKWARD_INPUT": 1 / 3, "BACKWARD_WEIGHT": 1 / 3}

Order = Mapping[int, Sequence[tuple[int, str, int]]]
"""Rank -> its actions, in order: (stage, kind of action, micro-batch)."""


def order_of(name: str, ranks: int, micro_batches: int, schedule: Any) -> Order:
    """The actions of a pipeline's ranks. `name` as in parallel.pipeline_schedule, `schedule` torch's object of it.

    Schedules of several stages a rank have a list of actions, which is returned; those of one stage have loops, which
    are repeated here. (Torch's own `pipeline_order` of 1F1B, which is for pictures alone, numbers the last stage's
    micro-batches from 1.)
    """
    if STAGES_PER_RANK[name] == 1:
        # Forward passes that a rank computes before its first backward pass.
        ahead = [micro_batches if name == "GPipe" else min(ranks - rank, micro_batches) for rank in range(ranks)]
        return {rank: _one_stage(rank, ahead[rank], micro_batches) for rank in range(ranks)}
    return {
        rank: [
            (action.stage_index, action.computation_type.name, action.microbatch_index)
            for action in actions
            if action is not None and action.computation_type.name in _SHARE
        ]
        for rank, actions in schedule.pipeline_order.items()
    }


def _one_stage(stage: int, ahead: int, micro_batches: int) -> list[tuple[int, str, int]]:
    actions = [(stage, "FORWARD", batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        actions.append((stage, "FULL_BACKWARD", batch))
        if batch + ahead < micro_batches:
            actions.append((stage, "FORWARD", batch + ahead))
    return actions


def bubble_share(order: Order, costs: Sequence[float]) -> float:
    """The share of all ranks' time that they wait; `costs[stage]` in any unit, forward and backward."""
    forward: dict[tuple[int, int], float] = {}  # when it ended, by (stage, micro-batch)
    to_inputs: dict[tuple[int, int], float] = {}  # likewise, the gradients that the stage before waits for

    def ready(stage: int, kind: str, batch: int) -> float | None:
        """When the inputs of an action are there; None: not yet known."""
        if kind == "FORWARD":
            return 0.0 if stage == 0 else forward.get((stage - 1, batch))
        if kind == "BACKWARD_WEIGHT":
            return to_inputs.get((stage, batch))
        return forward.get((stage, batch)) if stage == len(costs) - 1 else to_inputs.get((stage + 1, batch))

    clock, position, busy = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0), 0.0
    # Each rank advances as far as the times of its inputs are known; others then learn more of theirs.
    while any(position[rank] < len(order[rank]) for rank in order):
        before = dict(position)
        for rank, actions in order.items():
            while position[rank] < len(actions):
                stage, kind, batch = actions[position[rank]]
                start = ready(stage, kind, batch)
                if start is None:
                    break
                clock[rank] = max(clock[rank], start) + _SHARE[kind] * costs[stage]
                busy += _SHARE[kind] * costs[stage]
                position[rank] += 1
                if kind == "FORWARD":
                    forward[stage, batch] = clock[rank]
                elif kind != "BACKWARD_WEIGHT":
                    to_inputs[stage, batch] = clock[rank]
        assert position != before, "the ranks of a schedule wait for each other"
    return 1 - busy / (max(clock.values()) * len(order))


def most_in_flight(actions: Sequence[tuple[int, str, int]], sizes: Mapping[int, int]) -> int:
    """The most that a rank keeps at a time for backward passes: `sizes[stage]` for each micro-batch in it.

    `actions` are the rank's. Between the two halves of a split backward pass all is counted as kept.
    """
    kept = most = 0
    for stage, kind, _ in actions:
        if kind == "FORWARD":
            kept += sizes[stage]
            most = max(most, kept)
        elif kind != "BACKWARD_INPUT":
            kept -= sizes[stage]
    assert kept == 0, "every forward pass has a backward pass"
    return most
