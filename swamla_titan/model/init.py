"""Initial values of the parameters: a function of (seed, parameter name) alone.

Each parameter has a generator of its own, so its values depend neither on the order of modules, nor on the device, nor
on which other layers exist: a pipeline stage draws what the whole model would have drawn.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swamla_titan.model.linear import Role, spec_of

STD = 0.02
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # activation checkpointing and torch.compile rename modules


def plain_name(name: str, tied: bool) -> str:
    """The name that a parameter has in a model to which nothing was applied; a tied head goes by the embedding's."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return "embedding.weight" if tied and name == "head.weight" else name


class Normal(NamedTuple):
    """The distribution that an initial value is drawn from; with `std` 0 every element is the mean."""

    mean: float
    std: float


def distributions(model: nn.Module, num_layers: int) -> Iterator[tuple[str, nn.Parameter, Normal]]:
    """Each parameter of a model or a part of it, by its name, with the distribution of its initial value.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 num_layers)), so that the stream's
    variance does not grow with the `num_layers` of the full model; those of a module with a table `initial`, as norms
    have, the number that stands there. Raises TypeError for the parameter of a module that declares nothing.
    """
    seen = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                name = f"{module_name}.{key}" if module_name else key
                yield name, parameter, _distribution(module_name, module, key, num_layers)


def _distribution(name: str, module: nn.Module, key: str, num_layers: int) -> Normal:
    if key in (initial := getattr(module, "initial", {})):
        return Normal(initial[key], 0.0)
    if isinstance(module, nn.Embedding):
        return Normal(0.0, STD)
    if isinstance(module, nn.Linear):
        writes_residual = spec_of(name, module).role is Role.RESIDUAL_OUTPUT
        return Normal(0.0, STD / math.sqrt(2 * num_layers) if writes_residual else STD)
    raise TypeError(f"{name}.{key}: nothing says what a {type(module).__name__} starts with; see model/init.py")


def initial_value(name: str, shape: Sequence[int], distribution: Normal, seed: int, tied: bool) -> Tensor:
    """The initial value of parameter `name`, float32 on the CPU.

    `tied`: the head shares the embedding's weight, also where a pipeline's last stage holds the head alone.
    """
    if not distribution.std:
        return torch.full(shape, distribution.mean)
    digest = hashlib.sha256(f"{seed}/{plain_name(name, tied)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(*distribution, generator=generator)
