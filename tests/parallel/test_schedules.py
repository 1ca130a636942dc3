"""Pipeline schedules in time: against the formulas of their papers, and by hand."""

import pytest

from swamla_titan.config import Override, load_config, with_vocabulary
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.parallel.model_stage import build_stages
from swamla_titan.parallel.pipeline import Pipeline
from swamla_titan.parallel.schedules import bubble_share, most_in_flight, order_of


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
        schedule = Pipeline(config, world, build_stages(config, world)).schedule(count, 1)
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
