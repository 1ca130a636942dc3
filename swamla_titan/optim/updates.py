"""What a step does to one parameter's local shard, as formulas on plain tensors, one kernel each if compiled.

Where the scalar `bad` is 1 everything stays as it is, bit for bit. `divisor`: of gradients, None: 1. A division before
the rule would read and write them all once more. Learning rates and weight decay are scalar tensors on the host, so
that groups share compiled code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swamla_titan.optim.moments import condensed, restored


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


def put(target: Tensor, value: Tensor, bad: Tensor | None) -> None:
    """Write `value` into `target`; where the scalar `bad` is 1, leave it as it is, bit for bit. None: it is 0."""
    target.copy_(value if bad is None else torch.where(bad > 0, target, value.to(target.dtype)))


def pointwise(update: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The update, compiled if wanted: once for any number of rows of its tensors, and for each width of them.

    What differs from step to step must come as scalar tensors on the host: a Python number would be compiled in.
    Tensors that have rows come by themselves or in lists; those in tuples are of one size for ever.
    """
    if not compiled:
        return update
    # Not all parameters in one call: Lion for `base` would compile for 26 s instead of 7 (a CPU; same bits), to save
    # 2 ms of host time a step while the device computes. torch._foreach passes over memory for each operation.
    fused = torch.compile(update, fullgraph=True)

    def call(*arguments: Any) -> Any:
        rows = arguments[0].shape[0]
        for tensor in _tensors(arguments):
            if rows > 1 and tensor.ndim and tensor.shape[0] == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
                torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
        return fused(*arguments)

    return call


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    nested = [_tensors(each) for each in arguments if isinstance(each, list)]
    return [each for each in arguments if isinstance(each, Tensor)] + [each for found in nested for each in found]
