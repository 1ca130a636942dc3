"""Loads a `Config` from a TOML file and command-line overrides, or raises one error that lists all mistakes.

Precedence: command line > TOML file > flavor > default.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from swamla_titan.conditions import value_at
from swamla_titan.config.effects import NEEDS, without, without_effect
from swamla_titan.config.rules import conflicts
from swamla_titan.config.sections import KEYS, RENAMED, SECTIONS, Config
from swamla_titan.config.shipped import find_config, shipped_configs
from swamla_titan.config.stability import warmup_steps
from swamla_titan.config.toml import name, parse_toml, read_toml, shortened, shown, toml
from swamla_titan.errors import UserError
from swamla_titan.fields import INTEGERS, TABLE, Setting, given, nearest, settings
from swamla_titan.model import FLAVORS, ModelConfig

_OVERRIDE = re.compile(r"--[\w-]+(\.[\w-]+)+")
_MOST_ERRORS = 20  # that are listed
_LONGEST_NAME = 255  # bytes, on every usual file system
_DATASET = re.compile(r"[\w.-]+/[\w.-]+")  # name of a dataset of the Hub
_OF_SHARDS = ("manifest.json", "documents.index")
_VARIABLE = re.compile(r"(?:^|/)\$(?:\w+|\{\w+\})")
_FINEWEB = (  # as in the shipped configurations
    "[data] is missing: what is to be read? For FineWeb-Edu, streamed, paste",
    "  [data]",
    '  source = "huggingface"',
    '  path = "HuggingFaceFW/fineweb-edu"',
    '  name = "CC-MAIN-2024-10"',
)
# Section -> the key that selects ready-made values, and these by name. The key is not part of a Config.
READY_MADE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "model": ("flavor", FLAVORS),
    **{name: ("preset", kind.presets) for name, kind in SECTIONS.items() if hasattr(kind, "presets")},
}
Tables = dict[str, dict[str, Any]]
Errors = list[tuple[Any, ...]]
"""For each error a function that words it, and its arguments; called only for errors that are listed, because the
search for the nearest key takes time."""


class Override(NamedTuple):
    """One `--section.key value` of the command line; the value is still text. The section may have a dotted name."""

    section: str
    key: str
    text: str


def load_config(
    path: str | Path,
    overrides: Sequence[Override] = (),
    warn: Callable[[str], None] = lambda line: None,
    content: Tables | None = None,
) -> Config:
    """Load and validate a file.

    Raises UserError that names the file and, for each mistake in it or on the command line, the section, the key, the
    value, what is allowed and the nearest valid key. `warn` is called with old names of keys, and with keys without
    effect that are tolerated: those that an override deprives of their effect, and those of a file that states nearly
    every key, as a run's config.toml does. `content`: tables in place of the file's; `path` is then what messages name.
    """
    path, errors = Path(path), Errors()
    tables = _read_tables(path, errors) if content is None else content
    overrides = _with_new_names(tables, overrides, errors, warn)
    in_file = {f"{section}.{key}" for section, table in tables.items() for key in table}
    in_overrides = {_list_of(each.section) or f"{each.section}.{each.key}" for each in overrides}
    has_data = "data" in tables or in_overrides & {"data.source", "data.path"}
    for override in overrides:
        _apply_override(override, tables, errors)
    checked = {section: _checked_values(section, table, errors) for section, table in tables.items()}
    # Rules between keys are checked as well, with defaults in place of invalid values, to report all errors at once.
    refused = {f"{section}.{key}" for section in tables for key in tables[section].keys() - checked[section].keys()}
    flavor = checked.get("model", {}).get("flavor")
    config = _built(checked, refused, errors)
    idle = [each for each in without_effect(config, flavor) if each.keys[0] in in_file | in_overrides]
    states_all, tolerated = 2 * len(in_file) > len(KEYS), []
    for each in (*conflicts(config), *idle):
        first, *others = each.keys
        is_tolerable = first not in in_overrides and (states_all or not in_overrides.isdisjoint(others))
        if first == "data.path" and not has_data:
            errors.append(("\n".join, _FINEWEB))
        elif refused.intersection(each.keys):
            continue
        elif is_tolerable and (each.consequence or each in idle):
            tolerated.append(each)
        else:
            errors.append((_at, first, each.problem))
    _raise_if_any(errors, path)
    for each in tolerated:
        warn(_at(each.keys[0], ": ".join(filter(None, (each.problem, each.consequence)))))
        # Keys of the model stay, because a resumed run is compared with its checkpoint, which may have them too.
        if (
            each in idle
            and each.keys[0] in NEEDS
            and NEEDS[each.keys[0]].ignorable
            and not each.keys[0].startswith("model.")
        ):
            config = without(config, each.keys[0])
    return config


def load_source(
    source: str, overrides: Sequence[Override] = (), warn: Callable[[str], None] = lambda line: None
) -> Config:
    """The configuration of a command on data: `source` is a configuration, or what data.path names in the default one.

    A name that is no path is a shipped configuration, "builtin", or a dataset of the Hub. Raises UserError as
    `load_config` does.
    """
    path = os.path.expanduser(source)
    exists = os.path.lexists(path)
    if source.endswith(".toml") or (source in shipped_configs() and not exists):
        return load_config(find_config(source), overrides, warn)
    kind = "local"
    if not exists:
        kind = source if source == "builtin" else "huggingface" if _DATASET.fullmatch(source) else kind
    elif all(os.path.isfile(os.path.join(path, name)) for name in _OF_SHARDS):
        kind = "shards"
    data = {"source": kind} | ({} if kind == "builtin" else {"path": source})
    return load_config(source, overrides, warn, {"data": data})


def _raise_if_any(errors: Errors, path: Path) -> None:
    if not errors:
        return
    lines = [line for words, *arguments in errors[:_MOST_ERRORS] for line in words(*arguments).split("\n")]
    lines += [f"... and {len(errors) - _MOST_ERRORS} more"] if len(errors) > _MOST_ERRORS else []
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    raise UserError(f"{path}: {count} in the configuration", *(f"  {line}" for line in lines))


def _at(section_key: str, problem: str) -> str:
    section, _, key = section_key.rpartition(".")
    return f"[{section}] {key}: {problem}"


def split_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split `--section.key value` and `--section.key=value` from a command line.

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


def _read_tables(path: Path, errors: Errors) -> Tables:
    """The file's tables by section; an unknown section is an error that names the nearest known one."""
    tables: Tables = {}
    for section, table in read_toml(path).items():
        if isinstance(table, dict):
            _add_table(section, table, tables, errors)
        else:
            errors.append((_stray, section, table))
    return tables


def _add_table(section: str, table: dict[str, Any], tables: Tables, errors: Errors) -> None:
    """Add a table, and tables within it that are sections or may be meant as sections."""
    if section not in SECTIONS:
        errors.append((_unknown_section, f"[{name(section)}]", section))
        return
    has_sections = any(each.startswith(f"{section}.") for each in SECTIONS)
    inner = {
        key for key, value in table.items() if has_sections and isinstance(value, dict) and key not in _keys(section)
    }
    tables[section] = {key: value for key, value in table.items() if key not in inner}
    for key in inner:
        _add_table(f"{section}.{key}", table[key], tables, errors)


def _with_new_names(
    tables: Tables, overrides: Sequence[Override], errors: Errors, warn: Callable[[str], None]
) -> list[Override]:
    """Give keys in `tables` that were RENAMED their new names; returns the overrides with theirs."""
    for old, new in RENAMED.items():
        (section, _, key), (new_section, _, new_key) = old.rpartition("."), new.rpartition(".")
        if key not in tables.get(section, {}):
            continue
        value, notice = tables[section].pop(key), f"[{section}] {key} is now called {new}"
        if new_key in tables.setdefault(new_section, {}):
            errors.append((str, f"{notice}, which is given as well: leave {key} out"))
            continue
        warn(f"{notice}; the old name will be refused by a later version")
        tables[new_section][new_key] = value
    return [_with_new_name(override, warn) for override in overrides]


def _with_new_name(override: Override, warn: Callable[[str], None]) -> Override:
    old = f"{override.section}.{override.key}"
    if old not in RENAMED:
        return override
    warn(f"--{old} is now called --{RENAMED[old]}; the old name will be refused by a later version")
    section, _, key = RENAMED[old].rpartition(".")
    return Override(section, key, override.text)


def _apply_override(override: Override, tables: Tables, errors: Errors) -> None:
    """Replace the file's value by a command-line value, converted to the key's type."""
    section, key, text = override
    where = shortened(f"--{section}.{key} {text}")
    where = where if where.isprintable() else shown(where)
    if list_name := _list_of(section):
        _apply_to_table(override, list_name, tables, where, errors)
    elif section not in SECTIONS:
        errors.append((_unknown_section, where, section))
    elif key not in _keys(section):
        errors.append((_unknown_key, where, section, key))
    else:
        tables.setdefault(section, {})[key] = _parsed(text, _keys(section)[key])


def _list_of(section: str) -> str | None:
    """The list of tables that "data.sources.NAME" means a table of; None for other names."""
    list_name, _, _ = section.rpartition(".")
    return list_name if list_name in KEYS and KEYS[list_name].tables else None


def _apply_to_table(override: Override, list_name: str, tables: Tables, where: str, errors: Errors) -> None:
    """Replace a value in a table of a list, which is meant by its name or by its number from 1."""
    (section, key, text), (of_list, _, list_key) = override, list_name.rpartition(".")
    given = tables.get(of_list, {}).get(list_key, [])
    entries = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    by_name = {str(each.get("name", number)): each for number, each in enumerate(entries, 1)}
    wanted = section.rpartition(".")[2]
    if wanted not in by_name:
        close = nearest(wanted, by_name)
        errors.append((str, f"{where}: no such table{close}; [[{list_name}]]: {', '.join(by_name) or 'none'}"))
    elif key not in _keys(list_name):
        errors.append((_unknown_key, where, list_name, key))
    else:
        by_name[wanted][key] = _parsed(text, _keys(list_name)[key])


def _parsed(text: str, kind: Any) -> Any:
    """The text as a value of this type, or unchanged if it is not one."""
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text, text)
        if kind == INTEGERS and not text.startswith("["):  # 2,6
            return [int(part) for part in text.split(",") if text.strip()]
        if kind in (int, float, str):
            return kind(text)
        parsed = parse_toml(f"value = {text}")
        return parsed["value"] if parsed.keys() == {"value"} else text
    except ValueError:
        return text


def _checked_values(section: str, table: dict[str, Any], errors: Errors, place: str = "") -> dict[str, Any]:
    """The table's values, converted to the types of their keys; errors are added. `place`: its heading, [section]."""
    checked = {}
    selector, known = READY_MADE.get(section, ("", {}))
    for key, value in table.items():
        where = f"{place or f'[{section}]'} {name(key)} = {shown(value)}"
        if key not in _keys(section):
            errors.append((_unknown_key, where, section, key))
        elif key == selector and not (isinstance(value, str) and value in known):
            errors.append((_unknown_name, where, value, key, known))
        else:
            try:
                if key == selector:
                    checked[key] = value
                else:
                    setting = _settings(section)[key]
                    checked[key] = _converted(setting, value)
                    if setting.tables:
                        checked[key] = _checked_tables(f"{section}.{key}", setting.tables, value, errors)
            except ValueError as problem:
                errors.append((str, f"{where}: {problem}"))
    return {key: value for key, value in checked.items() if value is not None}


def _checked_tables(name: str, kind: type, tables: list[dict[str, Any]], errors: Errors) -> tuple[Any, ...] | None:
    """The tables of a list, such as [[training.stages]], as dataclasses; None if one of them is wrong."""
    before, built = len(errors), []
    for number, table in enumerate(tables, 1):
        place = f"[[{name}]] number {number}:"
        values = _checked_values(name, table, errors, place)
        for key, setting in settings(kind).items():
            if setting.default is dataclasses.MISSING and key not in table:
                errors.append((str, f"{place} {key} is missing: {setting.doc}"))
        if len(errors) == before:
            built.append(kind(**values))
    return None if len(errors) > before else tuple(built)


def _converted(setting: Setting, value: Any) -> Any:
    """The value with the type of its key; ValueError that says what was expected."""
    if problem := setting.problem(value):
        raise ValueError(problem)
    if setting.kind == INTEGERS:
        return tuple(value)
    if setting.kind == TABLE:
        return {entry: float(each) for entry, each in value.items()}
    return _expanded(value) if setting.path else setting.kind(value)


def _expanded(path: str) -> str:
    """The path with `~` and `~user` expanded; ValueError if it cannot name a file. Variables are not expanded."""
    if found := _VARIABLE.search(path):
        variable = found[0].lstrip("/")
        raise ValueError(
            f"variables are not replaced here: write out {variable}, or let your shell do it: --section.key"
        )
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"expected names of at most {_LONGEST_NAME} bytes between the slashes")
    if not path.startswith("~"):
        return path
    found_home = os.path.expanduser(path)
    if found_home == path:
        raise ValueError(f"there is no home folder of {path.partition('/')[0]}: write ./{path} if it is a name here")
    return found_home


def _built(checked: Tables, refused: set[str], errors: Errors) -> Config:
    """Build the configuration of validated values; with the default model if the model's values conflict.

    Sections of the model begin with a flavor or preset, which given keys override. The vocabulary is the tokenizer's
    unless it is given.
    """
    merged: dict[str, Any] = dataclasses.asdict(ModelConfig()) | {"vocab_size": 0}
    for section in sorted(each for each in checked if each.partition(".")[0] == "model"):  # [model] first
        values, (selector, known) = checked.pop(section), READY_MADE.get(section, ("", {}))
        chosen = values.pop(selector, None)
        ready = dataclasses.asdict(known[chosen]) | ({"vocab_size": 0} if section == "model" else {}) if chosen else {}
        _, _, inner = section.partition(".")
        if inner:
            merged[inner] = merged[inner] | ready | values
        else:
            merged |= ready | values
    problems = ModelConfig.problems(merged)
    for key, problem in problems:
        refused.add(f"model.{key}")
        errors.append((_at, f"model.{key}", problem))
    model = ModelConfig() if problems else ModelConfig(**merged)
    config = Config(model=model, **{section: SECTIONS[section](**values) for section, values in checked.items()})
    warmup = warmup_steps(config.lr_schedule, config.training.steps)
    return dataclasses.replace(config, lr_schedule=dataclasses.replace(config.lr_schedule, warmup_steps=warmup))


@cache
def _keys(section: str) -> dict[str, Any]:
    """Valid keys of a section and their types, including its selector, such as `flavor` of [model]."""
    selector = {READY_MADE[section][0]: str} if section in READY_MADE else {}
    return selector | {key: setting.kind for key, setting in _settings(section).items()}


def _settings(section: str) -> dict[str, Setting]:
    """The settings of a section, or of a table of the list of tables that has this name."""
    kind = SECTIONS[section] if section in SECTIONS else KEYS[section].tables
    assert kind is not None
    return settings(kind)


def _stray(key: str, value: Any) -> str:
    home = _home_of(key)
    hint = f"; did you mean it in [{home}]?" if home else ""
    return f"{name(key)} = {shown(value)}: every key belongs in a section{hint}"


def _unknown_section(where: str, section: str) -> str:
    return f"{where}: unknown section{nearest(section, SECTIONS)}; sections: {', '.join(SECTIONS)}"


def _unknown_name(where: str, value: Any, key: str, known: Mapping[str, Any]) -> str:
    return f"{where}: unknown {key}{nearest(value, known)}; {key}s: {', '.join(known)}"


def _unknown_key(where: str, section: str, key: str) -> str:
    elsewhere = _home_of(key)
    hint = nearest(key, _keys(section)) or (f"; did you mean it in [{elsewhere}]?" if elsewhere else "")
    if f"{section}.{key}" in SECTIONS:
        hint = f"; [{section}.{key}] is a section, with keys of its own"
    heading = f"[{section}]" if section in SECTIONS else f"[[{section}]]"
    return f"{where}: unknown key{hint}; keys of {heading}: {', '.join(_keys(section))}"


def _home_of(key: str) -> str | None:
    """The section that has this key, if there is one."""
    return next((section for section in SECTIONS if key in _keys(section)), None)


def to_toml(config: Config, comments: bool = False) -> str:
    """The whole configuration as a TOML file that loads to the same `Config`."""
    lines = []
    for section, cls in SECTIONS.items():
        lines.append(f"[{section}]")
        if comments and section in READY_MADE:
            selector, known = READY_MADE[section]
            names = ", ".join(map(toml, known))
            lines.append(f"# {selector}: a name of ready-made values, which the keys below override. (one of {names})")
        for key, setting in settings(cls).items():
            lines += [f"# {setting.doc} ({setting.expectation})"] if comments else []
            value = value_at(config, f"{section}.{key}")
            if setting.tables:
                lines += _explained(setting.tables) if comments else []
            if setting.tables and value:  # each on a line
                tables = [
                    "{" + ", ".join(f"{of} = {toml(each)}" for of, each in given(table).items()) + "},"
                    for table in value
                ]
                lines += [f"{key} = [", *(f"  {table}" for table in tables), "]"]
            else:
                lines.append(f"{key} = {toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _explained(kind: type) -> list[str]:
    """A comment for each key of a list's tables."""
    return [f"#   {key}: {setting.doc} ({setting.expectation})" for key, setting in settings(kind).items()]
