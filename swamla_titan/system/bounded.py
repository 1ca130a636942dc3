"""Reads untrusted files within bounds: regular files only, a maximum size, JSON of a known form.

`fit` validates parsed JSON against a type; its error names the place that differs. A type is `int`, `float`, `bool`,
`str`, `Any` (JSON of limited depth), `list[T]`, `dict[str, T]`, `dict[int, T]` (keys in decimal), a union, a dataclass
(an object with these fields and no others; `metadata={"key": ...}` of a field is its key in JSON), or `Annotated` with
a `Within`.
"""

import dataclasses
import json
import math
import os
import re
import stat
import types
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

_DEEPEST = 16  # nesting of `Any`
_DIGITS = 20  # no program writes longer integers
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Within:
    """Inclusive bounds of a number, or of the length of anything else."""

    least: float
    most: float


Count = Annotated[int, Within(0, 2**53)]


def read_regular(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes.

    Raises ValueError for a longer one, and for anything but a regular file (a link, a pipe, a device); else OSError.
    """
    _require_regular(os.lstat(path))  # before it is opened, because a device may react, and a pipe blocks
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _require_regular(status)
        content = file.read(most + 1) if status.st_size <= most else b""
    if max(status.st_size, len(content)) > most:
        raise ValueError(f"it has {status.st_size} bytes, and {most} is the most that this program writes")
    return content


def regular_size(path: Path) -> int:
    """The size of a file in bytes; ValueError for anything but a regular file, OSError if it is missing."""
    status = os.lstat(path)
    _require_regular(status)
    return status.st_size


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(status.st_mode), 'a special file')}, and no file")


def inflated(content: bytes, most: int) -> bytes:
    """Decompress gzip; ValueError if `content` is damaged or decompresses to more than `most` bytes."""
    inflate = zlib.decompressobj(wbits=31)  # with gzip's header
    try:
        found = inflate.decompress(content, most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) > most:
        raise ValueError(f"it unpacks to more than {most} bytes, the most that this program writes")
    if not inflate.eof or inflate.unused_data:
        raise ValueError("it is cut short" if not inflate.eof else "something follows its end")
    return found


def parse_json(content: bytes) -> Any:
    """Like json.loads, but strict: UTF-8, no duplicate key, no NaN; ValueError whatever is wrong."""
    try:
        return json.loads(
            content.decode(), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_whole_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def fit(kind: Any, value: Any, place: str = "it") -> Any:
    """Convert `value`, a result of `parse_json`, to the type `kind`; ValueError names the `place` that differs."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = fit(arguments[0], value, place)
        size = found if isinstance(found, int | float) else len(found)
        for bounds in arguments[1:]:
            if not bounds.least <= size <= bounds.most:
                of = "" if size is found else " for its length"
                raise ValueError(f"{place}: expected {bounds.least} to {bounds.most}{of}, found {size}")
        return found
    if origin in (Union, types.UnionType):
        return _fit_one_of(arguments, value, place)
    if kind is Any:
        return _plain(value, place, _DEEPEST)
    if dataclasses.is_dataclass(kind):
        return _fit_fields(kind, value, place)
    if origin is list and isinstance(value, list):
        return [fit(arguments[0], each, f"{place}[{i}]") for i, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _fit_name(arguments[0], name, place): fit(arguments[1], each, f"{place}.{name[:80]}")
            for name, each in value.items()
        }
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{place}: expected {_NAMES.get(origin or kind, kind)}, found {_shown(value)}")
    return value


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _fit_one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return fit(kind, value, place)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _fit_fields(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, found {_shown(value)}")
    fields = {key_of(field): field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"{place} has {_shown(name)}, which is not known")
    for name, field in fields.items():
        if name not in value and dataclasses.MISSING is field.default is field.default_factory:
            raise ValueError(f"{place} lacks {name}")
    types_of = get_type_hints(kind, include_extras=True)
    return kind(**{fields[key].name: fit(types_of[fields[key].name], each, key) for key, each in value.items()})


def key_of(field: "dataclasses.Field[Any]") -> str:
    """The key in JSON of a dataclass's field."""
    key: str = field.metadata.get("key", field.name)
    return key


def _fit_name(kind: Any, name: str, place: str) -> Any:
    if kind is str:
        return name
    if not _DECIMAL.fullmatch(name):
        raise ValueError(f"{place}: expected numbers for names, found {_shown(name)}")
    return int(name)


def _plain(value: Any, place: str, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"{place} is nested too deeply")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: expected a finite number, found {value}")
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _plain(each, place, depth - 1)
    elif type(value) not in _NAMES:  # TOML has dates
        raise ValueError(f"{place}: expected JSON, found {value}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return _NAMES[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
