"""Checks and expansion of paths in a configuration."""

import os
import re

_LONGEST_NAME = 255  # bytes, on every usual file system
_VARIABLE = re.compile(r"(?:^|/)\$(?:\w+|\{\w+\})")


def expanded(path: str) -> str:
    """The path with `~` and `~user` expanded; ValueError if it cannot name a file. Variables are not expanded."""
    if found := _VARIABLE.search(path):
        variable = found[0].lstrip("/")
        raise ValueError(
            f"variables are not replaced here: write out {variable}, or let your shell do it: --section.key"
        )
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"expected names of at most {_LONGEST_NAME} bytes between the slashes")
    if not path.startswith("~"):
        return path
    found_home = os.path.expanduser(path)
    if found_home == path:
        raise ValueError(f"there is no home folder of {path.partition('/')[0]}: write ./{path} if it is a name here")
    return found_home


def is_shared_folder(path: str) -> bool:
    """Whether a path means the current folder, one above it, or the root of the file system."""
    return not set(os.path.normpath(path or ".").split("/")) - {"", ".", ".."}
