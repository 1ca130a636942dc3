"""Output head and loss together: the last activations -> logits or the loss."""

from typing import Any

import torch
from torch import Tensor, nn

from swamla_titan.kernels.cross_entropy import IGNORE, cross_entropy, linear_cross_entropy, summed
from swamla_titan.model.config import ModelConfig


class CrossEntropy(nn.Module):
    """kernels/cross_entropy.py as a module, which can be compiled by itself."""

    def forward(self, logits: Tensor, targets: Tensor, vocab_size: int, **options: Any) -> Tensor:
        """Logits [N, V] and targets [N] -> the sum of the losses, or sums by sequence, in float32."""
        return cross_entropy(logits, targets, vocab_size, **options)


class LossHead(nn.Module):
    """Logits by the output head, then the cross-entropy, with z_loss and label_smoothing in training mode only.

    The head is an argument and no submodule, because its weight is the model's `head.weight` or the embedding's.
    `sequence_losses` may be set to a list, which then gets the sum of the losses of each sequence, [B], of every call
    in training mode.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cross_entropy: nn.Module = CrossEntropy()
        self.sequence_losses: list[Tensor] | None = None

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """Activations [B, T, dim] and their targets [B, T] -> the sum of the losses / denominator, a float32 scalar."""
        return self.loss(head(x), targets, denominator)

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab_size]."""
        logits: Tensor = head(x)
        return logits[..., : self.config.vocab_size]

    def loss(self, logits: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """`forward` from the head's output [B, T, padded vocabulary]."""
        arguments, options = (logits.flatten(0, 1), targets.flatten(), self.config.vocab_size), self.options
        if not self._records:
            total: Tensor = self.cross_entropy(*arguments, **options)
            return total / denominator
        of_sequences: Tensor = self.cross_entropy(*arguments, **options, sequences=len(logits))
        self._record(of_sequences)
        return of_sequences.sum() / denominator

    @property
    def _records(self) -> bool:
        return self.training and self.sequence_losses is not None

    def _record(self, of_sequences: Tensor) -> None:
        assert self.sequence_losses is not None
        self.sequence_losses.append(of_sequences.detach())

    @property
    def options(self) -> dict[str, Any]:
        """The options of the cross-entropy in this mode."""
        if not self.training:
            return {"z_loss": 0.0, "label_smoothing": 0.0}
        return {"z_loss": self.config.z_loss, "label_smoothing": self.config.label_smoothing}


class FusedLossHead(LossHead):
    """Head and loss as one operator, which never holds the logits of all tokens."""

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """As in LossHead."""
        vocab_size, options = self.config.vocab_size, self.options
        terms: list[Tensor] | None = [] if self._records else None

        def of(x: Tensor, weight: Tensor) -> Tensor:
            tokens = x.flatten(0, 1), weight, targets.flatten()
            return linear_cross_entropy(*tokens, vocab_size, denominator, terms=terms, **options)

        loss: Tensor = head(x, of)
        if terms:
            factor = denominator.to(loss.device) if isinstance(denominator, Tensor) else denominator
            self._record(summed(terms[0], len(x)) * factor)
        return loss


def target_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each target its log-probability, and 1 if it is the likeliest token: [B, T, V], [B, T] -> [B, T, 2].

    Zeros where targets are ignored; in float32, or wider if the logits are. A sequence at a time, because the softmax
    takes as much memory as its logits.
    """
    found = torch.zeros(*targets.shape, 2, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for each, wanted, scores in zip(logits, targets, found):
        valid = wanted != IGNORE
        chosen, target = each[valid].to(found.dtype), wanted[valid]
        log_probabilities = chosen.gather(1, target[:, None])[:, 0] - chosen.logsumexp(dim=-1)
        scores[valid] = torch.stack([log_probabilities, (chosen.argmax(dim=-1) == target).to(found.dtype)], dim=-1)
    return found
