"""The schedule of a run: how many sequences, of how many tokens, each step has, and which sequence it begins with.

training.stages says which keys change while a run trains. A `TrainingStage` has a Config in which these keys have its
values, so whatever reads a key is given the Config of a stage, and a run without stages has one stage: its own Config.
Where a step begins is a function of the configuration and the step. Everything that needs a step's length, its batch,
or the sequences and tokens before it asks a Schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from swamla_titan.conditions import replace_at
from swamla_titan.config.sections import Config, DataSource, Stage, Training

# Keys of a Stage -> the keys of the configuration that they change.
KEYS_OF_STAGE = {
    "seq_len": "training.seq_len",
    "global_batch_size": "training.global_batch_size",
    "local_batch_size": "training.local_batch_size",
    "swa_window": "model.swa_window",
    "weights": "data.sources",
}


class Position(NamedTuple):
    """Between two steps: how many steps, tokens and sequences came before."""

    step: int
    tokens: int
    sequences: int


BEGINNING = Position(0, 0, 0)


@dataclass(frozen=True)
class TrainingStage:
    """Steps that train alike: those after `begin`, until the next stage.

    `number` is that of its table in training.stages, 0 for the run's beginning. `config` has the stage's values, and
    no stages.
    """

    number: int
    config: Config
    begin: Position

    def __str__(self) -> str:
        """Its steps in words."""
        sequences, length = self.training.global_batch_size, self.training.seq_len
        window = "".join(f", window {each}" for each in self.config.model.quantities("window").values())
        return f"{sequences} sequences of {length} tokens a step, {self.training.local_batch_size} at a time{window}"

    @property
    def training(self) -> Training:
        return self.config.training

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a global batch, which are as many targets."""
        return self.training.global_batch_size * self.training.seq_len

    def after(self, step: int) -> Position:
        """The position after `step` steps of the run, if all since `begin` are of this stage."""
        steps = step - self.begin.step
        sequences = self.begin.sequences + steps * self.training.global_batch_size
        return Position(step, self.begin.tokens + steps * self.tokens_per_step, sequences)

    def first_step_at(self, tokens: int) -> int:
        """The number of steps after which `tokens` are seen, if all since `begin` are of this stage."""
        return self.begin.step + max(0, -(-(tokens - self.begin.tokens) // self.tokens_per_step))


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, ascending; the first one extends to its beginning."""

    stages: tuple[TrainingStage, ...]

    @classmethod
    def of(cls, config: Config, begin: Position | None = None) -> "Schedule":
        """The schedule of a run that is at `begin`; None: at its beginning.

        Which stage a step is of, the tokens before it decide. If the run has come to `begin` otherwise than by this
        schedule (checkpoint.allow = "batch" or "data"), the schedule continues from there.
        """
        planned = cls(tuple(_stages(config, BEGINNING)))
        if begin is None or planned.after(begin.step) == begin:
            return planned
        return cls(tuple(_stages(config, begin)))

    def stage(self, step: int) -> TrainingStage:
        """The stage of step number `step` (from 1)."""
        return next((each for each in reversed(self.stages) if each.begin.step < step), self.stages[0])

    def after(self, step: int) -> Position:
        """The position after `step` steps."""
        return self.stage(step).after(step)

    @cached_property
    def longest(self) -> TrainingStage:
        """The last stage with the longest sequences: for what must be of one length in the whole run, as validation."""
        return max(reversed(self.stages), key=lambda each: each.training.seq_len)


def configs_of_stages(config: Config) -> list[Config]:
    """The configuration of each stage, the run's beginning first; each has no stages."""
    found = [replace(config, training=replace(config.training, stages=()))]
    for stage in config.training.stages:
        changed = found[-1]
        for key, value in keys_changed_by(stage).items():
            changed = replace_at(changed, key, value if key != "data.sources" else _weighted(changed, stage.weights))
        found.append(changed)
    return found


def _weighted(config: Config, weights: Mapping[str, float]) -> tuple[DataSource, ...]:
    return tuple(replace(each, weight=weights.get(each.name, each.weight)) for each in config.data.sources)


def keys_changed_by(stage: Stage) -> dict[str, Any]:
    """The keys of the configuration that a stage names, and their values."""
    return {key: value for name, key in KEYS_OF_STAGE.items() if (value := getattr(stage, name))}


def _stages(config: Config, begin: Position) -> list[TrainingStage]:
    """The stages from `begin` on, without those that no step is of."""
    tokens = (0, *(stage.tokens for stage in config.training.stages))
    configs = configs_of_stages(config)
    first = max(number for number, least in enumerate(tokens) if least <= begin.tokens)
    found = [TrainingStage(first, configs[first], begin)]
    for number in range(first + 1, len(tokens)):
        last = found[-1]
        begin = last.after(last.first_step_at(tokens[number]))
        if begin == last.begin:
            found.pop()
        found.append(TrainingStage(number, configs[number], begin))
    return found
