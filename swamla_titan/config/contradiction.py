"""What a rule of config/rules.py finds."""

from typing import NamedTuple


class Contradiction(NamedTuple):
    """`keys` (as section.key) cannot hold together; the first is the one to report it at."""

    keys: tuple[str, ...]
    problem: str
