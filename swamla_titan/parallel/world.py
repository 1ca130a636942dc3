"""Which process this is among those that train together, and on which device."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from swamla_titan.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, `device` it computes on."""

    rank: int
    size: int
    device: torch.device


def join_world() -> World:
    """Read the place that the launcher gave this process; alone without a launcher.

    Raises UserError for more than one process: parallel plans are not built yet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != 1:
        raise UserError(
            f"started as one of {size} processes, but this version trains on one: start it without torchrun"
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(rank=0, size=1, device=device)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of a tensor over all ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
