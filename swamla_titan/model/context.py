"""What all blocks of a kind share in one forward pass beside the activations: positions, rotation and mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import Implementation
from swamla_titan.kernels.attention.masks import Mask
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.rope import Rotation, rotation


@dataclass(frozen=True)
class AttentionContext:
    """Passed to the blocks of one kind. `mask` has the form that `implementation` wants."""

    positions: Tensor  # [B or 1, T] int64, tokens since the start of the document
    rotation: Rotation
    mask: Mask
    implementation: Implementation

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(scale * query key^T + mask) value: [B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E]."""
        return self.implementation.call(query, key, value, self.mask, scale)


@dataclass(frozen=True)
class SequenceContext:
    """The context of every kind of block in a model; no dict, which would be flattened on the way through hooks."""

    by_kind: dict[str, AttentionContext]

    def __getitem__(self, kind: str) -> AttentionContext:
        return self.by_kind[kind]


def rotation_at(positions: Tensor, rotary: tuple[int, float], config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """The rotation of heads with `rotary` (width, theta) at `positions` [B or 1, T], in float32 or wider."""
    width, theta = rotary
    return rotation(positions, width, theta, config.rope_scaling, torch.promote_types(dtype, torch.float32))
