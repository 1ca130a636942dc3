"""The tensors that a checkpoint holds, as named groups: model, optimizer, average of the weights, random states, ...

Each group knows its own tensors: which to save, which to load into, how many bytes, and what of a stored group is
invalid. Saving, loading, rewinding and verification iterate over the groups. To add one, derive from `StateGroup`, and
put the class and its instance into train/step.py.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from swamla_titan.checkpoint.reader import load_tensors, require_finite, require_loadable, stored_groups
from swamla_titan.config.sections import Optimizer
from swamla_titan.distributed.dtensor import local, plain
from swamla_titan.distributed.mesh import World, all_ranks_or_raise
from swamla_titan.errors import UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.row_table import row_tables
from swamla_titan.optim import AveragedWeights, bring_up_to_date, names_of_decays, state_bytes, trained_parameters

logger = logging.getLogger(__name__)

ALIGNED = 64  # bytes; a tensor of any dtype may begin at a multiple
_TENSORS_A_MOMENT = 3  # codes, scales and the like of quantized moments


class StateGroup(ABC):
    """Tensors of a run that a checkpoint holds under `group`.

    A checkpoint may lack some of them, or have them in another shape; then they stay as they are.
    """

    group: ClassVar[str]

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save or to load into, by name: live ones, or copies that `loaded` writes back."""

    def loaded(self, state: dict[str, Tensor], step: int) -> None:  # noqa: B027 (live tensors may need nothing)
        """Continue after `step` with `state`: the result of `state_dict`, after a checkpoint was loaded into it."""

    def size(self) -> int:
        """About how many bytes this rank saves."""
        return sum(aligned_bytes(local(each)) for each in self.state_dict().values())

    @staticmethod
    @abstractmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        """What is invalid in the group of a checkpoint of `step`, as a message that begins with a tensor's name.

        `state` is on the host. It may lack tensors, and another configuration may have written it.
        """


class Learned(StateGroup):
    """Weights and the like: what a rewind restores. A checkpoint must hold all of them, in this shape, and finite."""

    if_absent: ClassVar[str] = ""  # the warning where a checkpoint lacks the group, and `begin` replaces it
    if_dropped: ClassVar[str] = ""  # the warning where a run does without a group that the checkpoint has

    @abstractmethod
    def parts(self) -> Sequence[dict[str, Tensor]]:
        """The live tensors of each part of the model on this rank: the whole, or pipeline stages.

        Each part is loaded separately: both ends of a tied weight have one name, and a rank may hold the two
        (ZBVZeroBubble).
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of all parts; of a tied weight the first end."""
        return _first_of_each(item for part in self.parts() for item in part.items())

    def begin(self) -> None:
        """Initialize where there is no checkpoint, once the weights have their values."""

    def rewritten(self) -> None:
        """Called when tensors of any group were written, by `begin` or from a checkpoint."""

    @staticmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        """Nothing: the configuration determines the shapes, and loading looks for values that are not finite."""
        return None


class Weights(Learned):
    """The weights of a model, or of the pipeline stages that this rank holds.

    Names and shapes are those of the full model under every plan, so that a checkpoint of one loads into any other. A
    tied output head has the embedding's name; on a stage that holds it alone it is a copy.
    """

    group = "model"

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts

    def parts(self) -> list[dict[str, Tensor]]:
        """See Learned."""
        return [
            _first_of_each(
                (_stored_name(name, part), plain(weight)) for name, weight in get_model_state_dict(part).items()
            )
            for part in self._parts
        ]

    def size(self) -> int:
        """See StateGroup."""
        return sum(aligned_bytes(local(weight)) for part in self._parts for weight in part.parameters())

    def rewritten(self) -> None:
        """See Learned. Tables read rows ahead, on a stream that does not wait for what writes them."""
        for part in self._parts:
            for table in row_tables(part).values():
                table.rewritten()


class OptimizerStates(Learned):
    """The tensors of the optimizers, one for each of `parts`.

    Learning rates and the like are not saved, because they follow from the configuration and the step.
    """

    group = "optimizer"

    def __init__(
        self, parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], config: Optimizer
    ) -> None:
        self._parts, self._optimizers, self._config = parts, optimizers, config

    def parts(self) -> list[dict[str, Tensor]]:
        """See Learned."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return [
            _first_of_each(
                (_stored_name(name, part), value)
                for name, value in get_optimizer_state_dict(part, optimizer, options=options).items()
                if isinstance(value, Tensor)
            )
            for part, optimizer in zip(self._parts, self._optimizers)
        ]

    def size(self) -> int:
        """See StateGroup; computed, because the first step creates the states."""
        weights = sum(1 for part in self._parts for _ in part.parameters())
        padding = weights * (2 * _TENSORS_A_MOMENT + 1) * ALIGNED
        return sum(state_bytes(part, self._config) for part in self._parts) + padding


class Average(Learned):
    """The moving average of the weights, by their names."""

    group = "ema"
    if_absent = "holds no average of the weights: it begins with the weights themselves"
    if_dropped = "holds an average of the weights, which ema.decay = 0 drops"

    def __init__(self, parts: Sequence[nn.Module], average: AveragedWeights) -> None:
        self._parts, self._average = parts, average

    def parts(self) -> list[dict[str, Tensor]]:
        """See Learned."""
        return [self._average.of_part(part) for part in self._parts]

    def begin(self) -> None:
        """Begin with the weights as they are."""
        self._average.restart()


class RandomStates(StateGroup):
    """The states of torch's random generators, of the CPU and on CUDA of the device, as uint8 named after the rank.

    Ranks draw different numbers (for dropout), so each has its own states. A rank for which the checkpoint has none
    keeps those that it has.
    """

    group = "random"

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device, self._rank = device, rank

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the states."""
        state = {f"rank-{self._rank}.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state[f"rank-{self._rank}.cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def loaded(self, state: dict[str, Tensor], step: int) -> None:
        """Set the generators."""
        torch.set_rng_state(state[f"rank-{self._rank}.cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[f"rank-{self._rank}.cuda"], self._device)

    @staticmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        """A state that its generator would not accept."""
        accepts = {name: _accepts_on_cuda if name.endswith(".cuda") else _accepts_on_cpu for name in state}
        rejected = (name for name, each in state.items() if not accepts[name](each))
        return next((f"{name[:80]} is not the state of a generator" for name in rejected), None)


def _accepts_on_cuda(state: Tensor) -> bool:
    # A seed and an offset of eight bytes each; the GPU draws four numbers at once.
    return state.shape == (16,) and state.dtype == torch.uint8 and int(state.view(torch.int64)[1]) % 4 == 0


def _accepts_on_cpu(state: Tensor) -> bool:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


Declared = Mapping[str, type[StateGroup]]


def declared(*groups: type[StateGroup]) -> Declared:
    """The groups that a program's checkpoints may hold, by name: verification refuses one that holds others."""
    return {each.group: each for each in groups}


OF_MODELS = declared(Weights, OptimizerStates, Average, RandomStates)


class State:
    """All state groups of a run, on this rank."""

    def __init__(self, groups: Sequence[StateGroup], known: Declared, world: World) -> None:
        """`known`: all groups that a checkpoint may hold; those of `groups` are among them."""
        assert {each.group for each in groups} <= known.keys(), "a group that no checkpoint may hold"
        self._learned = [each for each in groups if isinstance(each, Learned)]
        self._others = [each for each in groups if not isinstance(each, Learned)]
        self._known, self._world = known, world

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by group and name."""
        return {each.group: each.state_dict() for each in (*self._learned, *self._others)}

    def size(self) -> int:
        """About how many bytes of `tensors` this rank holds."""
        return sum(each.size() for each in (*self._learned, *self._others))

    def begin(self) -> None:
        """Initialize what does not come from a checkpoint, once the weights have their values."""
        for each in self._learned:
            each.begin()
        self._rewritten()

    def load(self, path: Path, step: int) -> None:
        """Load all groups from a checkpoint and continue after `step`."""
        states = {each.group: each.state_dict() for each in self._others}
        self.load_learned(path, states)
        for each in self._others:
            each.loaded(states[each.group], step)

    def load_learned(
        self, path: Path, optional: Mapping[str, dict[str, Tensor]], groups: Collection[str] | None = None
    ) -> None:
        """Load what was learned from a checkpoint, in place, and of `optional`, by group and name, what it holds.

        `groups`: what is learned in others begins as without a checkpoint; None: all are loaded. Raises UserError, on
        every rank, before anything is written if it does not fit, and Damaged for values that are not finite.
        """
        there = all_ranks_or_raise(self._world, lambda: stored_groups(path))
        wanted = [each for each in self._learned if groups is None or each.group in groups]
        absent = [each for each in wanted if each.if_absent and each.group not in there]
        loaded = [each for each in wanted if each not in absent]
        try:
            self._load_parts(path, loaded, optional)
            for each in self._learned:
                if each not in loaded:
                    each.begin()
        finally:
            self._rewritten()
        unused = there - {each.group for each in self._learned}
        dropped = [
            cls
            for name, cls in self._known.items()
            if name in unused and issubclass(cls, Learned) and (groups is None or name in groups)
        ]
        for message in (*(each.if_absent for each in absent), *(cls.if_dropped for cls in dropped)):
            if message and self._world.is_rank_0:
                logger.warning("%s %s", path, message)

    def _load_parts(self, path: Path, groups: Sequence[Learned], optional: Mapping[str, dict[str, Tensor]]) -> None:
        parts = {each.group: each.parts() for each in groups}
        for index in range(max(map(len, parts.values()))):
            tensors = {group: found[index] for group, found in parts.items()}
            load_tensors(path, tensors, self._world, optional)
            require_finite(path, tensors, self._world)

    def _rewritten(self) -> None:
        for each in self._learned:
            each.rewritten()


def require_weights(path: Path, model: nn.Module, ema: bool = False) -> None:
    """Raise UserError unless a checkpoint has the weights, or their average, of `model`, which may be on "meta"."""
    if ema and Average.group not in stored_groups(path):
        raise UserError(f"{path} holds no average of the weights: it was trained with ema.decay = 0")
    require_loadable(path, _weights_of(model, ema))


def load_weights(path: Path, model: nn.Module, ema: bool = False) -> None:
    """Fill an unsharded model with the weights of a checkpoint, or with their average; UserError if it has none."""
    require_weights(path, model, ema)
    load_tensors(path, _weights_of(model, ema))
    if ema:
        _bring_tables_up_to_date(path, model)
    require_finite(path, _weights_of(model, ema), World.alone())


def _bring_tables_up_to_date(path: Path, model: nn.Module) -> None:
    """Checkpoints keep the averages of tables as optim/ema.py does.

    The weights behind them are read into the memory of the host, a table at a time: a GPU may have no room for both.
    """
    tables = row_tables(model)
    for name, average in trained_parameters(model):
        if average in tables:
            weight = torch.empty_like(average, device="cpu", requires_grad=False)
            of_rows, of_steps = (
                weight.new_empty(len(weight), 1, dtype=torch.float64),
                weight.new_empty((), dtype=torch.float64),
            )
            decays = dict(zip(names_of_decays(name), (of_rows, of_steps)))
            load_tensors(path, {Weights.group: {name: weight}, Average.group: decays})
            bring_up_to_date(average.detach(), weight, of_rows, of_steps)


def _weights_of(model: nn.Module, ema: bool) -> dict[str, dict[str, Tensor]]:
    return {Average.group if ema else Weights.group: Weights([model]).state_dict()}


def _first_of_each(tensors: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        found.setdefault(name, tensor)
    return found


def _stored_name(name: str, part: nn.Module) -> str:
    tied = isinstance(part, SWAMLAModel) and part.config.tie_embeddings
    return re.sub(r"(^|\.)head\.weight", r"\1embedding.weight", name) if tied else name


def aligned_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, rounded up so that the next one begins aligned."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
