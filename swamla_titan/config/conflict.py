"""What a rule of config/rules.py or effects.py finds."""

from typing import NamedTuple


class Conflict(NamedTuple):
    """`keys` (as section.key) cannot hold together; the first is the one to report it at.

    `consequence`: what a run does all the same, where only an override on the command line brought it about; None:
    it is refused there too.
    """

    keys: tuple[str, ...]
    problem: str
    consequence: str | None = None
