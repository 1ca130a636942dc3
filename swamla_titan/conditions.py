"""Conditions for keys of a configuration to have an effect, and conflicts between keys; a key is "section.key"."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple


class Missing(NamedTuple):
    """The keys that deprive a setting of its effect, and what would give it one: words that follow "set"."""

    keys: tuple[str, ...]
    remedy: str


class Conflict(NamedTuple):
    """`keys` (as section.key) cannot hold together; the first is the one to report it at.

    `consequence`: what a run does nevertheless, if only an override on the command line caused the conflict; None: that
    is an error too.
    """

    keys: tuple[str, ...]
    problem: str
    consequence: str | None = None


@dataclass(frozen=True)
class Condition:
    """What must hold for a setting to have an effect; `&` and `|` combine conditions.

    `missing`: configuration -> what does not hold; None: it holds. `ignorable`: a setting without effect can be
    replaced by its default; if False, it stays where it is tolerated.
    """

    missing: Callable[[Any], Missing | None]
    ignorable: bool = True

    def __and__(self, other: "Condition") -> "Condition":
        return Condition(lambda config: _joined(" and ", self.missing(config), other.missing(config)))

    def __or__(self, other: "Condition") -> "Condition":
        def missing(config: Any) -> Missing | None:
            one, two = self.missing(config), other.missing(config)
            return one and two and _joined(" or ", one, two)

        return Condition(missing)


def decided_by(keys: tuple[str, ...], holds: Callable[[Any], bool], remedy: str, ignorable: bool = True) -> Condition:
    """A condition by a predicate over a configuration, and the keys that decide it."""
    return Condition(lambda config: None if holds(config) else Missing(keys, remedy), ignorable)


def when(name: str, *values: object) -> Condition:
    """The key `name` has one of these values."""
    return decided_by((name,), lambda config: value_at(config, name) in values, f"{name} = {_listed(values)}")


def when_not(name: str, *values: object) -> Condition:
    """The key `name` has none of these values."""
    remedy = f"{name} other than {_listed(values)}"
    return decided_by((name,), lambda config: value_at(config, name) not in values, remedy)


def when_on(name: str, remedy: str = "") -> Condition:
    """The key `name` is true, not 0, not empty."""
    return decided_by((name,), lambda config: bool(value_at(config, name)), remedy or name)


def when_many(name: str) -> Condition:
    """The key `name` is 2 or more."""
    return decided_by((name,), lambda config: value_at(config, name) > 1, f"{name} to 2 or more")


def when_within(name: str, other: str, ignorable: bool = True, why: str = "") -> Condition:
    """The key `name` is at most the key `other`."""
    remedy = f"{other} to it or more{why}"
    return decided_by((other,), lambda config: value_at(config, name) <= value_at(config, other), remedy, ignorable)


def value_at(config: Any, name: str) -> Any:
    """The value of `section.key`, or a section; a section within another has a dotted name."""
    return reduce(getattr, name.split("."), config)


def replace_at(config: Any, name: str, value: Any) -> Any:
    """The configuration with another value of `section.key`."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: replace_at(getattr(config, first), rest, value) if rest else value})


def _joined(word: str, *parts: Missing | None) -> Missing | None:
    found = [each for each in parts if each]
    keys = tuple(dict.fromkeys(key for each in found for key in each.keys))
    return Missing(keys, word.join(each.remedy for each in found)) if found else None


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)
