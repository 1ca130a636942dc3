"""Runs of the real command on several ranks, and what is seen of them from within each."""

import contextlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from swamla_titan.distributed.dtensor import local
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block
from swamla_titan.parallel.model_parts import ParallelModel
from tests.train.runs import train


@dataclass
class RankSeen:
    """What one rank did. Tensors travel as lists: they are small, and need no shared memory."""

    folder: Path
    code: int = -1
    error: str = ""  # what it wrote for its user
    parts: dict[str, Any] = field(default_factory=dict)  # name -> this rank's part of a parameter, as lists
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # and that part's shape
    blocks: list[list[str]] = field(default_factory=list)  # layer numbers, of each part of the model that it holds
    tokens: list[Any] = field(default_factory=list)  # of each call of the model that got tokens
    block_inputs: set[tuple[int, ...]] = field(default_factory=set)
    # Of each call of a model or stage, in order: are its blocks' weights still whole when it ends?
    gathered: list[bool] = field(default_factory=list)
    collectives: Counter[str] = field(default_factory=Counter)
    schedules: set[str] = field(default_factory=set)

    def look(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        if isinstance(module, Block):
            self.block_inputs.add(tuple(arguments[0].shape))
        if isinstance(module, SWAMLAModel):
            if not arguments[0].is_floating_point():
                self.tokens.append(arguments[0].tolist())
            self.gathered.append(not any(isinstance(weight, DTensor) for weight in module.blocks.parameters()))


class _Collectives(TorchDispatchMode):
    """Counts torch.distributed's operators by name."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace in ("c10d", "_c10d_functional"):
            self._counts[operator._opname.strip("_").removesuffix("_base")] += 1
        return operator(*args, **(kwargs or {}))


def train_on_a_rank(config: Path, folder: Path, overrides: tuple[str, ...]) -> RankSeen:
    """Train in `folder` as one of the processes that torchrun's variables speak of."""
    seen = RankSeen(folder)
    models: list[ParallelModel] = []
    build = ParallelModel.__init__

    def build_and_remember(self: ParallelModel, *arguments: Any) -> None:
        build(self, *arguments)
        models.append(self)

    written = io.StringIO()
    hook = register_module_forward_hook(seen.look)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(written), _Collectives(seen.collectives):
        patch.setattr(ParallelModel, "__init__", build_and_remember)
        seen.code = train(config, "--job.dump_folder", str(folder), *overrides)
    hook.remove()
    seen.error = written.getvalue()
    for model in models:
        for part in model.parts:
            seen.blocks.append(list(part.blocks))
            for name, parameter in part.named_parameters():
                mine = local(parameter.detach())
                seen.parts[name], seen.shapes[name] = mine.tolist(), tuple(mine.shape)
        if model.pipeline:
            seen.schedules |= {type(schedule).__name__ for schedule in model.pipeline._schedules.values()}
    return seen
