"""Cross-entropy over a vocabulary that is sharded over tensor-parallel ranks, without gathering the logits."""

import torch
from torch import Tensor, nn

from swamla_titan.kernels.cross_entropy import IGNORE
from swamla_titan.model import ModelConfig
from swamla_titan.model.loss_head import LossHead
from swamla_titan.parallel.tensor_collectives import TensorGroup, all_gather_last_axis, all_reduce_max, all_reduce_sum


class VocabularyParallelLossHead(LossHead):
    """LossHead for a head that gives the ranks of `group` their shards of the logits."""

    def __init__(self, config: ModelConfig, group: TensorGroup) -> None:
        super().__init__(config)
        self.group = group
        self.cross_entropy = VocabularyParallelCrossEntropy(group)

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """As in LossHead: those of the full vocabulary, on every rank."""
        return all_gather_last_axis(head(x), self.group)[..., : self.config.vocab_size]


class VocabularyParallelCrossEntropy(nn.Module):
    """kernels/cross_entropy.py for logits [N, V/n]: on each rank of `group` those of the ids from rank * V/n on.

    It takes the same arguments with the same meaning, and gives every rank the loss over the full vocabulary; the
    gradient of a rank's logits is that of this loss. `vocab_size` counts over all ranks, so the last ranks' logits may
    be padding in part or entirely.

    Ranks communicate three or four values per token instead of the logits: an all-reduce of their maximum, then one of
    the sums of exponentials, of the target's logit and, with label smoothing, of the logits.
    """

    def __init__(self, group: TensorGroup) -> None:
        super().__init__()
        self.group = group

    def forward(
        self, logits: Tensor, targets: Tensor, vocab_size: int, *, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> Tensor:
        """Logits [N, V/n] and targets [N] -> the sum of the losses, a float32 scalar."""
        group = self.group
        first = group.rank * logits.shape[1]
        real = min(max(vocab_size - first, 0), logits.shape[1])
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Masked and not sliced as without sharding, because a shard may be all padding, and nothing has no maximum.
        unpadded = logits if real == logits.shape[1] else torch.where(columns < real, logits, float("-inf"))
        maximum = all_reduce_max(unpadded.amax(dim=-1), group)  # [N]; without a gradient, because it cancels
        terms = [
            (unpadded - maximum[:, None]).exp().sum(dim=-1),
            torch.where(columns == targets[:, None] - first, logits, 0.0).sum(dim=-1),
        ]
        if label_smoothing > 0:
            terms.append(torch.where(columns < real, logits, 0.0).sum(dim=-1))
        exponentials, target_logit, *logit_sum = all_reduce_sum(torch.stack(terms), group).unbind()  # [N] each
        log_partition = maximum + exponentials.log()
        loss = log_partition - target_logit
        if label_smoothing > 0:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logit_sum[0] / vocab_size)
        if z_loss > 0:
            loss = loss + z_loss * log_partition.square()
        return torch.where(targets != IGNORE, loss, 0.0).sum()
