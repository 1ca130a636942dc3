"""The configurations that come with the package."""

import os
from pathlib import Path

import swamla_titan
from swamla_titan.config.toml import name as printable
from swamla_titan.errors import UserError

_PACKAGE = Path(swamla_titan.__file__).resolve().parent
_FOLDER = "train_configs"


def checkout() -> Path | None:
    """The repository that this package runs from, directly or by an editable install; else None."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / _FOLDER).is_dir() else None


def shipped_configs() -> dict[str, Path]:
    """Name -> path of each shipped TOML file, sorted by name."""
    # In the repository the folder is beside the package; setup.py installs it inside.
    folder = (checkout() or _PACKAGE) / _FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_config(name: str) -> Path:
    """The path `name` if it exists, else the shipped configuration of that name.

    Raises UserError that lists the shipped names.
    """
    path = os.path.expanduser(name)
    shipped = shipped_configs()
    if name in shipped and os.path.isdir(path):  # a folder of that name, perhaps of its runs, is not a configuration
        return shipped[name]
    if os.path.lexists(path):  # Path.exists raises for what cannot be a name
        return Path(path)
    if name in shipped:
        return shipped[name]
    raise UserError(f"{printable(name)}: no such file, nor a shipped configuration ({', '.join(shipped)})")
