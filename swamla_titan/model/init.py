"""Initial values of the parameters: a function of (seed, parameter name) alone.

Each parameter has a generator of its own, so its values depend neither on the order of modules, nor on the device, nor
on which other layers exist: a pipeline stage draws what the full model would draw. A RowTable has a generator for each
block of rows, because a rank draws only the blocks that it holds.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local, local_slices
from swamla_titan.model.layers import Role, spec_of
from swamla_titan.model.row_table import RowTable, row_tables

STD = 0.02
ROWS_OF_A_BLOCK = 1 << 14  # of a RowTable, which one generator draws
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # activation checkpointing and torch.compile rename modules


def plain_name(name: str, tied: bool) -> str:
    """A parameter's name before activation checkpointing and torch.compile; a tied head has the embedding's."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return "embedding.weight" if tied and name == "head.weight" else name


class Normal(NamedTuple):
    """The distribution of an initial value; with `std` 0 every element is the mean."""

    mean: float
    std: float


def initial_draws(
    model: nn.Module, num_layers: int, tied: bool, seed: int, write: Callable[[Tensor, Tensor], object]
) -> Iterator[Callable[[], object]]:
    """Calls that give each parameter its initial value, in any order; see `SWAMLAModel.init_weights`."""
    tables = row_tables(model)
    for name, parameter in model.named_parameters():
        distribution = _distribution(model, name, num_layers)
        if parameter in tables:
            own = local_slices(parameter)[0]
            for block in range(own.start // ROWS_OF_A_BLOCK, -(-own.stop // ROWS_OF_A_BLOCK)):
                yield partial(_draw_block, name, parameter, distribution, seed, block)
        else:
            yield partial(_draw, name, parameter, distribution, seed, tied, write)


def _distribution(model: nn.Module, name: str, num_layers: int) -> Normal:
    """The distribution of the initial value of a parameter.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 num_layers)), so that the stream's
    variance does not grow with the `num_layers` of the full model; those of a module with a table `initial`, as norms
    have, the number that stands there. Raises TypeError for the parameter of a module that declares nothing.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if key in (initial := getattr(module, "initial", {})):
        return Normal(initial[key], 0.0)
    if isinstance(module, nn.Embedding | RowTable):
        return Normal(0.0, STD)
    if isinstance(module, nn.Linear):
        writes_residual = spec_of(owner, module).role is Role.RESIDUAL_OUTPUT
        return Normal(0.0, STD / math.sqrt(2 * num_layers) if writes_residual else STD)
    raise TypeError(f"{name}: nothing says what a {type(module).__name__} starts with; see model/init.py")


def initial_value(name: str, shape: Sequence[int], distribution: Normal, seed: int, tied: bool) -> Tensor:
    """The initial value of parameter `name`, float32 on the CPU.

    `tied`: the head shares the embedding's weight, also where a pipeline's last stage holds the head alone.
    """
    return _drawn(f"{seed}/{plain_name(name, tied)}", shape, distribution)


def _drawn(key: str, shape: Sequence[int], distribution: Normal) -> Tensor:
    if not distribution.std:
        return torch.full(shape, distribution.mean)
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(*distribution, generator=generator)


def _draw(
    name: str,
    parameter: Tensor,
    distribution: Normal,
    seed: int,
    tied: bool,
    write: Callable[[Tensor, Tensor], object],
) -> None:
    write(parameter, initial_value(name, parameter.shape, distribution, seed, tied))


def _draw_block(name: str, weight: Tensor, distribution: Normal, seed: int, block: int) -> None:
    """Draw a block of a RowTable's rows, and write those that this rank holds."""
    first, own = block * ROWS_OF_A_BLOCK, local_slices(weight)[0]
    rows = min(ROWS_OF_A_BLOCK, weight.shape[0] - first)
    value = _drawn(f"{seed}/{plain_name(name, False)}/{block}", (rows, weight.shape[1]), distribution)
    begin, end = max(first, own.start), min(first + rows, own.stop)
    local(weight)[begin - own.start : end - own.start].copy_(value[begin - first : end - first])
