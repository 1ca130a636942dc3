"""Rotary position embedding (Su et al., arXiv:2104.09864) in the half layout: element i is paired with i + D/2."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotary position embedding: the width of the part of a head that is rotated, and the base of the frequencies."""

    width: int
    theta: float


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, [B or 1, T, 1, D/2]: broadcast over heads."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, dim: int, theta: float, scaling: float, dtype: torch.dtype) -> Rotation:
    """The rotation of heads of width `dim` at `positions` [B or 1, T] (tokens since the document's start).

    Angle i is position / scaling * theta^(-2i/dim). Angles come from the positions, not from a table of a fixed length,
    and in float64: at position 100,000 a float32 angle is off by 0.004. `dtype` is that of the results.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = (positions.to(torch.float64) / scaling)[..., None, None] * theta**-exponents  # [B, T, 1, D/2]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate heads x [B, T, H, D]; computed in the rotation's dtype (float32), returned in x's."""
    first, second = x.to(by.cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin], dim=-1)
    return rotated.to(x.dtype)
