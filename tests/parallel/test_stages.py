"""The stages of a pipeline: their cut, and which rank holds them; its schedules, against their papers, and by hand."""

import itertools
import subprocess
import sys

import pytest

from swamla_titan.config import Override, load_config, with_vocabulary
from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.kernels.attention.masks import causal_pairs, window_pairs
from swamla_titan.model import FLAVORS
from swamla_titan.model.counts import training_flops
from swamla_titan.parallel.pipeline import Pipeline, build_stages
from swamla_titan.parallel.stages import (
    balanced,
    bubble_share,
    most_in_flight,
    order_of,
    piece_costs,
    rank_of_stage,
    runnable_micro_batches,
    stage_costs,
    stage_count,
    stage_table,
    stages_of_rank,
)

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")


@pytest.mark.parametrize("seq_len", [512, 8192])
@pytest.mark.parametrize("name", FLAVORS)
def test_pieces_are_the_flops_of_the_model_and_the_loss(name, seq_len):
    config = FLAVORS[name]
    pairs = {"swa": window_pairs(seq_len, config.swa_window, config.swa_sink_size), "mla": causal_pairs(seq_len)}
    loss = 1500 * seq_len * config.padded_vocab_size
    assert sum(piece_costs(config, seq_len)) == training_flops(config, seq_len, pairs) + loss


def test_layers_of_each_kind_cost_their_own():
    short, long = (piece_costs(FLAVORS["base"], seq_len) for seq_len in (512, 16384))
    swa, mla = 1, 3
    assert long[mla] / short[mla] > 32 > long[swa] / short[swa] * 0.95  # only MLA grows faster than the row
    assert long[mla] > 1.5 * long[swa]


def every_cut(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield [range(first, end) for first, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(
    "costs", [[0, 3, 1, 4, 1, 5, 9, 2, 6], [5, 1, 1, 1, 1, 1, 1, 1, 20], [0, 2, 2, 7, 2, 2, 7, 2, 3]]
)
def test_no_other_cut_is_better(costs, stages):
    def of(cut):
        sums = [sum(costs[1 + layer] for layer in layers) for layers in cut]
        sums[0] += costs[0]
        sums[-1] += costs[-1]
        return max(sums), sum(value * value for value in sums)

    found = balanced(costs, stages)
    assert [layer for layers in found for layer in layers] == list(range(7))
    assert all(len(layers) > 0 for layers in found)
    assert of(found) == min(of(cut) for cut in every_cut(7, stages))


# The slowest stage over the mean: what whole layers allow at this depth.
@pytest.mark.parametrize(
    "name, stages, bound", [("base", 2, 1.08), ("base", 4, 1.12), ("xl", 4, 1.1), ("xl", 8, 1.25), ("2b", 8, 1.25)]
)
@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_flavors_are_balanced(name, stages, bound, seq_len):
    costs = stage_costs(FLAVORS[name], seq_len, stages)
    assert sum(stage.share for stage in costs) == pytest.approx(1)
    assert max(stage.share for stage in costs) * stages < bound


@pytest.mark.parametrize("name", [name for name in FLAVORS if name != "debug"])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_largest_stage_is_within_a_layer_of_the_mean(name, stages):
    config = FLAVORS[name]
    costs = piece_costs(config, 2048)
    found = stage_costs(config, 2048, stages)
    mean = sum(costs) / stages
    assert max(stage.operations for stage in found) <= max(mean + max(costs[1:-1]), costs[-1] + costs[-2])
    by_count = -(-config.num_layers // stages)
    assert len(found[-1].layers) < by_count  # room is made for the head


def test_table_names_every_stage():
    lines = stage_table(FLAVORS["small"], 2048, 3)
    assert len(lines) == 4
    assert lines[0].startswith("stage 0: embedding, layers 0-")
    assert "-11, head, loss: " in lines[2]
    assert sum(float(line.split(": ")[-1].rstrip("%")) for line in lines[:3]) == pytest.approx(100, abs=0.2)


def test_more_stages_than_layers_are_no_cut():
    with pytest.raises(AssertionError, match="6 layers cannot fill 7 pipeline stages"):
        stage_costs(FLAVORS["debug"], 512, 7)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_has_one_holder(schedule, ranks):
    parallel = Parallel(pipeline=ranks, pipeline_schedule=schedule)
    held = [stages_of_rank(parallel, rank) for rank in range(ranks)]
    assert sorted(itertools.chain(*held)) == list(range(stage_count(parallel)))
    assert all(stage in held[rank_of_stage(parallel, stage)] for stage in range(stage_count(parallel)))
    if schedule == "ZBVZeroBubble":
        assert held[0] == [0, 2 * ranks - 1]
        assert held[-1] == [ranks - 1, ranks]


def test_counts_that_schedules_can_run():
    four = Parallel(pipeline=4)
    assert [runnable_micro_batches(four, count) for count in (1, 4, 6)] == [4, 4, 6]
    interleaved = Parallel(pipeline=4, pipeline_schedule="Interleaved1F1B")
    assert [runnable_micro_batches(interleaved, count) for count in (1, 7, 9, 10, 13)] == [1, 7, 10, 10, 15]
    assert runnable_micro_batches(Parallel(pipeline=4, pipeline_schedule="GPipe"), 3) == 3


def test_judging_a_configuration_does_not_load_distributed_code():
    code = "import sys, swamla_titan.parallel.stages; print('torch.distributed.pipelining' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["1F1B", "GPipe"])
@pytest.mark.parametrize("ranks, count", [(2, 2), (4, 16), (4, 4), (3, 7)])
def test_schedules_of_one_stage_wait_as_long_as_their_formula_says(name, ranks, count):
    order = order_of(name, ranks, count, schedule=None)
    assert bubble_share(order, [1.0] * ranks) == pytest.approx((ranks - 1) / (count + ranks - 1))
    for rank, actions in order.items():
        assert sorted(actions) == sorted(
            (rank, kind, batch) for kind in ("FORWARD", "FULL_BACKWARD") for batch in range(count)
        )


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_behind_and_gpipe_all():
    order = order_of("1F1B", 4, 16, schedule=None)
    assert [most_in_flight(order[rank], {rank: 1}) for rank in range(4)] == [4, 3, 2, 1]
    order = order_of("GPipe", 4, 16, schedule=None)
    assert [most_in_flight(order[rank], {rank: 3}) for rank in range(4)] == [48] * 4


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_torchs_schedules_of_several_stages_a_rank(tiny, name):
    ranks, per_rank, count = 4, 2, 16
    keys = {"pipeline": str(ranks), "pipeline_schedule": name}
    overrides = [Override("parallel", key, value) for key, value in keys.items()]
    config = with_vocabulary(load_config(tiny, [*overrides, Override("model", "num_layers", "8")]), 257)
    with fake_world(fit_degrees(config.parallel, ranks), "fsdp", 0) as world:
        schedule = Pipeline(config, world, build_stages(config, world)).schedule(count, 1, 64)
    order = order_of(name, ranks, count, schedule)
    share = bubble_share(order, [1.0] * ranks * per_rank)
    interleaved = (ranks - 1) / (per_rank * count + ranks - 1)
    if name == "Interleaved1F1B":
        assert share == pytest.approx(interleaved)
    else:  # the gradients of weights, a third of the work, fill what would be waiting
        assert 0 < share < interleaved / 2
    sizes = dict.fromkeys(range(ranks * per_rank), 1)
    assert all(ranks < most_in_flight(actions, sizes) < per_rank * count for actions in order.values())


def test_a_slow_stage_makes_the_others_wait():
    # One micro-batch: the ranks take turns, and each works for its own cost of the 8 in all.
    assert bubble_share(order_of("GPipe", 2, 1, schedule=None), [2.0, 6.0]) == pytest.approx(1 - 8 / (2 * 8))
    # Many: the slow one is always busy but for the first forward and the last backward pass of the other, 2 in all.
    count = 100
    share = bubble_share(order_of("1F1B", 2, count, schedule=None), [2.0, 6.0])
    assert share == pytest.approx(1 - 8 * count / (2 * (6 * count + 2)))


def test_halves_of_a_split_backward_pass_and_their_order():
    actions = [(0, "FORWARD", 0), (0, "BACKWARD_INPUT", 0), (0, "FORWARD", 1), (0, "BACKWARD_WEIGHT", 0)]
    actions += [(0, "BACKWARD_INPUT", 1), (0, "BACKWARD_WEIGHT", 1)]
    assert most_in_flight(actions, {0: 5}) == 10
    assert bubble_share({0: actions}, [1.0]) == pytest.approx(0)


def test_a_schedule_whose_ranks_wait_for_each_other_is_found():
    backward_first = {0: [(0, "FULL_BACKWARD", 0), (0, "FORWARD", 0)], 1: [(1, "FORWARD", 0), (1, "FULL_BACKWARD", 0)]}
    with pytest.raises(AssertionError, match="wait for each other"):
        bubble_share(backward_first, [1.0, 1.0])
