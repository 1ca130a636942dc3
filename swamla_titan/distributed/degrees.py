"""How many ranks share what: the degrees of the configuration, fitted to the number of processes."""

import math
from dataclasses import dataclass
from typing import Protocol

from swamla_titan.errors import UserError


class Parallel(Protocol):
    """What the configuration's section [parallel] says of degrees; -1: as many as there are processes for."""

    @property
    def data_parallel(self) -> str: ...
    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...


@dataclass(frozen=True)
class Degrees:
    """Each at least 1; their product is the number of processes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data * self.context * self.tensor

    def __str__(self) -> str:
        names = ("pipeline", "dp_replicate", "dp_shard", "context", "tensor")
        values = (self.pipeline, self.replicate, self.shard, self.context, self.tensor)
        named = [f"{name} {value}" for name, value in zip(names, values) if value > 1]
        return " x ".join(named) or "one process"


def fit_degrees(parallel: Parallel, world_size: int) -> Degrees:
    """The degrees of a configuration on `world_size` processes, with -1 resolved.

    Raises UserError with the numbers and a suggestion if their product cannot be `world_size`. What does not depend
    on the number of processes is refused earlier, by config/rules.py.
    """
    fixed = parallel.pipeline * parallel.context * parallel.tensor
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if parallel.data_parallel == "ddp":
        replicate, shard = -1 if replicate == 1 else replicate, 1
    known = fixed * math.prod(degree for degree in (replicate, shard) if degree != -1)
    rest, left_over = divmod(world_size, known)
    if left_over or rest == 0 or (-1 not in (replicate, shard) and rest != 1):
        shown = {
            "pipeline": parallel.pipeline,
            "dp_replicate": replicate,
            "dp_shard": shard,
            "context": parallel.context,
            "tensor": parallel.tensor,
        }
        product = " x ".join(f"{name} {value}" for name, value in shown.items() if value not in (1, -1)) or "dp_shard 1"
        raise UserError(
            f"[parallel] the degrees {product} = {known} do not fit {world_size} processes: "
            + _suggestion(parallel, known, fixed, world_size)
        )
    return Degrees(
        pipeline=parallel.pipeline,
        replicate=rest if replicate == -1 else replicate,
        shard=rest if shard == -1 else shard,
        context=parallel.context,
        tensor=parallel.tensor,
    )


def _suggestion(parallel: Parallel, known: int, fixed: int, world_size: int) -> str:
    if world_size % fixed:
        nearest = max(known, world_size // known * known)
        return f"start {nearest}, or lower pipeline, context or tensor so that they divide {world_size}"
    share = world_size // fixed
    if parallel.data_parallel == "hsdp" and share < (4 if parallel.context == 1 else 2):
        # config/parallel_rules.py would refuse any two numbers: that is one copy, or a copy a rank.
        return f'start {known}, or set data_parallel = "fsdp", dp_replicate = 1 and dp_shard = -1 (the rest)'
    return f"start {known}, or let dp_shard x dp_replicate be {share} (-1: the rest)"
