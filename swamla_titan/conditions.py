"""When a setting has an effect: conditions on other settings, declared beside the field itself.

A field made by `key(..., needs=...)` is refused where it was set and its condition does not hold: whoever wrote it
expects an effect. Conditions look at a whole configuration, by names like "data.source".
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any


class Condition:
    """What must hold for a setting to have an effect."""

    # Whether the default in the setting's place would be the same; else the setting stays where it is tolerated.
    ignorable: bool = True

    def obstacles(self, config: Any) -> list[str]:
        """The keys, as section.key, that stand in its way; none: it has an effect."""
        raise NotImplementedError

    def way_out(self, config: Any) -> str:
        """What would give it one, in words that follow "set"."""
        raise NotImplementedError


@dataclass(frozen=True)
class One(Condition):
    """A predicate over a configuration, and the keys that decide it."""

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    remedy: str
    ignorable: bool = True

    def obstacles(self, config: Any) -> list[str]:
        return [] if self.holds(config) else list(self.keys)

    def way_out(self, config: Any) -> str:
        return self.remedy


@dataclass(frozen=True)
class Several(Condition):
    """All of some conditions, or any of them."""

    parts: tuple[Condition, ...]
    all_wanted: bool

    def obstacles(self, config: Any) -> list[str]:
        found = [part.obstacles(config) for part in self.parts]
        if not self.all_wanted and not all(found):
            return []
        return list(dict.fromkeys(key for keys in found for key in keys))

    def way_out(self, config: Any) -> str:
        missing = [part.way_out(config) for part in self.parts if part.obstacles(config)]
        return (" and " if self.all_wanted else " or ").join(missing)


def when(name: str, *values: object) -> Condition:
    """The key `name` has one of these values."""
    return One((name,), lambda config: value_at(config, name) in values, f"{name} = {_listed(values)}")


def when_not(name: str, *values: object) -> Condition:
    """The key `name` has none of these values."""
    return One((name,), lambda config: value_at(config, name) not in values, f"{name} other than {_listed(values)}")


def when_on(name: str, remedy: str = "") -> Condition:
    """The key `name` is true, not 0, not empty."""
    return One((name,), lambda config: bool(value_at(config, name)), remedy or name)


def when_both(*parts: Condition) -> Condition:
    return Several(parts, all_wanted=True)


def when_either(*parts: Condition) -> Condition:
    return Several(parts, all_wanted=False)


def has_effect(config: Any, name: str) -> bool:
    """Whether the key `section.key` has an effect, by the condition that is declared beside it."""
    section, _, key = name.rpartition(".")
    fields = {field.name: field for field in dataclasses.fields(value_at(config, section))}
    needs = fields[key].metadata["needs"]
    return needs is None or not needs.obstacles(config)


def value_at(config: Any, name: str) -> Any:
    """The value of `section.key`, or a section; a section within another has a dotted name."""
    return reduce(getattr, name.split("."), config)


def replace_at(config: Any, name: str, value: Any) -> Any:
    """The configuration with another value of `section.key`."""
    first, _, rest = name.partition(".")
    changed = replace_at(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: changed})


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)
