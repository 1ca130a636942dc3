"""torch's functional collectives, called as operators: autograd has their gradients, and torch.compile traces them.

They return before the result is there. The operators are called directly because torch's wrappers return a tensor
that waits at its first use, and such tensors as inputs of a compiled block have given wrong gradients.
"""

import torch
import torch.distributed._functional_collectives  # registers the gradients; nothing else is sure to have imported it
from torch import Tensor

OPERATORS = torch.ops._c10d_functional


def waited(x: Tensor) -> Tensor:
    """The result `x` of one of OPERATORS once it is there. In a graph the compiler moves this as late as it can."""
    result: Tensor = OPERATORS.wait_tensor(x)
    return result
