"""The sources of a mixture, [[data.sources]]: each as a [data] section of its own, and what is wrong with them."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction

from swamla_titan.conditions import Conflict
from swamla_titan.config.sections import KEYS, Config, Data, DataSource
from swamla_titan.config.toml import shown

_NAME = re.compile(r"[\w-]{1,60}", re.ASCII)
_MOST_DIGITS = 6  # of a weight behind the decimal point, because an order is a table of 10**digits entries
# Keys of a source -> the keys of [data] that they stand for.
_KEYS = {each.name: "name" if each.name == "subset" else each.name for each in fields(DataSource)[2:]}


def data_of_sources(data: Data) -> dict[str, Data]:
    """The [data] section of each source by its name, in the order of names; without [[data.sources]] {"": data}.

    The order of the tables has no influence on a run.
    """
    return {source.name: data_of(data, source) for source in sorted(data.sources, key=_name)} or {"": data}


def data_of(data: Data, source: DataSource) -> Data:
    """[data] as a source has it."""
    own = {_KEYS[key]: getattr(source, key) for key in given_keys(source)}
    return replace(data, **{"sources": (), "path": "", **own})


def given_keys(source: DataSource) -> list[str]:
    """The keys of a source that replace those of [data]."""
    return [key for key in _KEYS if getattr(source, key)]


def weights_of(data: Data) -> dict[str, float]:
    """The weight of each source by its name, in the order of names."""
    return {source.name: source.weight for source in sorted(data.sources, key=_name)} or {"": 1.0}


def exact(weight: float) -> Fraction:
    """The decimal number that a user wrote: 0.1 is a tenth, which no float is."""
    return Fraction(repr(weight))


def weights_problem(weights: Sequence[tuple[str, float]]) -> str | None:
    """What is wrong with the weights of sources, which have these names; None: nothing."""
    for name, weight in weights:
        if 10**_MOST_DIGITS % exact(weight).denominator:
            return f"the weight {weight!r} of {name} has more than {_MOST_DIGITS} digits behind the point: round it"
    total = sum(exact(weight) for _, weight in weights)
    if total == 1:
        return None
    if total == 0:
        return "all weights are 0, so there is nothing to train on"
    parts = _scaled([exact(weight) / total for _, weight in weights])
    scaled = ", ".join(f"{name} = {part}" for (name, _), part in zip(weights, parts))
    return f"the weights add up to {float(total)!r}, not to 1; in the same proportions they would be {scaled}"


def _scaled(parts: list[Fraction]) -> list[float]:
    """Numbers that add up to 1, rounded to a few digits such that they still do."""
    unit = 10 ** (4 if all(part >= Fraction(1, 200) for part in parts if part) else _MOST_DIGITS)
    down = [math.floor(part * unit) for part in parts]
    most_cut = sorted(range(len(parts)), key=lambda index: down[index] - parts[index] * unit)
    for index in most_cut[: unit - sum(down)]:
        down[index] += 1
    return [count / unit for count in down]


def mixture_conflicts(config: Config) -> Iterator[Conflict]:
    """Conflicts between the tables of [[data.sources]], and within them; nothing without such tables."""
    sources = config.data.sources
    if not sources:
        return
    for name, count in Counter(source.name for source in sources).items():
        if not _NAME.fullmatch(name):
            allowed = "letters, digits, _ and -, at most 60"
            yield Conflict(("data.sources",), f"{shown(name)} is no name of a source: it consists of {allowed}")
        if count > 1:
            yield Conflict(("data.sources",), f"{count} sources are called {shown(name)}: names must differ")
    if problem := weights_problem([(source.name, source.weight) for source in sources]):
        yield Conflict(("data.sources",), problem)
    if config.data.path:
        problem = f"{shown(config.data.path)} stands beside [[data.sources]]: give each of these its own path"
        yield Conflict(("data.path", "data.sources"), problem)
    for source in sources:
        for key in given_keys(source):
            if problem := KEYS[f"data.{_KEYS[key]}"].problem(getattr(source, key)):
                yield _within(source, key, f"{shown(getattr(source, key))}: {problem}")
    for key in ("source", "split", "revision", "text_key", "text_separator", "max_document_mib"):
        value = getattr(config.data, key)
        if value != KEYS[f"data.{key}"].default and all(getattr(source, key) for source in sources):
            yield Conflict(
                (f"data.{key}", "data.sources"),
                f"{shown(value)} has no effect, because every [[data.sources]] has its own: leave it out",
            )


def within_source(conflicts: Iterable[Conflict], source: DataSource) -> Iterator[Conflict]:
    """Of the conflicts of a source's [data] section those of its path, and of keys that it gives itself."""
    names = {f"data.{_KEYS[key]}": key for key in {"path", *given_keys(source)}}
    for each in conflicts:
        if each.keys[0] in names:
            yield _within(source, names[each.keys[0]], each.problem)


def _name(source: DataSource) -> str:
    return source.name


def _within(source: DataSource, key: str, problem: str) -> Conflict:
    return Conflict(("data.sources",), f"{source.name}: {key}: {problem}")
