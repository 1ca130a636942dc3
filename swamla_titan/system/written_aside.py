"""A text file that is complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from swamla_titan.errors import UserError


@contextmanager
def written_aside(path: Path, keep: bool = True) -> Iterator[TextIO]:
    """A text file that gets its name by a rename at the end; after an error nothing of it is left.

    `keep` False: it is only tried whether it can be written, and a file of that name stays. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        if keep:
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def output_file(output: str) -> Path:
    """The path that a command is given as --output; UserError, before hours of work, if it cannot be written.

    A file that is there will be replaced. Nothing but a file is: a rename would remove a device or a pipe, as root even
    /dev/null.
    """
    path = Path(output)
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"--output {output or repr(output)}: is no file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: cannot be written (there is no folder {path.parent} that may be written to)")
    write_output(path, "", keep=False)
    return path


def write_output(path: Path, content: str, keep: bool = True) -> None:
    """Write, or with `keep` False try to write, the file of an --output; raises UserError where that fails."""
    try:
        with written_aside(path, keep) as file:
            file.write(content)
    except OSError as error:  # as for a name that is too long
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
