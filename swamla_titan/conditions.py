"""Conditions on a whole configuration, by names like "data.source": when a setting has an effect."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any


class Condition:
    """What must hold for a setting to have an effect; `&` and `|` combine conditions."""

    # Whether the default in the setting's place would be the same; else the setting stays where it is tolerated.
    ignorable: bool = True

    def obstacles(self, config: Any) -> list[str]:
        """The keys, as section.key, that stand in its way; none: it has an effect."""
        raise NotImplementedError

    def way_out(self, config: Any) -> str:
        """What would give it one, in words that follow "set"."""
        raise NotImplementedError

    def __and__(self, other: "Condition") -> "Condition":
        return Several((self, other), all_wanted=True)

    def __or__(self, other: "Condition") -> "Condition":
        return Several((self, other), all_wanted=False)


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


def value_at(config: Any, name: str) -> Any:
    """The value of `section.key`, or a section; a section within another has a dotted name."""
    return reduce(getattr, name.split("."), config)


def replace_at(config: Any, name: str, value: Any) -> Any:
    """The configuration with another value of `section.key`."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: replace_at(getattr(config, first), rest, value) if rest else value})


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)
