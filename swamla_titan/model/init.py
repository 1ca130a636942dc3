"""First values of the parameters: a function of (seed, parameter name) alone.

Each parameter has a generator of its own, so its values depend neither on the order of modules, nor on the device, nor
on which other layers exist: a pipeline stage draws what the whole model would have drawn.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

STD = 0.02
_RESIDUAL_OUTPUTS = ("attention.wo.weight", "feed_forward.down.weight")
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # activation checkpointing and torch.compile rename modules


def plain_name(name: str, tied: bool) -> str:
    """The name that a parameter has in a model to which nothing was applied; a tied head goes by the embedding's."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return "embedding.weight" if tied and name == "head.weight" else name


def initial_value(name: str, shape: Sequence[int], num_layers: int, seed: int, tied: bool) -> Tensor:
    """The first value of parameter `name`, float32 on the CPU.

    `tied`: the head shares the embedding's weight, also where a pipeline's last stage holds the head alone.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 num_layers)), so that the stream's
    variance does not grow with depth; norm weights 1, their biases 0, DynamicTanh's alpha 0.5.
    """
    name = plain_name(name, tied)
    if name.endswith("alpha"):
        return torch.full(shape, 0.5)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = STD / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else STD
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
