"""One-line declarations of documented, range-checked dataclass fields.

`key()` keeps a setting's default, meaning and allowed values in one place: the config checker refuses by it, and
`config show` and `--help` print it. It knows nothing of TOML, so the model's own `ModelConfig` uses it as well.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from swamla_titan.conditions import Condition

TABLE = dict[str, float]
INTEGERS = tuple[int, ...]
Rule = Callable[[Any, Mapping[str, Any]], "str | None"]
"""(value, all values of the section by name) -> what is wrong with the value beside the others, None: nothing."""

# For a number without a natural bound, such as a factor: beyond it float32 overflows, and nobody means it.
HUGE = 1e30
LONGEST_STRING = 4000  # characters; the longest path that an operating system takes has 4095 bytes
MOST_ENTRIES = 1000  # of a table


def key(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    needs: Condition | None = None,
    rule: Rule | None = None,
    quantity: str | None = None,
    path: bool = False,
    any_text: bool = False,
) -> Any:
    """A dataclass field with its meaning and its allowed values.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; every number has an upper bound. `choices`
    lists every allowed value. The numbers of a table (`dict[str, float]`) or a list (`tuple[int, ...]`) are each
    checked like a number. `needs` says when the setting has an effect, None: always. `rule` holds it against other
    values. `quantity` says what a number is, for rules that know no key by its name. `path`: a string that names a file
    or folder. `any_text`: a string that may hold control characters.
    """
    bounds = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata: dict[str, Any] = {"doc": doc, "needs": needs, "path": path, "any_text": any_text}
    metadata |= {"rule": rule, "quantity": quantity}
    metadata |= {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_types(cls: type) -> dict[str, type]:
    """Name -> type (`int`, `float`, `bool`, `str`, TABLE or INTEGERS) of the settings of a dataclass."""
    return {name: kind for name, kind in _types(cls).items() if not dataclasses.is_dataclass(kind)}


def sections(cls: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> dataclass of every field of a dataclass that is one itself, and of theirs, in order."""
    found: dict[str, type] = {}
    for name, kind in _types(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= {prefix + name: kind} | sections(kind, f"{prefix}{name}.")
    return found


def settings(cls: type) -> "dict[str, dataclasses.Field[Any]]":
    """Name -> field of the settings of a dataclass; its sections are not among them."""
    types = field_types(cls)
    return {field.name: field for field in dataclasses.fields(cls) if field.name in types}


def _types(cls: type) -> dict[str, type]:
    hints = get_type_hints(cls)
    return {field.name: _value_type(hints[field.name]) for field in dataclasses.fields(cls)}


def _value_type(hint: Any) -> type:
    kind: type = type(get_args(hint)[0]) if get_origin(hint) is Literal else hint
    return kind


def expectation(field: "dataclasses.Field[Any]", kind: type) -> str:
    """What a value of this field must be, in words: `a whole number >= 1`, `one of "a", "b"`."""
    limits = field.metadata
    if "choices" in limits:
        values = limits["choices"]
        return ("one of " if len(values) > 1 else "only ") + ", ".join(
            f'"{v}"' if kind is str else str(v) for v in values
        )
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        TABLE: "a table of numbers",
        INTEGERS: "a list of whole numbers",
    }[kind]
    signs = {"minimum": ">=", "maximum": "<=", "above": ">", "below": "<"}
    parts = [f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits]
    return " ".join([words, " and ".join(parts)]).strip()


def value_problem(field: "dataclasses.Field[Any]", kind: type, value: Any) -> str | None:
    """None if `value` has the field's type and range, else what was expected.

    A whole number is accepted where a number is asked for; a boolean is never a number, and NaN and infinity are never
    in range.
    """
    if kind == TABLE:
        fits = isinstance(value, dict) and all(value_problem(field, float, each) is None for each in value.values())
        if fits and (problem := _table_problem(value)):
            return problem
    elif kind == INTEGERS:
        fits = isinstance(value, (list, tuple)) and all(value_problem(field, int, each) is None for each in value)
        if fits and len(value) > MOST_ENTRIES:
            return f"expected at most {MOST_ENTRIES} entries, not {len(value)}"
    elif kind in (int, float):
        is_number = type(value) is kind or (kind is float and type(value) is int)
        fits = is_number and _is_in_range(field.metadata, value)
    else:
        fits = type(value) is kind and value in field.metadata.get("choices", (value,))
        if fits and kind is str and (problem := text_problem(value, field.metadata["any_text"])):
            return problem
    return None if fits else f"expected {expectation(field, kind)}"


def _is_in_range(limits: Any, value: float) -> bool:
    """Compared as it is: a whole number may be too large to be made a float."""
    return (
        (isinstance(value, int) or math.isfinite(value))
        and value in limits.get("choices", (value,))
        and value >= limits.get("minimum", value)
        and value <= limits.get("maximum", value)
        and not ("above" in limits and value <= limits["above"])
        and not ("below" in limits and value >= limits["below"])
    )


def _table_problem(table: dict[str, float]) -> str | None:
    if len(table) > MOST_ENTRIES:
        return f"expected at most {MOST_ENTRIES} entries, not {len(table)}"
    return next(filter(None, (text_problem(name) for name in table)), None)


def text_problem(text: str, any_text: bool = False) -> str | None:
    """Why a string cannot be a setting: it could not be written to config.toml, or no program would take it."""
    if len(text) > LONGEST_STRING:
        return f"expected at most {LONGEST_STRING} characters, not {len(text)}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "expected text in UTF-8: these bytes are none"
    if not any_text and any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
        return "expected text without control characters such as NUL or a line's end"
    return None
