"""The training loss where each rank has the logits of its part of the vocabulary, and nobody has them all."""

from collections.abc import Callable

import torch
from torch import Tensor

from swamla_titan.kernels.cross_entropy import IGNORE
from swamla_titan.parallel.tensor_collectives import TensorGroup, max_over_shards, sum_over_shards


def vocabulary_parallel_cross_entropy(group: TensorGroup) -> Callable[..., Tensor]:
    """kernels.cross_entropy for logits [N, V/n]: columns rank * V/n ... of the vocabulary, on every rank of `group`.

    The function returned takes the same arguments, means the same by them, and gives every rank the loss of the whole
    vocabulary; the gradient of a rank's logits is that of this loss. `vocab_size` counts over all ranks, so the last
    ranks' columns may be padding in part or all.

    What is shared is three or four numbers per token and not the logits: their maximum, then in one sum that of the
    exponentials, the target's logit and, with label smoothing, the sum of the logits.
    """

    def cross_entropy(
        logits: Tensor, targets: Tensor, vocab_size: int, *, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> Tensor:
        first = group.rank * logits.shape[1]
        real = min(max(vocab_size - first, 0), logits.shape[1])
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Not sliced as in the plain one: a shard may be all padding, and nothing has no maximum.
        unpadded = logits if real == logits.shape[1] else torch.where(columns < real, logits, float("-inf"))
        largest = max_over_shards(unpadded.amax(dim=-1), group)  # [N]; a constant: the log-partition is without it too
        terms = [
            (unpadded - largest[:, None]).exp().sum(dim=-1),
            torch.where(columns == targets[:, None] - first, logits, 0.0).sum(dim=-1),
        ]
        if label_smoothing > 0:
            terms.append(torch.where(columns < real, logits, 0.0).sum(dim=-1))
        exponentials, target_logit, *logit_sum = sum_over_shards(torch.stack(terms), group).unbind()  # [N] each
        log_partition = largest + exponentials.log()
        loss = log_partition - target_logit
        if label_smoothing > 0:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logit_sum[0] / vocab_size)
        if z_loss > 0:
            loss = loss + z_loss * log_partition.square()
        return torch.where(targets != IGNORE, loss, 0.0).sum()

    return cross_entropy
