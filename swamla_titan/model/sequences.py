"""How a process takes part in each sequence: alone, with all of its tokens; parallel/context.py has the other way."""

from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import Request, choose
from swamla_titan.kernels.attention.masks import document_starts, mask_of_sequences
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.branch import Attention
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import AttentionContext, SequenceContext, TokenContext, rotation_at


class FullSequences:
    """This process computes every token of its sequences."""

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
        asked: str = "auto",
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
            request = attention_request(attention, config, seq_len, document_ids is not None, device, dtype)
            taken = choose(request, asked).implementation
            form = "none" if request.is_plainly_causal else taken.form
            mask = mask_of_sequences(form, starts, request.has_documents, request.mask)
            rotation = rotation_at(positions, attention.rotary(config), config, dtype)
            return AttentionContext(positions, rotation, mask, taken)

        return SequenceContext({kind: of_kind(kind) for kind in dict.fromkeys(config.block_kinds)})


def attention_request(
    attention: type[Attention],
    config: ModelConfig,
    seq_len: int,
    has_documents: bool,
    device: torch.device,
    dtype: torch.dtype,
    **plan: Any,
) -> Request:
    """What a kind of attention asks of its kernels over sequences of `seq_len` tokens; `plan`: the rest of Request."""
    heads = attention.heads(config)
    return Request(
        device=device,
        dtype=dtype,
        qk_width=heads.qk_width,
        v_width=heads.v_width,
        mask=attention.mask(config),
        seq_len=seq_len,
        has_documents=has_documents,
        rotary_width=attention.rotary(config).width,
        has_qk_norm=config.qk_norm,
        **plan,
    )
