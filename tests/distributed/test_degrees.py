"""The degrees of a configuration on so many processes."""

import itertools
import math

import pytest

from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.degrees import DIMENSIONS, Degrees, fit_degrees
from swamla_titan.errors import UserError

HSDP = {"data_parallel": "hsdp"}
DDP = {"data_parallel": "ddp"}


@pytest.mark.parametrize(
    "size, given, expected",
    [
        (1, {}, Degrees()),
        (4, {}, Degrees(shard=4)),
        (4, {"dp_shard": 4}, Degrees(shard=4)),
        (1, {"dp_shard": 1}, Degrees()),
        (8, HSDP | {"dp_replicate": 2}, Degrees(replicate=2, shard=4)),
        (8, HSDP | {"dp_replicate": 2, "dp_shard": 4}, Degrees(replicate=2, shard=4)),
        (8, HSDP | {"dp_replicate": -1, "dp_shard": 2}, Degrees(replicate=4, shard=2)),
        (2, HSDP | {"dp_replicate": 2}, Degrees(replicate=2)),
        (3, DDP, Degrees(replicate=3)),
        (3, DDP | {"dp_replicate": -1}, Degrees(replicate=3)),
        (3, DDP | {"dp_replicate": 3, "dp_shard": 1}, Degrees(replicate=3)),
        (2, {"tensor": 2}, Degrees(tensor=2)),
        (3, {"context": 3, "dp_shard": 1}, Degrees(context=3)),
        (24, {"tensor": 2, "context": 2, "pipeline": 3}, Degrees(pipeline=3, shard=2, context=2, tensor=2)),
        (12, DDP | {"tensor": 2, "pipeline": 3}, Degrees(pipeline=3, replicate=2, tensor=2)),
    ],
)
def test_the_rest_is_found_and_the_product_is_the_number_of_processes(size, given, expected):
    found = fit_degrees(Parallel(**given), size)
    assert found == expected
    assert found.size == size
    assert found.data == expected.replicate * expected.shard


@pytest.mark.parametrize(
    "size, given, message",
    [
        (
            2,
            {"dp_shard": 4},
            "dp_shard 4 = 4 do not fit 2 processes: start 4, or let dp_shard x dp_replicate be 2 (-1: the rest)",
        ),
        (8, {"dp_shard": 4}, "dp_shard 4 = 4 do not fit 8 processes: start 4, or let dp_shard x dp_replicate be 8"),
        (
            6,
            HSDP | {"dp_replicate": 2, "dp_shard": 2},
            "dp_replicate 2 x dp_shard 2 = 4 do not fit 6 processes: start 4, or let dp_shard x dp_replicate be 6",
        ),
        (
            1,
            HSDP | {"dp_replicate": 4, "dp_shard": 8},
            'start 32, or set data_parallel = "fsdp", dp_replicate = 1 and dp_shard = -1 (the rest)',
        ),
        (2, HSDP | {"dp_replicate": 4, "dp_shard": 8}, 'start 32, or set data_parallel = "fsdp"'),
        (2, HSDP | {"dp_replicate": 4, "dp_shard": 8, "context": 2}, 'start 64, or set data_parallel = "fsdp"'),
        (4, HSDP | {"dp_replicate": 4, "dp_shard": 8, "context": 2}, "start 64, or let dp_shard x dp_replicate be 2"),
        (7, HSDP | {"dp_replicate": -1, "dp_shard": 2}, "dp_shard 2 = 2 do not fit 7 processes: start 2, or let"),
        (2, DDP | {"dp_replicate": 3}, "dp_replicate 3 = 3 do not fit 2 processes: start 3, or let"),
        (
            5,
            {"tensor": 2},
            "tensor 2 = 2 do not fit 5 processes: start 4, or lower pipeline, context or tensor so that they divide 5",
        ),
        (
            1,
            {"pipeline": 2, "context": 2, "tensor": 2},
            "pipeline 2 x context 2 x tensor 2 = 8 do not fit 1 processes: start 8, or lower pipeline",
        ),
        (
            4,
            {"tensor": 2, "dp_shard": 1},
            "tensor 2 = 2 do not fit 4 processes: start 2, or let dp_shard x dp_replicate be 2 (-1: the rest)",
        ),
        (3, {"context": 2}, "context 2 = 2 do not fit 3 processes: start 2, or lower pipeline, context or tensor"),
        (
            4,
            {"dp_shard": 1},
            "the degrees dp_shard 1 = 1 do not fit 4 processes: start 1, or let dp_shard x dp_replicate be 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(size, given, message):
    with pytest.raises(UserError) as caught:
        fit_degrees(Parallel(**given), size)
    assert message in str(caught.value)


def test_degrees_are_said_by_their_keys():
    assert str(Degrees()) == "one process"
    assert str(Degrees(pipeline=2, shard=3)) == "pipeline 2 x dp_shard 3"
    assert str(Degrees(replicate=2, context=4, tensor=8)) == "dp_replicate 2 x context 4 x tensor 8"


@pytest.mark.parametrize(
    "degrees, plan, weights, activations",
    [
        (Degrees(pipeline=3, shard=2, context=2, tensor=2), "fsdp", (3, 1, 4, 2), (3, 2, 2, 2)),
        (Degrees(replicate=2, shard=4, context=2), "hsdp", (1, 2, 8, 1), (1, 8, 2, 1)),
        (Degrees(replicate=4, context=2, tensor=2), "ddp", (1, 8, 1, 2), (1, 4, 2, 2)),
    ],
)
def test_both_meshes_lay_out_the_same_ranks(degrees, plan, weights, activations):
    found = degrees.weights_mesh(plan)
    assert list(found.items()) == list(zip(("pipeline", "replicate", "shard", "tensor"), weights))
    found = degrees.activations_mesh()
    assert list(found.items()) == list(zip(("pipeline", "data", "context", "tensor"), activations))
    assert math.prod(weights) == math.prod(activations) == degrees.size


def test_neighbours_in_the_table_alone_share_a_dimension_of_a_mesh():
    """Flattened into one, they are laid out in a row of ranks."""
    for mesh in ("weights", "activations"):
        names = [name for name, _ in itertools.groupby(getattr(each, mesh) for each in DIMENSIONS)]
        assert len(names) == len(set(names))
    assert DIMENSIONS[0].name == "pipeline", "a pipeline's groups are taken from the first dimension"
