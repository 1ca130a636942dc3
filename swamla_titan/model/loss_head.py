"""Output head and loss together: the last activations -> logits or the loss."""

import torch
from torch import Tensor, nn

from swamla_titan.kernels.cross_entropy import IGNORE, cross_entropy, linear_cross_entropy
from swamla_titan.model.config import ModelConfig


class CrossEntropy(nn.Module):
    """kernels/cross_entropy.py as a module, which can be compiled by itself."""

    def forward(
        self, logits: Tensor, targets: Tensor, vocab_size: int, *, z_loss: float, label_smoothing: float
    ) -> Tensor:
        """Logits [N, V] and targets [N] -> the sum of the losses, a float32 scalar."""
        return cross_entropy(logits, targets, vocab_size, z_loss=z_loss, label_smoothing=label_smoothing)


class LossHead(nn.Module):
    """Logits by the output head, then the cross-entropy, with z_loss and label_smoothing in training mode only.

    The head is an argument and no submodule, because its weight is the model's `head.weight` or the embedding's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cross_entropy: nn.Module = CrossEntropy()

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """Activations [B, T, dim] and their targets [B, T] -> the sum of the losses / denominator, a float32 scalar."""
        return self.loss(head(x), targets, denominator)

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab_size]."""
        logits: Tensor = head(x)
        return logits[..., : self.config.vocab_size]

    def loss(self, logits: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """`forward` from the head's output [B, T, padded vocabulary]."""
        vocab_size, options = self.config.vocab_size, self.options
        total: Tensor = self.cross_entropy(logits.flatten(0, 1), targets.flatten(), vocab_size, **options)
        return total / denominator

    @property
    def options(self) -> dict[str, float]:
        """The options of the cross-entropy in this mode."""
        if not self.training:
            return {"z_loss": 0.0, "label_smoothing": 0.0}
        return {"z_loss": self.config.z_loss, "label_smoothing": self.config.label_smoothing}


class FusedLossHead(LossHead):
    """Head and loss as one operator, which never holds the logits of all tokens."""

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """As in LossHead."""
        vocab_size, options = self.config.vocab_size, self.options

        def of(x: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), vocab_size, denominator, **options)

        loss: Tensor = head(x, of)
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
