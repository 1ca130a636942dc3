"""The cross-entropy loss over the vocabulary, computed in float32 or wider whatever the logits' dtype."""

import torch
from torch import Tensor

IGNORE = -100  # the target of a position that is not learned from, as in torch.nn.functional.cross_entropy


def cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over the targets that are not -100 of -log softmax(logits)[target], plus z-loss; a float32 scalar.

    logits [N, V] with V >= vocab_size (columns from vocab_size on are padding and ignored), targets [N] int64.
    `label_smoothing` spreads that share of the target evenly over the vocabulary, as torch's cross_entropy does;
    `z_loss` adds weight * log(sum exp logits)^2 per target, which keeps the logits' scale from drifting
    (PaLM, arXiv:2204.02311, section 5). A target outside [0, vocab_size) that is not -100 is the caller's error and is
    not detected.

    Compiled, the float32 logits exist only inside fused loops, because the target's logit is selected by a comparison:
    the backward pass of `gather` would first write an [N, V] float32 buffer of zeros.
    """
    logits = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    log_partition = logits.logsumexp(dim=-1)  # [N]
    columns = torch.arange(vocab_size, device=logits.device)
    target_logit = torch.where(columns == targets[:, None], logits, 0.0).sum(dim=-1)  # [N]
    loss = log_partition - target_logit
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logits.mean(dim=-1))
    if z_loss > 0:
        loss = loss + z_loss * log_partition.square()
    return torch.where(targets != IGNORE, loss, 0.0).sum()
