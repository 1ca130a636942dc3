"""The update rules of one parameter's local shard, as formulas on plain tensors; compiled, each is one fused kernel.

If the scalar `bad` is 1, weight and moments stay as they are, bit for bit. Gradients are divided by `divisor` (None: 1)
within the rule, because a division before it would read and write them once more. Learning rates and weight decay are
scalar tensors on the host, so that parameter groups share compiled code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swamla_titan.optim.state import Format, dequantize, quantize


def adamw(
    weight: Tensor,
    gradient: Tensor,
    step: Tensor,
    kept: Sequence[list[Tensor]],
    tables: Sequence[Tensor | None],
    divisor: Tensor | None,
    bad: Tensor | None,
    lr: Tensor,
    moments: Format,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
) -> None:
    """AdamW (arXiv:1711.05101) with moments in the format `moments`; operations in the order of torchao's.

    `weight` and `gradient` are float32 [blocks, block], `step` counts from 1. The update uses the new moments before
    they are quantized.
    """
    gradient = _divided(gradient, divisor)
    first, second = (dequantize(each, moments, table) for each, table in zip(kept, tables))
    first = first.lerp(gradient, 1 - beta1)
    second = second.lerp(gradient.square(), 1 - beta2)
    decayed = weight - lr * weight_decay * weight
    denominator = second.sqrt() / (1 - beta2**step).sqrt() + eps
    write_unless_bad(weight, decayed - lr * (first / (1 - beta1**step)) / denominator, bad)
    for each, moment, table in zip(kept, (first, second), tables):
        for target, value in zip(each, quantize(moment, moments, table)):
            write_unless_bad(target, value, bad)


def lion(
    weight: Tensor,
    gradient: Tensor,
    kept: list[Tensor],
    divisor: Tensor | None,
    bad: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    moments: Format,
    beta1: float,
    beta2: float,
) -> None:
    """Lion (arXiv:2302.06675): a step of the learning rate in the sign of a mix of momentum and gradient.

    `decay` is 1 - lr * weight_decay.
    """
    momentum, gradient = dequantize(kept, moments, None), _divided(gradient, divisor)
    direction = (momentum * beta1).add(gradient, alpha=1 - beta1).sign()
    write_unless_bad(weight, weight * decay - lr * direction, bad)
    [target], [value] = kept, quantize((momentum * beta2).add(gradient, alpha=1 - beta2), moments, None)
    write_unless_bad(target, value, bad)


def muon_momentum(
    gradient: Tensor,
    kept: list[Tensor],
    divisor: Tensor | None,
    bad: Tensor | None,
    moments: Format,
    momentum: float,
    nesterov: bool,
) -> Tensor:
    """Update the momentum and return the matrix, bfloat16, that Muon orthogonalizes; formulas of torch.optim.Muon."""
    gradient = _divided(gradient, divisor)
    average = dequantize(kept, moments, None).lerp(gradient, 1 - momentum)
    update = gradient.lerp(average, momentum) if nesterov else average
    [target], [value] = kept, quantize(average, moments, None)
    write_unless_bad(target, value, bad)
    return update.bfloat16()


def muon_weight(weight: Tensor, direction: Tensor, size: Tensor, bad: Tensor | None, lr: Tensor, decay: Tensor) -> None:
    """Subtract an orthogonalized `direction` [r, c] from a weight; `size` [r, 1] has each row's factor of lr.

    `decay` is 1 - lr * weight_decay.
    """
    write_unless_bad(weight, weight * decay - (lr * size) * direction, bad)


def _divided(gradient: Tensor, divisor: Tensor | None) -> Tensor:
    return gradient if divisor is None else gradient / divisor


def write_unless_bad(target: Tensor, value: Tensor, bad: Tensor | None) -> None:
    """Write `value` into `target`, or leave it as it is, bit for bit, if the scalar `bad` is 1; None: never bad.

    With `bad` [rows, 1] that holds of each row.
    """
    target.copy_(value if bad is None else torch.where(bad > 0, target, value.to(target.dtype)))


def fuse_elementwise(update: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The update, if `compiled` as one fused kernel: compiled once per number of columns, for any number of rows.

    Values that change from step to step must be scalar tensors on the host, because a Python number would be compiled
    in. Tensors with a variable number of rows are arguments themselves or stand in lists; those in tuples never change
    their size.
    """
    if not compiled:
        return update
    # Not all parameters in one call: Lion for `base` would compile for 26 s instead of 7 (on a CPU; same bits), to save
    # 2 ms of host time a step while the device computes. torch._foreach would read and write memory for each operation.
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
