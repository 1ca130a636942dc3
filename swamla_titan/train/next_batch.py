"""The next step's batch: all ranks wait for it, fail, and skip unreadable parts of the data together."""

from functools import partial

from swamla_titan.data import BatchLoader, Exclusion, StepBatch
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.launch.signals import Stop, StopRequest
from swamla_titan.train.policies.unreadable_data import UnreadableData

POLL_SECONDS = 1.0  # between two checks for a signal, while a rank waits for its data

_READY, _EXCLUDED, _WAITING, _FAILED = range(4)  # the state of a rank; the maximum over all ranks decides


def next_batch(
    world: World, loader: BatchLoader, step: int, stop: StopRequest, unreadable: UnreadableData
) -> StepBatch | Stop:
    """This rank's slice of the batch of `step` (from 1); all ranks call this.

    Returns a Stop, on every rank, if a rank still waits for its data and a signal came to one of them. If one rank
    cannot read its data, all raise its UserError or RunFailed. Ranks that read the same streams must exclude the same:
    where one of them could not read what the others could, these go back to before the step and exclude it too. Adds
    what is excluded to `unreadable`.
    """
    batch: StepBatch | None = None
    error: UserError | RunFailed | None = None
    found: list[Exclusion] = []  # in this step, by this rank or by others that read the same streams
    while True:
        if batch is None and error is None:
            try:
                batch = next(loader) if loader.wait(POLL_SECONDS) else None
            except (UserError, RunFailed) as raised:
                error = raised
            else:
                found += batch.excluded if batch else []
        state = _FAILED if error else _WAITING if batch is None else _EXCLUDED if found else _READY
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
            missing = _missing(found, [theirs for data_rank, theirs in every.values() if data_rank == world.data_rank])
            if missing:
                found += missing
                loader.restart(found)
                batch = None
            if not world.all_reduce_max(bool(missing)):
                assert batch is not None
                unreadable.exclude(step, [each for _, theirs in every.values() for each in theirs])
                return batch


def _missing(own: list[Exclusion], of_all: list[list[Exclusion]]) -> list[Exclusion]:
    """What other ranks exclude and this one does not, each once."""
    known = {each.key for each in own}
    rest = {each.key: each for theirs in of_all for each in theirs if each.key not in known}
    return [rest[key] for key in sorted(rest)]


def _raise(error: UserError | RunFailed | None) -> None:
    if error is not None:
        raise error
