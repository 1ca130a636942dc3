"""What one rank finds and all must act on: errors, and results of work that rank 0 alone does."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RunFailed, UserError

Result = TypeVar("Result")
Key = TypeVar("Key")
Value = TypeVar("Value")


def all_ranks_or_raise(world: World, work: Callable[[], Result]) -> Result:
    """`work()` on every rank. If it raises a UserError or RunFailed on one, all ranks raise that error.

    A rank that continued alone would wait for ever in its next collective. `work` itself must not communicate.
    """
    if world.size == 1:
        return work()
    result, error = _attempt(work)
    if world.all_reduce_max(float(error is not None)) == 0:
        return result  # type: ignore[return-value]
    errors: list[UserError | RunFailed | None] = [None] * world.size
    dist.all_gather_object(errors, error, group=world.host_group)
    raise next(each for each in errors if each is not None)


def broadcast_from_rank_0(world: World, work: Callable[[], Result]) -> Result:
    """The result of `work()`, run by rank 0 alone, on every rank; its UserError or RunFailed likewise."""
    if world.size == 1:
        return work()
    outcome = [_attempt(work) if world.is_rank_0 else (None, None)]
    dist.broadcast_object_list(outcome, src=0, group=world.host_group)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def all_gather_dict(world: World, own: dict[Key, Value]) -> dict[Key, Value]:
    """The union of all ranks' dictionaries, on every rank; ranks that have a key in common have it with one value."""
    if world.size == 1:
        return own
    every: list[dict[Key, Value]] = [{}] * world.size
    dist.all_gather_object(every, own, group=world.host_group)
    return {key: value for each in every for key, value in each.items()}


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, UserError | RunFailed | None]:
    try:
        return work(), None
    except (UserError, RunFailed) as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they cannot be pickled
        return None, error
