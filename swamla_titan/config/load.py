"""From a TOML file and command-line overrides to a checked `Config`, or one message with every error in it.

Precedence: command line > TOML file > flavor > default.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from swamla_titan.conditions import value_at
from swamla_titan.config.effects import Given, without, without_effect
from swamla_titan.config.paths import expanded
from swamla_titan.config.rules import contradictions
from swamla_titan.config.sections import Config
from swamla_titan.config.stability import warmup_steps
from swamla_titan.config.toml import name, parse_toml, read_toml, shortened, shown, toml
from swamla_titan.errors import UserError
from swamla_titan.fields import INTEGERS, TABLE, expectation, field_types, sections, settings, value_problem
from swamla_titan.model import FLAVORS, ModelConfig

_OVERRIDE = re.compile(r"--[\w-]+(\.[\w-]+)+")
_MOST_ERRORS = 20  # that are listed
_FINEWEB = (  # as in the shipped configurations
    "  [data]",
    '  source = "huggingface"',
    '  path = "HuggingFaceFW/fineweb-edu"',
    '  name = "CC-MAIN-2024-10"',
)
SECTIONS: dict[str, type] = sections(Config)
# Section -> the key by which it takes ready-made values, and those by name. The key is no part of a Config.
READY_MADE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "model": ("flavor", FLAVORS),
    **{name: ("preset", kind.presets) for name, kind in SECTIONS.items() if hasattr(kind, "presets")},
}


class Override(NamedTuple):
    """One `--section.key value` of the command line; the value is still text. The section may have a dotted name."""

    section: str
    key: str
    text: str


class _Errors:
    """What is wrong; the first of it in words."""

    def __init__(self) -> None:
        self.count = 0
        self.lines: list[str] = []

    def add(self, words: Callable[[], str], *more: str) -> None:
        """`words` are asked for as long as they will be shown: to look for the nearest key takes time. `more` lines
        follow."""
        self.count += 1
        if self.count <= _MOST_ERRORS:
            self.lines += [words(), *more]

    def raise_if_any(self, path: Path) -> None:
        if not self.count:
            return
        count = "1 error" if self.count == 1 else f"{self.count} errors"
        more = [f"... and {self.count - _MOST_ERRORS} more"] if self.count > _MOST_ERRORS else []
        raise UserError(f"{path}: {count} in the configuration", *(f"  {line}" for line in self.lines + more))


class _Wrong(Exception):
    """A value that is refused, and a function that says why."""

    def __init__(self, words: Callable[[], str]) -> None:
        self.words = words


def load_config(
    path: str | Path, overrides: Sequence[Override] = (), warn: Callable[[str], None] = lambda line: None
) -> Config:
    """Read and check a file.

    Raises UserError that names the file and, for each mistake in it or on the command line, the section, the key,
    the value, what is allowed and the nearest valid key. `warn` is called with what is merely without effect, because
    of an override or in a file that states nearly every key.
    """
    path = Path(path)
    errors = _Errors()
    tables = _read_tables(path, errors)
    in_file = {f"{section}.{key}" for section, table in tables.items() for key in table}
    in_overrides = {f"{override.section}.{override.key}" for override in overrides}
    nothing_to_read = "data" not in tables and not in_overrides & {"data.source", "data.path"}
    for override in overrides:
        _apply_override(override, tables, errors)
    checked = {section: _checked_values(section, table, errors) for section, table in tables.items()}
    # Keys that tie others together are checked as well, with defaults where a value was refused: all errors at once.
    refused = {
        f"{section}.{key}" for section, table in tables.items() for key in table.keys() - checked[section].keys()
    }
    flavor = checked.get("model", {}).get("flavor")
    of_model = [section for section in checked if section.partition(".")[0] == "model"]
    model = _resolve_model({section: checked.pop(section) for section in of_model}, refused, errors)
    config = Config(model=model, **{section: SECTIONS[section](**values) for section, values in checked.items()})
    warmup = warmup_steps(config.lr_schedule, config.training.steps)
    config = dataclasses.replace(config, lr_schedule=dataclasses.replace(config.lr_schedule, warmup_steps=warmup))
    given = Given(in_file, in_overrides, flavor)
    shortcomings = []
    for keys, problem, consequence in contradictions(config):
        if keys[0] == "data.path" and nothing_to_read:
            errors.add(lambda: "[data] is missing: what is to be read? For FineWeb-Edu, streamed, paste", *_FINEWEB)
        elif refused.intersection(keys):
            continue
        elif consequence and given.is_tolerable(keys[0], keys[1:]):
            shortcomings.append(_at(keys[0], f"{problem}: {consequence}"))
        else:
            errors.add(partial(_at, keys[0], problem))
    idle = [finding for finding in without_effect(config, given) if not refused.intersection(finding.keys)]
    for finding in idle:
        if not finding.is_tolerable:
            errors.add(partial(_at, finding.keys[0], finding.problem))
    errors.raise_if_any(path)
    for line in shortcomings:
        warn(line)
    for finding in idle:
        warn(_at(finding.keys[0], finding.problem))
        config = without(config, finding) if finding.is_ignorable else config
    return config


def _at(section_key: str, problem: str) -> str:
    section, _, key = section_key.rpartition(".")
    return f"[{section}] {key}: {problem}"


def split_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Take `--section.key value` and `--section.key=value` out of a command line.

    Returns the overrides and the remaining arguments. Raises UserError where a value is missing.
    """
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, text = argument.partition("=")
        if not _OVERRIDE.fullmatch(option):
            rest.append(argument)
            continue
        if not equals:
            following = next(remaining, None)
            if following is None or _OVERRIDE.fullmatch(following.partition("=")[0]):
                option = name(option)
                raise UserError(f"{option}: a value must follow, as in `{option} VALUE` or `{option}=VALUE`")
            text = following
        section, _, key = option[2:].rpartition(".")
        overrides.append(Override(section, key, text))
    return overrides, rest


def _read_tables(path: Path, errors: _Errors) -> dict[str, dict[str, Any]]:
    """The file's tables by their sections; those that do not exist are reported, with the nearest that does."""
    tables: dict[str, dict[str, Any]] = {}
    for section, table in read_toml(path).items():
        if isinstance(table, dict):
            _add_table(section, table, tables, errors)
        else:
            errors.add(partial(_stray, section, table))
    return tables


def _add_table(section: str, table: dict[str, Any], tables: dict[str, dict[str, Any]], errors: _Errors) -> None:
    """Add a table, and those within it that are sections or may be meant as such."""
    if section not in SECTIONS:
        errors.add(partial(_unknown_section, f"[{name(section)}]", section))
        return
    keys = _key_types(section)
    has_sections = any(each.startswith(f"{section}.") for each in SECTIONS)
    inner = {key for key, value in table.items() if has_sections and isinstance(value, dict) and key not in keys}
    tables[section] = {key: value for key, value in table.items() if key not in inner}
    for key in inner:
        _add_table(f"{section}.{key}", table[key], tables, errors)


def _stray(key: str, value: Any) -> str:
    home = _home_of(key)
    hint = f"; did you mean it in [{home}]?" if home else ""
    return f"{name(key)} = {shown(value)}: every key belongs in a section{hint}"


def _unknown_section(where: str, section: str) -> str:
    return f"{where}: unknown section{_nearest(section, SECTIONS)}; sections: {', '.join(SECTIONS)}"


def _apply_override(override: Override, tables: dict[str, dict[str, Any]], errors: _Errors) -> None:
    """Put a command-line value, converted to the key's type, over the file's."""
    section, key, text = override
    where = shortened(f"--{section}.{key} {text}")
    where = where if where.isprintable() else shown(where)
    if section not in SECTIONS:
        errors.add(partial(_unknown_section, where, section))
        return
    kind = _key_types(section).get(key)
    if kind is None:
        errors.add(partial(_unknown_key, where, section, key))
        return
    value: Any = text
    if kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif kind is not str:
        try:
            value = _integers(text) if kind == INTEGERS else _inline_table(text) if kind == TABLE else kind(text)
        except ValueError:
            value = text
    tables.setdefault(section, {})[key] = value


def _integers(text: str) -> Any:
    """`2,6`, or a list as in a file; ValueError for anything else."""
    return _inline_table(text) if text.startswith("[") else [int(part) for part in text.split(",") if text.strip()]


def _inline_table(text: str) -> Any:
    """ValueError if it is anything but one value."""
    parsed = parse_toml(f"value = {text}")
    if parsed.keys() != {"value"}:
        raise ValueError
    return parsed["value"]


def _checked_values(section: str, table: dict[str, Any], errors: _Errors) -> dict[str, Any]:
    """The table's values with the types of their keys; mistakes are reported."""
    checked = {}
    for key, value in table.items():
        try:
            checked[key] = _checked_value(section, key, value)
        except _Wrong as wrong:
            errors.add(wrong.words)
    return checked


def _checked_value(section: str, key: str, value: Any) -> Any:
    """The value with the type of its key; raises _Wrong."""
    types = _key_types(section)
    if key not in types:
        raise _Wrong(lambda: _unknown_key(f"[{section}] {name(key)} = {shown(value)}", section, key))
    if section in READY_MADE and key == READY_MADE[section][0]:
        known = READY_MADE[section][1]
        if isinstance(value, str) and value in known:
            return value
        raise _Wrong(lambda: f"[{section}] {key} = {shown(value)}: {_unknown_name(value, key, known)}")
    field, kind = _fields(section)[key], types[key]
    problem = value_problem(field, kind, value)
    if problem is None and field.metadata["path"]:
        try:
            return expanded(value)
        except ValueError as error:
            problem = str(error)
    if problem:
        raise _Wrong(lambda: f"[{section}] {key} = {shown(value)}: {problem}")
    if kind == INTEGERS:
        return tuple(value)
    return {entry: float(each) for entry, each in value.items()} if kind == TABLE else kind(value)


def _unknown_name(value: Any, key: str, known: Mapping[str, Any]) -> str:
    close = _nearest(value, known) if isinstance(value, str) else ""
    return f"unknown {key}{close}; {key}s: {', '.join(known)}"


def _resolve_model(given: dict[str, dict[str, Any]], refused: set[str], errors: _Errors) -> ModelConfig:
    """The flavor or preset of each section, then the keys that were given, by their sections.

    The vocabulary is the tokenizer's unless it was given.
    """
    merged = dataclasses.asdict(ModelConfig()) | {"vocab_size": 0}
    for section in sorted(given):  # [model] before what is within it
        values, (selector, known) = given[section], READY_MADE[section]
        chosen = values.pop(selector, None)
        ready = dataclasses.asdict(known[chosen]) | ({"vocab_size": 0} if section == "model" else {}) if chosen else {}
        _, _, inner = section.partition(".")
        if inner:
            merged[inner] = merged[inner] | ready | values
        else:
            merged |= ready | values
    problems = ModelConfig.problems(merged)
    if problems:
        refused.update(f"model.{key}" for key, _ in problems)
        for key, problem in problems:
            errors.add(partial(_at, f"model.{key}", problem))
        return ModelConfig()
    return ModelConfig(**merged)


@cache
def _fields(section: str) -> dict[str, "dataclasses.Field[Any]"]:
    return settings(SECTIONS[section])


@cache
def _key_types(section: str) -> dict[str, type]:
    """Valid keys of a section and their types; `flavor` belongs to [model] though it is no property of a model."""
    return ({READY_MADE[section][0]: str} if section in READY_MADE else {}) | field_types(SECTIONS[section])


def _unknown_key(where: str, section: str, key: str) -> str:
    valid = _key_types(section)
    elsewhere = _home_of(key)
    hint = _nearest(key, valid) or (f"; did you mean it in [{elsewhere}]?" if elsewhere else "")
    if f"{section}.{key}" in SECTIONS:
        hint = f"; [{section}.{key}] is a section, with keys of its own"
    return f"{where}: unknown key{hint}; keys of [{section}]: {', '.join(valid)}"


def _home_of(key: str) -> str | None:
    """The section that has this key, if there is one."""
    return next((section for section in SECTIONS if key in _key_types(section)), None)


def _nearest(word: str, valid: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5) if len(word) < 100 else []
    return f"; did you mean `{close[0]}`?" if close else ""


def to_toml(config: Config, comments: bool = False) -> str:
    """The whole configuration as a TOML file that loads to the same `Config`."""
    lines = []
    for section in SECTIONS:
        values = value_at(config, section)
        kinds = field_types(type(values))
        lines.append(f"[{section}]")
        for field in settings(type(values)).values():
            value = getattr(values, field.name)
            if comments:
                allowed = expectation(field, kinds[field.name])
                lines.append(f"# {field.metadata['doc']} ({allowed})")
            lines.append(f"{field.name} = {toml(value)}")
        lines.append("")
    return "\n".join(lines)
