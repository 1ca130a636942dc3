"""Dataclass fields that declare their allowed values and their meaning.

A field's annotation has its type, `Literal[...]` for a choice, and `Limits`; the docstring below the field has its
meaning. The configuration is validated by the first, and `config show` prints both. Nothing here depends on TOML, so
`ModelConfig` uses it as well.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import operator
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from swamla_titan.conditions import Condition

TABLE = dict[str, float]
INTEGERS = tuple[int, ...]
Rule = Callable[[Any, Mapping[str, Any]], "str | None"]
"""(value, all values of the section by name) -> how the value conflicts with the others; None: it does not."""

# Bound of numbers without a natural one, such as factors, because float32 overflows beyond it.
HUGE = 1e30
LONGEST_STRING = 4000  # characters; the longest path that an operating system takes has 4095 bytes
MOST_ENTRIES = 1000  # of a table
MOST_TABLES = 64  # of a list of tables

_BOUNDS = {
    "minimum": (">=", operator.ge),
    "maximum": ("<=", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    TABLE: "a table of numbers",
    INTEGERS: "a list of whole numbers",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a field in its annotation: `Annotated[int, Limits(0, 9)]`; of several the last one counts.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; every number has an upper bound. Each number
    of a table (`dict[str, float]`) or a list (`tuple[int, ...]`) is checked. `needs`: the condition for the setting to
    have an effect; None: always. `rule` compares it with other values. `quantity` is the role of a number, for rules
    that do not know keys by name. `words`: the string has some of these, with commas between. `path`: it names a file
    or folder. `any_text`: it may contain control characters.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    needs: Condition | None = None
    rule: Rule | None = None
    quantity: str | None = None
    words: tuple[str, ...] | None = None
    path: bool | None = None
    any_text: bool | None = None


Factor = Annotated[float, Limits(0, HUGE)]
Share = Annotated[float, Limits(0, below=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Limits):
    """A field with its limits; `kind` is its type: `int`, `float`, `bool`, `str`, TABLE, INTEGERS or a list of tables.

    `default`: MISSING for a key of a table in a list that must be given.
    """

    owner: type
    name: str
    kind: Any
    default: Any
    choices: tuple[Any, ...]

    @property
    def tables(self) -> type | None:
        """The dataclass of each table of a list of tables (`tuple[SomeDataclass, ...]`); None for other settings."""
        entry = get_args(self.kind)[0] if get_origin(self.kind) is tuple else None
        return entry if dataclasses.is_dataclass(entry) else None  # type: ignore[return-value]

    @property
    def doc(self) -> str:
        """Its meaning."""
        return _docs(self.owner)[self.name]

    @property
    def expectation(self) -> str:
        """The allowed values in words: `a whole number >= 1`, `one of "a", "b"`."""
        if self.choices:
            return ("one of " if len(self.choices) > 1 else "only ") + ", ".join(map(json.dumps, self.choices))
        if self.words:
            return f"one or more of {', '.join(self.words)}, separated by commas, or nothing"
        if self.tables:
            return f"a list of tables with the keys {', '.join(settings(self.tables))}"
        bounds = ((sign, getattr(self, name)) for name, (sign, _) in _BOUNDS.items())
        limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        return f"{_WORDS[self.kind]} {limits}".strip()

    def problem(self, value: Any) -> str | None:
        """What was expected, if `value` has another type or is not within the limits; else None.

        A whole number is accepted as a float; a boolean is never a number, and NaN and infinity are never in range. The
        keys of a list's tables are settings of their own, which are not looked at here.
        """
        if self.tables:
            return None if _are_tables(value) else f"expected {self.expectation}, at most {MOST_TABLES} of them"
        kind, each_of = self.kind, [value]
        if kind == TABLE and isinstance(value, dict):
            kind, each_of = float, [*value.values()]
        elif kind == INTEGERS and isinstance(value, (list, tuple)):
            kind, each_of = int, [*value]
        if not all(self._fits(kind, each) for each in each_of):
            return f"expected {self.expectation}{nearest(value, self.choices)}"
        if kind != self.kind and len(each_of) > MOST_ENTRIES:
            return f"expected at most {MOST_ENTRIES} entries, not {len(each_of)}"
        texts = [*value] if self.kind == TABLE else [value] if kind is str else []
        problem = next(filter(None, (_text_problem(each, bool(self.any_text)) for each in texts)), None)
        return problem or self._word_problem(value)

    def _word_problem(self, value: Any) -> str | None:
        words = self.words or ()
        unknown = [word for word in split_words(value) if word not in words] if words else []
        return f"expected {self.expectation}{nearest(unknown[0], words)}" if unknown else None

    def _fits(self, kind: Any, value: Any) -> bool:
        if kind not in (int, float):
            return type(value) is kind and (not self.choices or value in self.choices)
        if type(value) is not kind and not (kind is float and type(value) is int):
            return False
        # Not converted for the comparison, because a whole number may be too large for a float.
        return (type(value) is int or math.isfinite(value)) and all(
            getattr(self, name) is None or compare(value, getattr(self, name)) for name, (_, compare) in _BOUNDS.items()
        )


def split_words(text: str) -> list[str]:
    """The words of a setting that has `words`."""
    return [word.strip() for word in text.split(",") if word.strip()]


def nearest(word: Any, valid: Collection[str]) -> str:
    """ "; did you mean ...?" with the valid word that is most like `word`; empty if none is."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5) if isinstance(word, str) and len(word) < 100 else []
    return f"; did you mean `{close[0]}`?" if close else ""


def settings(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by name; fields that are sections are not among them."""
    return _settings(cls)


@cache
def _settings(cls: type) -> dict[str, Setting]:
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, *extras = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        )
        if dataclasses.is_dataclass(kind):
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        limits = {name: value for extra in extras for name, value in vars(extra).items() if value is not None}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        kind = type(choices[0]) if choices else kind
        found[field.name] = Setting(owner=cls, name=field.name, kind=kind, default=default, choices=choices, **limits)
    return found


def given(table: Any) -> dict[str, Any]:
    """The keys of a table of a list that do not have their defaults."""
    values = {key: (getattr(table, key), setting.default) for key, setting in settings(type(table)).items()}
    return {key: value for key, (value, default) in values.items() if value != default}


def problems(cls: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, what is wrong) for each value of the settings of a dataclass that is of a wrong type or out of range."""
    found = ((name, setting.problem(values[name])) for name, setting in settings(cls).items())
    return [(name, f"{brief(values[name])}: {problem}") for name, problem in found if problem]


def brief(value: object) -> str:
    """A value for a message."""
    try:
        return repr(value)[:100]
    except (RecursionError, ValueError):  # nested too deeply, or of too many digits
        return f"a value of type {type(value).__name__}"


def sections(cls: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> dataclass, of all fields that are dataclasses, recursively and in order."""
    found: dict[str, type] = {}
    for name, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= {prefix + name: kind} | sections(kind, f"{prefix}{name}.")
    return found


@cache
def _docs(cls: type) -> dict[str, str]:
    """The docstrings below a dataclass's fields, inherited ones first."""
    found: dict[str, str] = {}
    for each in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        [defined] = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        for field, doc in itertools.pairwise(getattr(defined, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(doc.value).split())
    return found


def _are_tables(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) <= MOST_TABLES and all(isinstance(each, dict) for each in value)
    )


def _text_problem(text: str, any_text: bool = False) -> str | None:
    """Why a string is not a valid setting, because it could not be written to config.toml or passed to a program."""
    if len(text) > LONGEST_STRING:
        return f"expected at most {LONGEST_STRING} characters, not {len(text)}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "expected text in UTF-8: these bytes are none"
    if not any_text and any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
        return "expected text without control characters such as NUL or a line's end"
    return None
