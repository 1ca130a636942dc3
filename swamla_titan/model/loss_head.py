"""The output head and the loss together: what becomes of the last activations."""

from torch import Tensor, nn

from swamla_titan.kernels.cross_entropy import cross_entropy
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
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

    The head is passed in and not a part of this: its weight is the model's `head.weight`, and may be the embedding's.
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
        """Of the cross-entropy, in this mode."""
        if not self.training:
            return {"z_loss": 0.0, "label_smoothing": 0.0}
        return {"z_loss": self.config.z_loss, "label_smoothing": self.config.label_smoothing}


class FusedLossHead(LossHead):
    """Head and loss as one operation, which never holds the logits of all tokens."""

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor, denominator: Tensor | float) -> Tensor:
        """As in LossHead."""
        vocab_size, options = self.config.vocab_size, self.options

        def of(x: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), vocab_size, denominator, **options)

        loss: Tensor = head(x, of)
        return loss
