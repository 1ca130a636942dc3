"""What all blocks of a kind share in one forward pass beside the activations: positions, rotation and mask."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import Implementation
from swamla_titan.kernels.attention.masks import Mask, Selection
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.rope import Rotary, Rotation, rotation


@dataclass(frozen=True)
class TokenContext:
    """Passed to the blocks of one kind."""

    positions: Tensor  # [B or 1, T] int64, tokens since the start of the document


@dataclass(frozen=True)
class AttentionContext(TokenContext):
    """Passed to blocks with attention. `mask` has the form that `implementation` wants."""

    rotation: Rotation
    mask: Mask
    implementation: Implementation

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, selection: Selection | None = None
    ) -> Tensor:
        """softmax(scale * query key^T + mask) value: [B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E].

        Under a SelectionRule the mask is a `selection` by that.
        """
        mask = self.mask if selection is None else selection
        return self.implementation.call(query, key, value, mask, scale)


@dataclass(frozen=True)
class SequenceContext:
    """The context of every kind of block in a model; no dict, which would be flattened on the way through hooks."""

    by_kind: Mapping[str, TokenContext]

    def __getitem__(self, kind: str) -> TokenContext:
        return self.by_kind[kind]


def rotation_at(positions: Tensor, rotary: Rotary, config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """The `rotary` rotation of heads at `positions` [B or 1, T], in float32 or wider."""
    return rotation(positions, *rotary, config.rope_scaling, torch.promote_types(dtype, torch.float32))
