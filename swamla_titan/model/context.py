"""Which tokens of each sequence a process computes, and their context: all; parallel/context.py has slices."""

from collections.abc import Callable

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import Choice, Request, choose
from swamla_titan.kernels.attention.masks import document_starts, mask_of_sequences
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.branch import AttentionContext, SequenceContext, TokenContext
from swamla_titan.model.config import ModelConfig


class FullSequences:
    """This process computes every token of its sequences."""

    def __init__(self, choose: Callable[[Request, AttentionBackend], Choice] = choose) -> None:
        """`choose`: chooses the implementation of attention."""
        self.choose = choose

    def local(self, tokens: Tensor) -> Tensor:
        """The tokens of this process, [B, t], of something [B, T] for each token of full sequences."""
        return tokens

    def context(
        self,
        config: ModelConfig,
        seq_len: int,
        document_ids: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        asked: AttentionBackend = "auto",
    ) -> SequenceContext:
        """The context of sequences of `seq_len` tokens; `document_ids` [B, T] cut them into documents, None: one each.

        `dtype` is that of the activations, `asked` one of ATTENTION_BACKENDS (else ValueError).
        """
        if document_ids is None:
            starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
        else:
            starts = document_starts(document_ids)
        positions = torch.arange(seq_len, device=device) - starts
        attentions = attention_kinds(config)

        def of_kind(kind: str) -> TokenContext:
            attention = attentions.get(kind)
            if attention is None:
                return TokenContext(positions)
            request = attention.request(config, seq_len, document_ids is not None, device, dtype)
            choice = self.choose(request, asked)
            mask = mask_of_sequences(choice.form, starts, request.has_documents, request.mask)
            rotation = attention.rotation(config, positions, dtype)
            return AttentionContext(positions, rotation, mask, choice.implementation)

        return SequenceContext({kind: of_kind(kind) for kind in dict.fromkeys(config.block_kinds)})
