"""What one rank finds out, all act on."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from swamla_titan.checkpoint.reader import load_tensors
from swamla_titan.cli import main
from swamla_titan.config.sections import Parallel
from swamla_titan.data import StepBatch
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.train.step import StepOutcome, TrainStep
from tests.distributed.ranks import on_ranks

ERRORS = {"user": UserError, "run": RunFailed}


def _work(rank: int, failing: dict[int, str]) -> int:
    if rank in failing:
        try:
            Path("/no/such/file").stat()
        except OSError as error:
            raise ERRORS[failing[rank]](f"rank {rank}") from error
    return rank * 10


def _ends(way, world: World, failing: dict[int, str]) -> object:
    try:
        return way(world, lambda: _work(world.rank, failing))
    except (UserError, RunFailed) as error:
        return type(error).__name__, str(error)


def _agree(cases: list[dict[int, str]]) -> list[object]:
    world = init_distributed(Parallel())
    return [_ends(all_ranks_or_raise, world, failing) for failing in cases]


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_rank_is_raised_on_all_and_the_first_of_several(size):
    last = size - 1
    cases = [{}, {0: "user"}, {last: "run"}, {last: "user", 0: "run"}, dict.fromkeys(range(size), "user"), {}]
    names = [("UserError", "rank 0"), ("RunFailed", f"rank {last}"), ("RunFailed", "rank 0"), ("UserError", "rank 0")]
    for rank, ends in enumerate(on_ranks(size, _agree, cases)):
        assert ends == [rank * 10, *names, rank * 10]  # and the group is as good as before


def _from_first(cases: list[dict[int, str]]) -> tuple[list[object], int]:
    world = init_distributed(Parallel())
    asked = []

    def count(way_world: World, work):
        return broadcast_from_rank_0(way_world, lambda: (asked.append(1), work())[1])

    return [_ends(count, world, failing) for failing in cases], len(asked)


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_rank_works_for_all(size):
    cases = [{}, {0: "user"}, {1: "user"}, {0: "run"}, {}]
    results = on_ranks(size, _from_first, cases)
    for ends, _ in results:
        assert ends == [0, ("UserError", "rank 0"), 0, ("RunFailed", "rank 0"), 0]
    assert [asked for _, asked in results] == [len(cases)] + [0] * (size - 1)


def _other_error() -> object:
    world = init_distributed(Parallel())
    try:
        return all_ranks_or_raise(world, lambda: 1 // (world.rank - 1))
    except ZeroDivisionError:
        return "a bug"


def test_a_bug_is_not_shared():
    """It ends its own process, with its own traceback, and the launcher ends the others."""
    with pytest.raises(AssertionError, match="rank 0:"):
        on_ranks(2, _other_error)


def _merged() -> list[dict[str, object]]:
    world = init_distributed(Parallel())
    return [
        all_gather_dict(world, {f"of {world.rank}": world.rank, "of all": (1, 2)}),
        all_gather_dict(world, {"of the first": 1} if world.is_rank_0 else {}),
        all_gather_dict(world, {}),
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_dictionaries_are_united(size):
    own = {f"of {rank}": rank for rank in range(size)}
    assert on_ranks(size, _merged) == [[own | {"of all": (1, 2)}, {"of the first": 1}, {}]] * size


def test_a_process_alone_asks_nobody():
    world = World.alone()
    for way in (all_ranks_or_raise, broadcast_from_rank_0):
        assert way(world, lambda: 5) == 5
        with pytest.raises(UserError, match="rank 0") as caught:
            way(world, lambda: _work(0, {0: "user"}))
        assert isinstance(caught.value.__cause__, OSError)  # its cause is kept: it need not travel
    own = {"a": 1}
    assert all_gather_dict(world, own) == own


def _crash(config: str, error: type[Exception], rank: int) -> tuple[str, bool]:
    """How training ends on this rank if the second step raises `error` on `rank` (-1: all), and is the group there."""
    take = TrainStep.__call__

    def step(self: TrainStep, batch: StepBatch, number: int) -> StepOutcome:
        if number == 2 and rank in (self.world.rank, -1):
            raise error("no memory is left")
        return take(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", step)
        try:
            ended = str(main(["train", config, "--data.num_workers", "0"]))
        except Exception as raised:
            ended = type(raised).__name__
    return ended, dist.is_initialized()


def test_a_rank_that_dies_alone_does_not_wait_to_say_good_bye(tiny):
    """NCCL's destroy_process_group would wait for the others, who are in a collective that this one does not join."""
    one, other = on_ranks(2, _crash, str(tiny), MemoryError, 1)
    assert other == ("1", True)  # said as what the machine lacks
    assert one == ("RuntimeError", True)  # its connection was closed
    assert on_ranks(2, _crash, str(tiny), RunFailed, -1) == [("1", False)] * 2


def _load_more_on_the_last(folder: str) -> str:
    world = init_distributed(Parallel())
    names = ["weight", "missing"] if world.rank == world.size - 1 else ["weight"]
    try:
        load_tensors(Path(folder), {"model": {name: torch.zeros(3) for name in names}}, world)
    except UserError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_that_one_rank_cannot_use_is_refused_on_all(tmp_path):
    """A pipeline rank looks for the tensors of its own layers."""
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=tmp_path, no_dist=True)
    one, other = on_ranks(2, _load_more_on_the_last, str(tmp_path))
    assert one == other == f"{tmp_path} holds another model:\n  model.missing is missing"
