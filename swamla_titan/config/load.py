"""From a TOML file and command-line overrides to a checked `Config`, or one message with every error in it.

Precedence: command line > TOML file > flavor > default.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from swamla_titan.config.effects import Given, without, without_effect
from swamla_titan.config.paths import expanded
from swamla_titan.config.rules import contradictions
from swamla_titan.config.sections import Config
from swamla_titan.config.stability import warmup_steps
from swamla_titan.config.toml import name, parse_toml, read_toml, shortened, shown, toml
from swamla_titan.errors import UserError
from swamla_titan.fields import TABLE, expectation, field_types, value_problem
from swamla_titan.model import FLAVORS, ModelConfig

_OVERRIDE = re.compile(r"--[\w-]+\.[\w-]+")
_MOST_ERRORS = 20  # that are listed
_FINEWEB = (  # as in the shipped configurations
    "  [data]",
    '  source = "huggingface"',
    '  path = "HuggingFaceFW/fineweb-edu"',
    '  name = "CC-MAIN-2024-10"',
)
SECTIONS: dict[str, type] = field_types(Config)


class Override(NamedTuple):
    """One `--section.key value` of the command line; the value is still text."""

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
    model = _resolve_model(checked.pop("model", {}), refused, errors)
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
    section, _, key = section_key.partition(".")
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
        section, _, key = option[2:].partition(".")
        overrides.append(Override(section, key, text))
    return overrides, rest


def _read_tables(path: Path, errors: _Errors) -> dict[str, dict[str, Any]]:
    """The file's tables; sections that do not exist are reported, with the nearest that does."""
    tables = {}
    for section, table in read_toml(path).items():
        if not isinstance(table, dict):
            errors.add(partial(_stray, section, table))
        elif section not in SECTIONS:
            errors.add(partial(_unknown_section, f"[{name(section)}]", section))
        else:
            tables[section] = dict(table)
    return tables


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
            value = _inline_table(text) if kind == TABLE else kind(text)
        except ValueError:
            value = text
    tables.setdefault(section, {})[key] = value


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
    if section == "model" and key == "flavor":
        if isinstance(value, str) and value in FLAVORS:
            return value
        raise _Wrong(lambda: f"[model] flavor = {shown(value)}: {_unknown_flavor(value)}")
    field, kind = _fields(section)[key], types[key]
    problem = value_problem(field, kind, value)
    if problem is None and field.metadata["path"]:
        try:
            return expanded(value)
        except ValueError as error:
            problem = str(error)
    if problem:
        raise _Wrong(lambda: f"[{section}] {key} = {shown(value)}: {problem}")
    return {entry: float(each) for entry, each in value.items()} if kind == TABLE else kind(value)


def _unknown_flavor(value: Any) -> str:
    close = _nearest(value, FLAVORS) if isinstance(value, str) else ""
    return f"unknown flavor{close}; flavors: {', '.join(FLAVORS)}"


def _resolve_model(given: dict[str, Any], refused: set[str], errors: _Errors) -> ModelConfig:
    """Flavor, then the keys that were given. The vocabulary is the tokenizer's unless it was given."""
    flavor = given.pop("flavor", None)
    base = dataclasses.asdict(FLAVORS[flavor] if flavor else ModelConfig())
    merged = base | {"vocab_size": 0} | given
    problems = ModelConfig.problems(merged)
    if problems:
        refused.update(f"model.{key}" for key, _ in problems)
        for key, problem in problems:
            errors.add(partial(_at, f"model.{key}", problem))
        return ModelConfig()
    return ModelConfig(**merged)


@cache
def _fields(section: str) -> dict[str, "dataclasses.Field[Any]"]:
    return {field.name: field for field in dataclasses.fields(SECTIONS[section])}


@cache
def _key_types(section: str) -> dict[str, type]:
    """Valid keys of a section and their types; `flavor` belongs to [model] though it is no property of a model."""
    return ({"flavor": str} if section == "model" else {}) | field_types(SECTIONS[section])


def _unknown_key(where: str, section: str, key: str) -> str:
    valid = _key_types(section)
    elsewhere = _home_of(key)
    hint = _nearest(key, valid) or (f"; did you mean it in [{elsewhere}]?" if elsewhere else "")
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
        values = getattr(config, section)
        kinds = field_types(type(values))
        lines.append(f"[{section}]")
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if comments:
                allowed = expectation(field, kinds[field.name])
                lines.append(f"# {field.metadata['doc']} ({allowed})")
            lines.append(f"{field.name} = {toml(value)}")
        lines.append("")
    return "\n".join(lines)
