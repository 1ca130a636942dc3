"""A text file that is complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


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
