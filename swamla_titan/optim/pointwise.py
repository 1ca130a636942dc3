"""Updates of one tensor after the other, each as one kernel if compiled, that a flag on the device can call off."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
