"""From a TOML file and command-line overrides to a checked `Config`, or one message with every error in it.

Precedence: command line > TOML file > flavor > default.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swamla_titan.config.rules import contradictions
from swamla_titan.config.sections import Config
from swamla_titan.config.stability import warmup_steps
from swamla_titan.errors import UserError
from swamla_titan.fields import TABLE, expectation, field_types, value_problem
from swamla_titan.model import FLAVORS, ModelConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OVERRIDE = re.compile(r"--[\w-]+\.[\w-]+")
SECTIONS: dict[str, type] = field_types(Config)


class Override(NamedTuple):
    """One `--section.key value` of the command line; the value is still text."""

    section: str
    key: str
    text: str


def load_config(path: str | Path, overrides: Sequence[Override] = ()) -> Config:
    """Read and check a file.

    Raises UserError that names the file and, for each mistake in it or on the command line, the section, the key,
    the value, what is allowed and the nearest valid key.
    """
    path = Path(path)
    errors: list[str] = []
    tables = _read_tables(path, errors)
    for override in overrides:
        _apply_override(override, tables, errors)
    checked = {section: _checked_values(section, table, errors) for section, table in tables.items()}
    # Keys that tie others together are checked as well, with defaults where a value was refused: all errors at once.
    refused = {
        f"{section}.{key}" for section, table in tables.items() for key in table.keys() - checked[section].keys()
    }
    model = _resolve_model(checked.pop("model", {}), refused, errors)
    config = Config(model=model, **{section: SECTIONS[section](**values) for section, values in checked.items()})
    warmup = warmup_steps(config.lr_schedule, config.training.steps)
    config = dataclasses.replace(config, lr_schedule=dataclasses.replace(config.lr_schedule, warmup_steps=warmup))
    for keys, problem in contradictions(config):
        if not refused.intersection(keys):
            section, _, key = keys[0].partition(".")
            errors.append(f"[{section}] {key}: {problem}")
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise UserError(f"{path}: {count} in the configuration", *(f"  {line}" for line in errors))
    return config


def split_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Take `--section.key value` and `--section.key=value` out of a command line.

    Returns the overrides and the remaining arguments. Raises UserError where a value is missing.
    """
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, text = argument.partition("=")
        if not _OVERRIDE.fullmatch(name):
            rest.append(argument)
            continue
        if not equals:
            following = next(remaining, None)
            if following is None or _OVERRIDE.fullmatch(following.partition("=")[0]):
                raise UserError(f"{name}: a value must follow, as in `{name} VALUE` or `{name}=VALUE`")
            text = following
        section, _, key = name[2:].partition(".")
        overrides.append(Override(section, key, text))
    return overrides, rest


def _read_tables(path: Path, errors: list[str]) -> dict[str, dict[str, Any]]:
    """The file's tables; sections that do not exist are reported, with the nearest that does."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `swamla-titan config ls` lists configs") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    tables = {}
    for name, table in content.items():
        if not isinstance(table, dict):
            hint = f"; did you mean it in [{_home_of(name)}]?" if _home_of(name) else ""
            errors.append(f"{name} = {table!r}: every key belongs in a section{hint}")
        elif name not in SECTIONS:
            errors.append(f"[{name}]: unknown section{_nearest(name, SECTIONS)}; sections: {', '.join(SECTIONS)}")
        else:
            tables[name] = dict(table)
    return tables


def _apply_override(override: Override, tables: dict[str, dict[str, Any]], errors: list[str]) -> None:
    """Put a command-line value, converted to the key's type, over the file's."""
    section, key, text = override
    where = f"--{section}.{key} {text}"
    if section not in SECTIONS:
        errors.append(
            f"{where}: unknown section `{section}`{_nearest(section, SECTIONS)}; sections: {', '.join(SECTIONS)}"
        )
        return
    kind = _key_types(section).get(key)
    if kind is None:
        errors.append(f"{where}: {_unknown_key(section, key)}")
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
    parsed = tomllib.loads(f"value = {text}")
    if parsed.keys() != {"value"}:
        raise ValueError
    return parsed["value"]


def _checked_values(section: str, table: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """The table's values with the types of their keys; mistakes are reported."""
    cls, types = SECTIONS[section], _key_types(section)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    checked = {}
    for key, value in table.items():
        if key not in types:
            errors.append(f"[{section}] {key} = {_toml(value)}: {_unknown_key(section, key)}")
        elif key == "flavor" and section == "model":
            if value in FLAVORS:
                checked[key] = value
            else:
                close = _nearest(str(value), FLAVORS)
                errors.append(f"[model] flavor = {_toml(value)}: unknown flavor{close}; flavors: {', '.join(FLAVORS)}")
        elif value_problem(fields[key], types[key], value):
            errors.append(f"[{section}] {key} = {_toml(value)}: {value_problem(fields[key], types[key], value)}")
        else:
            checked[key] = (
                {name: float(each) for name, each in value.items()} if types[key] == TABLE else types[key](value)
            )
    return checked


def _resolve_model(given: dict[str, Any], refused: set[str], errors: list[str]) -> ModelConfig:
    """Flavor, then the keys that were given. The vocabulary is the tokenizer's unless it was given."""
    flavor = given.pop("flavor", None)
    base = dataclasses.asdict(FLAVORS[flavor] if flavor else ModelConfig())
    merged = base | {"vocab_size": 0} | given
    problems = ModelConfig.problems(merged)
    if problems:
        refused.update(f"model.{name}" for name, _ in problems)
        errors += [f"[model] {name}: {problem}" for name, problem in problems]
        return ModelConfig()
    return ModelConfig(**merged)


def _key_types(section: str) -> dict[str, type]:
    """Valid keys of a section and their types; `flavor` belongs to [model] though it is no property of a model."""
    return ({"flavor": str} if section == "model" else {}) | field_types(SECTIONS[section])


def _unknown_key(section: str, key: str) -> str:
    valid = _key_types(section)
    if not valid:
        return "unknown key; this section has no keys yet"
    elsewhere = _home_of(key)
    hint = _nearest(key, valid) or (f"; did you mean it in [{elsewhere}]?" if elsewhere else "")
    return f"unknown key{hint}; keys of [{section}]: {', '.join(valid)}"


def _home_of(key: str) -> str | None:
    """The section that has this key, if there is one."""
    return next((section for section in SECTIONS if key in _key_types(section)), None)


def _nearest(word: str, valid: Any) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _toml(value: Any) -> str:
    """A value as it would stand in a TOML file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for a character that JSON leaves bare.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        # Of a path that is not UTF-8: TOML cannot hold it, but a file that shows it can be read all the same.
        return "".join(f"\\\\u{ord(each):04x}" if "\ud800" <= each <= "\udfff" else each for each in text)
    if isinstance(value, dict):
        pairs = (f"{_toml(name)} = {_toml(each)}" for name, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


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
            lines.append(f"{field.name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)
