"""What a step does to one parameter's part on this rank, as formulas on plain tensors (pointwise.py).

Where the scalar `bad` is 1 everything stays as it is, bit for bit. `divisor`: of gradients, None: 1. A division before
the rule would read and write them all once more. Learning rates and weight decay are scalar tensors on the host, so
that groups share compiled code.
"""

from collections.abc import Sequence

from torch import Tensor

from swamla_titan.optim.moments import condensed, restored
from swamla_titan.optim.pointwise import put


def adamw(
    weight: Tensor,
    gradient: Tensor,
    step: Tensor,
    kept: Sequence[list[Tensor]],
    maps: Sequence[Tensor | None],
    divisor: Tensor | None,
    bad: Tensor | None,
    lr: Tensor,
    moments: str,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
) -> None:
    """AdamW (arXiv:1711.05101) with moments kept as `moments` says; in the order of torchao's formulas.

    `weight` and `gradient` are float32 [blocks, block], `step` counts from 1. The update is made of the moments before
    they are rounded.
    """
    gradient = _over(gradient, divisor)
    first, second = (restored(each, moments, table) for each, table in zip(kept, maps))
    first = first.lerp(gradient, 1 - beta1)
    second = second.lerp(gradient.square(), 1 - beta2)
    decayed = weight - lr * weight_decay * weight
    denominator = second.sqrt() / (1 - beta2**step).sqrt() + eps
    put(weight, decayed - lr * (first / (1 - beta1**step)) / denominator, bad)
    for each, moment, table in zip(kept, (first, second), maps):
        for target, value in zip(each, condensed(moment, moments, table)):
            put(target, value, bad)


def lion(
    weight: Tensor,
    gradient: Tensor,
    kept: list[Tensor],
    divisor: Tensor | None,
    bad: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    moments: str,
    beta1: float,
    beta2: float,
) -> None:
    """Lion (arXiv:2302.06675): steps of one size, by the sign of a mix of momentum and gradient.

    `decay` is 1 - lr * weight_decay.
    """
    momentum, gradient = restored(kept, moments, None), _over(gradient, divisor)
    direction = (momentum * beta1).add(gradient, alpha=1 - beta1).sign()
    put(weight, weight * decay - lr * direction, bad)
    [target], [value] = kept, condensed((momentum * beta2).add(gradient, alpha=1 - beta2), moments, None)
    put(target, value, bad)


def muon_momentum(
    gradient: Tensor,
    kept: list[Tensor],
    divisor: Tensor | None,
    bad: Tensor | None,
    moments: str,
    momentum: float,
    nesterov: bool,
) -> Tensor:
    """What Muon orthogonalizes, bfloat16, as torch.optim.Muon makes it of gradient and momentum."""
    gradient = _over(gradient, divisor)
    average = restored(kept, moments, None).lerp(gradient, 1 - momentum)
    update = gradient.lerp(average, momentum) if nesterov else average
    [target], [value] = kept, condensed(average, moments, None)
    put(target, value, bad)
    return update.bfloat16()


def muon_weight(weight: Tensor, direction: Tensor, size: Tensor, bad: Tensor | None, lr: Tensor, decay: Tensor) -> None:
    """Take an orthogonalized `direction` [r, c] off a weight; `size` [r, 1] is each row's factor of lr (`step_sizes`).

    `decay` is 1 - lr * weight_decay.
    """
    put(weight, weight * decay - (lr * size) * direction, bad)


def _over(gradient: Tensor, divisor: Tensor | None) -> Tensor:
    return gradient if divisor is None else gradient / divisor
