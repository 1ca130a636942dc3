"""The exponential moving average of the weights, which often generalises better than the last of them.

    mean <- mean + (1 - d) (weight - mean),    d = min(decay, (1 + t) / (10 + t)) after step t,

so that the average forgets the random weights of the beginning at any decay (as in TensorFlow's and others' averages).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import free_gathered_weights, local, zeros_sharded_like
from swamla_titan.optim.groups import named
from swamla_titan.optim.updates import pointwise, put


class AveragedWeights:
    """A float32 average of the parameters of a model, or of the pipeline stages that a rank holds, cut like these."""

    def __init__(self, parts: Sequence[nn.Module], decay: float, compiled: bool = False) -> None:
        """Call `restart` or load `of_part` once the weights have values."""
        self._decay = decay
        self._parts = parts
        self._means: dict[nn.Parameter, Tensor] = {}
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            self._means[parameter] = zeros_sharded_like(parameter, parameter.shape[-1], torch.float32)
        self._move = pointwise(_move, compiled)

    def of_part(self, part: nn.Module) -> dict[str, Tensor]:
        """The live averages by their weights' names in the whole model: to save, or to load into."""
        return {name: self._means[parameter] for name, parameter in named(part)}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        for parameter, mean in self._means.items():
            local(mean).copy_(local(parameter))

    @torch.no_grad()
    def update(self, step: int, bad: Tensor | None) -> None:
        """After step `step`, counted from 1: move towards the weights; not where the scalar `bad` is 1."""
        share = torch.tensor(1 - min(self._decay, (1 + step) / (10 + step)), dtype=torch.float32)
        for parameter, mean in self._means.items():
            if local(mean).numel():
                self._move(local(mean).view(-1), local(parameter).detach().view(-1), share, bad)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within, the model computes with the averages. Nothing may be reading weights or averages meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in self._means.items():
            weight, average = local(parameter).detach(), local(mean)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for part in self._parts:
            free_gathered_weights(part)  # which may have been kept, of the others


def _move(mean: Tensor, weight: Tensor, share: Tensor, bad: Tensor | None) -> None:
    put(mean, mean + share * (weight - mean), bad)
