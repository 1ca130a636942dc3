"""Settings that somebody wrote and that cannot have an effect, by the conditions that sections.py declares.

Whoever writes a key expects an effect of it, so one without is an error, if its value is not the default. It is no
error, but worth a warning, where the file made sense before an override on the command line, and in a file that states
nearly every key, as `config show` and a run's config.toml do.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from swamla_titan.conditions import replace_at, value_at
from swamla_titan.config.sections import Config
from swamla_titan.config.toml import shown
from swamla_titan.fields import sections, settings
from swamla_titan.model import FLAVORS, ModelConfig


class Given(NamedTuple):
    """Which keys, as section.key, were written where."""

    in_file: Collection[str]
    in_overrides: Collection[str]
    flavor: str | None = None

    def is_tolerable(self, name: str, others: Collection[str]) -> bool:
        """Whether a key that made sense in its file is at odds with others through an override of one of those.

        So is one of a file that states nearly every key.
        """
        states_all = 2 * len(self.in_file) > sum(1 for _ in _fields(Config(), None))
        return name not in self.in_overrides and (states_all or not set(others).isdisjoint(self.in_overrides))


@dataclasses.dataclass(frozen=True)
class Finding:
    """A key without effect, first of `keys`, and those that take it away. `default` may stand in its place."""

    keys: tuple[str, ...]
    problem: str
    is_tolerable: bool
    is_ignorable: bool
    default: Any


def without_effect(config: Config, given: Given | None = None) -> Iterator[Finding]:
    """Every key that was given, is not the default and has no effect; `given` None: judge all of them alike."""
    fields = dict(_fields(config, given.flavor if given else None))
    in_file, in_overrides = given[:2] if given else (fields.keys(), frozenset())
    for name, (field, default) in fields.items():
        value, needs = value_at(config, name), field.metadata["needs"]
        if needs is None or value == default or (name not in in_file and name not in in_overrides):
            continue
        if obstacles := needs.obstacles(config):
            because = " and ".join(f"{each} = {shown(value_at(config, each))}" for each in obstacles)
            problem = f"{shown(value)} has no effect with {because}: leave it out, or set {needs.way_out(config)}"
            tolerable = given is not None and given.is_tolerable(name, obstacles)
            # A model keeps its value: a checkpoint may have it as well, and a resumed run is held against that.
            ignorable = needs.ignorable and not name.startswith("model.")
            yield Finding((name, *obstacles), problem, tolerable, ignorable, default)


def without(config: Config, finding: Finding) -> Config:
    """The configuration with the default in the place of a key without effect."""
    changed: Config = replace_at(config, finding.keys[0], finding.default)
    return changed


def _fields(config: Config, flavor: str | None) -> Iterator[tuple[str, tuple["dataclasses.Field[Any]", Any]]]:
    """Name -> (field, default) of every key."""
    defaults = Config(model=FLAVORS[flavor] if flavor else ModelConfig())
    for section, kind in sections(type(config)).items():
        for key, field in settings(kind).items():
            name = f"{section}.{key}"
            yield name, (field, value_at(defaults, name))
