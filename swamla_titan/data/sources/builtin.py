"""A source that needs no files: the topics of Python's own documentation."""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from swamla_titan.config.sections import Data
from swamla_titan.data.document import Document, Position, Source
from swamla_titan.data.retry import Retry
from swamla_titan.errors import UserError


@dataclass(frozen=True)
class Topic:
    """A topic of the documentation: a unit of one document."""

    name: str
    text: str
    num_documents: int = 1

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        if (position or {"ordinal": 0})["ordinal"] > 0 or offset > 0:
            return
        yield Document(self.text, 0, {"ordinal": 1})


def open_source(data: Data, retry: Retry, recorded: dict[str, Any] | None = None) -> Source:
    """Every topic of `pydoc_data.topics`, sorted by name (about 80, half a megabyte)."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "data.source = builtin: this Python has no pydoc_data.topics. "
            "Use data.source = local with text of your own."
        ) from error
    units = [Topic(name, text) for name, text in sorted(topics.items())]
    # All of the text is hashed, because it is small and changes with Python's version.
    digest = hashlib.blake2b(digest_size=16)
    for unit in units:
        digest.update(f"{unit.name}\0{unit.text}\0".encode())
    return Source(
        units,
        unit_sizes=[len(unit.text) for unit in units],
        unit_files=[f"topic {unit.name}" for unit in units],
        fingerprint=digest.hexdigest(),
        description=f"{len(units)} topics of Python {platform.python_version()}'s documentation",
    )
