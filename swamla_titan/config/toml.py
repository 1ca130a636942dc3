"""Reading TOML files of limited size, and writing values as TOML."""

import json
import os
import stat
import sys
from typing import Any

from swamla_titan.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_FILE = 1 << 20  # bytes; a file with every key and its docs has 20,000
_MOST_DOTS = 1000  # of a line, because the parser takes quadratic time for dotted keys
_SHOWN = 100  # characters of a value in a message
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00": "UTF-32"}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file; whatever is wrong is a UserError that names the file."""
    try:
        return parse_toml(_text(_bytes(path)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{name(path)}: cannot be read ({reason}); `swamla-titan config ls` lists configs") from None
    except ValueError as error:
        raise UserError(f"{name(path)}: not a TOML file: {shortened(str(error), 300)}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; whatever is wrong is a ValueError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MOST_DOTS:
            raise ValueError(f"line {number} has more than {_MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("values are nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number of too many digits, or an invalid date
        raise ValueError(str(error).partition(";")[0]) from None
    except MemoryError:
        raise ValueError("it does not fit into the memory") from None


def _bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file; no other, because reading a pipe or a device might block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "Is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(0, "it is a pipe, device or socket, not a file")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise OSError(0, f"it has more than {LARGEST_FILE >> 10} KiB, as no configuration has")
    return content


def _text(content: bytes) -> str:
    encoding = _OTHER_ENCODINGS.get(content[:2], "UTF-16" if b"\0" in content[:2] else "")
    if encoding:
        raise ValueError(f"it is in {encoding}; save it as UTF-8")
    if b"\0" in content:
        raise ValueError(f"line {_line(content, content.index(0))} has a NUL byte, which no text has")
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"line {_line(content, error.start)} is not UTF-8; save the file as UTF-8") from None


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def toml(value: Any) -> str:
    """A value in TOML syntax."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are valid TOML, but it does not escape all unprintable characters.
        return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(value, ensure_ascii=False))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(name)} = {toml(each)}' for name, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value) if isinstance(value, (int, float)) else str(value)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(value: Any) -> str:
    """A value as one short line, for a message."""
    if isinstance(value, str):
        return (
            shortened(toml(value[:_SHOWN]))
            if len(value) <= _SHOWN
            else f"{toml(value[:40])}... ({len(value)} characters)"
        )
    try:
        return shortened(toml(value))
    except RecursionError:
        return "a value nested too deeply"
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def shortened(text: str, most: int = _SHOWN) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text)} characters)"


def name(text: str | os.PathLike[str]) -> str:
    """The name of a key, section or file as the user gave it, in printable form."""
    text = os.fspath(text)
    return text if text.isprintable() and len(text) <= 300 else shown(text)
