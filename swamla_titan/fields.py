"""One-line declarations of documented, range-checked dataclass fields.

`key()` keeps a setting's default, meaning and allowed values in one place: the config checker refuses by it, and
`config show` and `--help` print it. It knows nothing of TOML, so the model's own `ModelConfig` uses it as well.
"""

import dataclasses
import math
from typing import Any, get_type_hints

TABLE = dict[str, float]


def key(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its allowed values.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive. `choices` lists every allowed value. The
    numbers of a table (`dict[str, float]`) are each checked like a number.
    """
    bounds = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"doc": doc} | {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_types(cls: type) -> dict[str, type]:
    """Name -> type (`int`, `float`, `bool`, `str` or `dict[str, float]`) of a dataclass made with `key`."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


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
        return None if fits else f"expected {expectation(field, kind)}"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = type(value) is kind
    limits = field.metadata
    if fits and "choices" in limits:
        fits = value in limits["choices"]
    if fits and kind in (int, float):
        fits = (
            math.isfinite(value)
            and value >= limits.get("minimum", value)
            and value <= limits.get("maximum", value)
            and not ("above" in limits and value <= limits["above"])
            and not ("below" in limits and value >= limits["below"])
        )
    return None if fits else f"expected {expectation(field, kind)}"
