"""A conflict between keys, which config/rules.py and effects.py find."""

from typing import NamedTuple


class Conflict(NamedTuple):
    """`keys` (as section.key) cannot hold together; the first is the one to report it at.

    `consequence`: what a run does nevertheless, if only an override on the command line caused the conflict; None: that
    is an error too.
    """

    keys: tuple[str, ...]
    problem: str
    consequence: str | None = None
