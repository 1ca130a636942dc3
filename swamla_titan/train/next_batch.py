"""The next step's batch on every rank: waited for together, failing together, with the same parts passed over."""

from functools import partial

from swamla_titan.data import BatchLoader, Skip, StepBatch
from swamla_titan.distributed.agreement import all_gather_dict, all_ranks_or_raise
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.launch.signals import Stop, StopRequest
from swamla_titan.train.policies.skipped_files import SkippedFiles

LOOK = 1.0  # seconds between two looks at whether a signal came, while a rank waits for its data

_READY, _SKIPPED, _WAITING, _FAILED = range(4)  # what a rank has; the largest decides


def next_batch(
    world: World, loader: BatchLoader, step: int, first: int, stop: StopRequest, skipped: SkippedFiles
) -> StepBatch | Stop:
    """This rank's part of the batch of step `step` (from 1), from sequence `first` on; all ranks come here.

    A Stop, on every rank, if a rank still waits for its data and a signal came to one of them: the loaders then know
    the cursors of before the step. If the data of one cannot be read, all raise its UserError or RunFailed. Ranks that
    read the same streams pass over the same: where one of them could not read what the others could, they go back to
    before the step and do without it as well. Adds to `skipped`.
    """
    batch: StepBatch | None = None
    error: UserError | RunFailed | None = None
    found: list[Skip] = []  # in this step, by this rank or those that read the same
    while True:
        if batch is None and error is None:
            try:
                batch = next(loader) if loader.wait(LOOK) else None
            except (UserError, RunFailed) as raised:
                error = raised
            else:
                found += batch.skips if batch else ()
        state = _FAILED if error else _WAITING if batch is None else _SKIPPED if found else _READY
        worst = world.all_reduce_max(state)
        if worst == _READY:
            assert batch is not None
            return batch
        if worst == _WAITING:
            if asked := stop.agreed(world.all_reduce_max):
                return asked
        elif worst == _FAILED:
            all_ranks_or_raise(world, partial(_raise, error))
        else:
            every = all_gather_dict(world, {world.rank: (world.data_rank, found)})
            lacking = _lacking(found, [skips for data_rank, skips in every.values() if data_rank == world.data_rank])
            if lacking:
                found += lacking
                loader.restart(first, found)
                batch = None
            if not world.all_reduce_max(bool(lacking)):
                assert batch is not None
                skipped.add(step, [skip for _, skips in every.values() for skip in skips])
                return batch


def _lacking(own: list[Skip], of_all: list[list[Skip]]) -> list[Skip]:
    """What others pass over and this rank does not, each once."""
    known = {skip.key for skip in own}
    rest = {skip.key: skip for skips in of_all for skip in skips if skip.key not in known}
    return [rest[key] for key in sorted(rest)]


def _raise(error: UserError | RunFailed | None) -> None:
    if error is not None:
        raise error
