"""The source that is always there: the topics of Python's own documentation."""

import hashlib
import platform
from collections.abc import Iterator
from typing import Any

from swamla_titan.data.document import Document, Position
from swamla_titan.data.faults import Fault
from swamla_titan.errors import UserError


class BuiltinSource:
    """Every topic of `pydoc_data.topics`, sorted by name, is a unit of one document (about 80, half a megabyte)."""

    def __init__(self) -> None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError(
                "data.source = builtin: this Python has no pydoc_data.topics. "
                "Use data.source = local with text of your own."
            ) from error
        self._topics: list[tuple[str, str]] = sorted(topics.items())

    @property
    def num_units(self) -> int:
        return len(self._topics)

    @property
    def unit_sizes(self) -> list[int]:
        return [len(text) for _, text in self._topics]

    @property
    def text_bytes(self) -> int:
        return sum(self.unit_sizes)

    def num_documents(self, unit: int) -> int:
        return 1

    def position_of(self, unit: int, ordinal: int) -> Position | None:
        return None

    @property
    def fingerprint(self) -> str:
        # The text changes with Python's version, and it is small: hash it whole.
        digest = hashlib.blake2b(digest_size=16)
        for name, text in self._topics:
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{self.num_units} topics of Python {platform.python_version()}'s documentation"

    def file_of(self, unit: int) -> str:
        return f"topic {self._topics[unit][0]}"

    def record(self) -> dict[str, Any]:
        return {}  # it comes with Python: what the fingerprint says is all

    @property
    def passed_over(self) -> list[Fault]:
        return []

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        if (position or {"ordinal": 0})["ordinal"] > 0 or offset > 0:
            return
        name, text = self._topics[unit]
        yield Document(text, 0, {"ordinal": 1}, f"topic {name} of Python {platform.python_version()}")
