"""All ranks come to the same end of waiting for a batch, also where the loader of one does not even start."""

import pytest

from swamla_titan.config.sections import Parallel
from swamla_titan.errors import RunFailed
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.launch.signals import StopRequest
from swamla_titan.train.policies.unreadable_data import next_batch
from tests.distributed.ranks import on_ranks


class _Loader:
    """Dies as its workers are started, while it is waited for, or when its batch is taken."""

    def __init__(self, dies: str | None) -> None:
        self._dies = dies

    def wait(self, seconds: float) -> bool:
        if self._dies == "waiting":
            raise RunFailed("A data loader process ended unexpectedly")
        return self._dies is not None

    def __next__(self):
        raise RunFailed("A data loader process ended unexpectedly")


def _message(dies: str) -> str:
    world = init_distributed(Parallel())
    loader = _Loader(dies if world.rank == 1 else None)  # the others would wait for ever
    stop = StopRequest()
    try:
        next_batch(world, loader, 1, stop, unreadable=None)  # type: ignore[arg-type]
    except RunFailed as error:
        return str(error)
    finally:
        stop.forget()
    return "went on"


@pytest.mark.parametrize("dies", ["waiting", "taking"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_loader_that_dies_on_one_rank_fails_all(size, dies):
    assert on_ranks(size, _message, dies) == ["A data loader process ended unexpectedly"] * size
