"""How a module computes with parameters and activations of which a process may hold a shard."""

from torch import Tensor


class Sharding:
    """Full parameters and activations. Tensor parallelism gives modules another (parallel/tensor.py)."""

    is_full = True

    def parameter(self, parameter: Tensor) -> Tensor:
        """The part of a parameter that this process computes with."""
        return parameter

    def input(self, x: Tensor) -> Tensor:
        """What a linear layer computes from, of what it is given."""
        return x

    def output(self, y: Tensor) -> Tensor:
        """What a linear layer gives, of what it has computed."""
        return y


FULL = Sharding()
