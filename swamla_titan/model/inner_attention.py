"""Attention between the linear layers of a block: a submodule without parameters, which a plan or kernels replace."""

from torch import Tensor, nn

from swamla_titan.kernels.attention.dispatch import FusedImplementation
from swamla_titan.kernels.attention.masks import Selection, SelectionRule
from swamla_titan.model.context import AttentionContext


class InnerAttention(nn.Module):
    """softmax(scale * query key^T + mask) value, by the implementation that the context names.

    A subclass serves where this process has a slice of each sequence: it gets queries, keys and values of that slice.
    """

    def gather(self, latent: Tensor, rope_key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Latents [B, T, R] and rotated keys [B, T, 1, rope] of every token of the sequences, from those of the slice.

        They are gathered before they are expanded to keys and values. Here those given are all there are.
        """
        return latent, rope_key

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """[B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E]; `selection` by the queries that are given."""
        return context.attend(query, key, value, scale, selection)


class SelectingHead(nn.Module):
    """Which head selects in selective attention; a submodule that serves where this process has some of the heads."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head

    def forward(self, query: Tensor, key: Tensor, rule: SelectionRule) -> Selection:
        """[B, T, H, D] and [B, S, H, D] -> what is selected by the rule."""
        return Selection(rule, self.head)


class FusedAttention(nn.Module):
    """What lies between the linear layers, rotation included, as one operator."""

    def __init__(self, implementation: FusedImplementation) -> None:
        super().__init__()
        self.implementation = implementation

    def serves(self, context: AttentionContext) -> bool:
        """Whether this pass is computed here; else by the steps apart."""
        return context.implementation.name in self.implementation.over

    def forward(self, context: AttentionContext, scale: float, *projections: Tensor) -> Tensor:
        """What the linear layers give, as FusedImplementation.call has it -> [B, T, H, E]."""
        cos, sin = context.rotation
        return self.implementation.call(*projections, cos=cos, sin=sin, mask=context.mask, scale=scale)
