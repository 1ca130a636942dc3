"""The parallel dimensions in one ordered table, and how many ranks a run has along each.

The table is the fields of `Degrees`. Meshes, groups, sums of losses and gradients, error messages and `plan` derive
from it; docs/extending.md says what else a new dimension needs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from swamla_titan.errors import UserError


class Parallel(Protocol):
    """The section [parallel] of the configuration; it has an attribute for the key of every dimension."""

    @property
    def data_parallel(self) -> str: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """One way to divide the work among ranks.

    `key`: in [parallel]. `weights` and `activations`: the dimension of the mesh of this name (distributed/mesh.py) that
    it is part of; neighbours in the table may share one, and are flattened into it. `sums`: what has to be summed over
    the ranks along it, "loss" if they compute different tokens, "gradients" if the gradient that each computes of a
    replicated parameter is a summand. `ranks`: what they do, for `plan`.
    """

    name: str
    key: str
    weights: str
    activations: str
    sums: tuple[str, ...]
    ranks: str


def _dimension(key: str, weights: str, activations: str, sums: tuple[str, ...], ranks: str) -> Any:
    traits = {"key": key, "weights": weights, "activations": activations, "sums": sums, "ranks": ranks}
    return field(default=1, metadata=traits)


_BOTH = ("loss", "gradients")


@dataclass(frozen=True)
class Degrees:
    """Ranks along each dimension, at least 1, which multiply to the number of processes.

    The order is that of the ranks: those that differ in the last dimension alone are neighbours.
    """

    # Each tensor-parallel rank has the loss of all tokens. Context-parallel ranks compute gradients of the same weights
    # from different tokens, as data-parallel ones do, so FSDP2 shards the weights over them too.
    pipeline: int = _dimension("pipeline", "pipeline", "pipeline", (), "hold different layers")
    replicate: int = _dimension("dp_replicate", "replicate", "data", _BOTH, "hold copies of the weights")
    shard: int = _dimension("dp_shard", "shard", "data", _BOTH, "hold shards of one copy of the weights")
    context: int = _dimension("context", "shard", "context", _BOTH, "share each sequence")
    tensor: int = _dimension("tensor", "tensor", "tensor", ("gradients",), "share each linear layer")

    @property
    def size(self) -> int:
        """Processes in all."""
        return self._product(lambda _: True)

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self._product(lambda each: each.activations == "data")

    @property
    def weight_shards(self) -> int:
        """Ranks that share one copy of the weights under FSDP2 and HSDP."""
        return self._product(lambda each: each.weights == "shard")

    def weights_mesh(self, data_parallel: str) -> dict[str, int]:
        """The dimensions of World.weights and their sizes, in order. With "ddp" what would be shards are copies."""
        copies = {"shard": "replicate"} if data_parallel == "ddp" else {}
        return self._mesh(lambda each: each.weights, copies)

    def activations_mesh(self) -> dict[str, int]:
        """The dimensions of World.activations and their sizes, in order."""
        return self._mesh(lambda each: each.activations, {})

    def _mesh(self, part_of: Callable[[Dimension], str], instead: dict[str, str]) -> dict[str, int]:
        sizes = dict.fromkeys(map(part_of, DIMENSIONS), 1)
        for each in DIMENSIONS:
            name = part_of(each)
            sizes[instead.get(name, name)] *= getattr(self, each.name)
        return sizes

    def _product(self, chosen: Callable[[Dimension], bool]) -> int:
        return math.prod(getattr(self, each.name) for each in DIMENSIONS if chosen(each))

    def __str__(self) -> str:
        return _named({each.key: getattr(self, each.name) for each in DIMENSIONS}) or "one process"


DIMENSIONS = tuple(Dimension(each.name, **each.metadata) for each in fields(Degrees))


LOSS_DIMENSIONS = tuple(dict.fromkeys(each.activations for each in DIMENSIONS if "loss" in each.sums))
"""The dimensions of World.activations along which losses are summed."""

GRADIENT_DIMENSIONS = tuple(dict.fromkeys(each.weights for each in DIMENSIONS if "gradients" in each.sums))
"""The dimensions of World.weights along which gradients of parameters that all ranks hold are summed."""


def fit_degrees(parallel: Parallel, world_size: int) -> Degrees:
    """The degrees of a configuration on `world_size` processes, with -1 (as many as there are left) resolved.

    Raises UserError with the numbers and a suggestion if they cannot multiply to `world_size`. What does not depend
    on the number of processes is refused earlier, by config/rules.py.
    """
    asked = {each: getattr(parallel, each.key) for each in DIMENSIONS}
    replicate, shard = (next(each for each in DIMENSIONS if each.name == name) for name in ("replicate", "shard"))
    if parallel.data_parallel == "ddp":
        asked[replicate], asked[shard] = -1 if asked[replicate] == 1 else asked[replicate], 1
    fixed = math.prod(degree for each, degree in asked.items() if each not in (replicate, shard))
    known = math.prod(degree for degree in asked.values() if degree != -1)
    rest, left_over = divmod(world_size, known)
    if left_over or rest == 0 or (-1 not in asked.values() and rest != 1):
        degrees = _named({each.key: degree for each, degree in asked.items()}) or f"{shard.key} 1"
        raise UserError(
            f"[parallel] the degrees {degrees} = {known} do not fit {world_size} processes: "
            + _suggestion(parallel, known, fixed, world_size)
        )
    return Degrees(**{each.name: rest if degree == -1 else degree for each, degree in asked.items()})


def _named(degrees: dict[str, int]) -> str:
    return " x ".join(f"{key} {degree}" for key, degree in degrees.items() if degree not in (1, -1))


def _suggestion(parallel: Parallel, known: int, fixed: int, world_size: int) -> str:
    if world_size % fixed:
        nearest = max(known, world_size // known * known)
        *others, last = (each.key for each in DIMENSIONS if each.activations != "data")
        return f"start {nearest}, or lower {', '.join(others)} or {last} so that they divide {world_size}"
    left = world_size // fixed
    if parallel.data_parallel == "hsdp" and left < (4 if parallel.context == 1 else 2):
        # config/parallel_rules.py would refuse any two numbers: that is one copy, or a copy a rank.
        return f'start {known}, or set data_parallel = "fsdp", dp_replicate = 1 and dp_shard = -1 (the rest)'
    return f"start {known}, or let dp_shard x dp_replicate be {left} (-1: the rest)"
