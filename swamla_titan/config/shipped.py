"""The configurations that come with the package."""

import sysconfig
from pathlib import Path

import swamla_titan
from swamla_titan.errors import UserError

# In a checkout the folder stands beside the package; a wheel installs it among the environment's data.
_CANDIDATES = [
    Path(swamla_titan.__file__).parents[1] / "train_configs",
    Path(sysconfig.get_path("data")) / "share" / "swamla-titan" / "train_configs",
]


def shipped_configs() -> dict[str, Path]:
    """Name -> path of each shipped TOML file, sorted by name."""
    folder = next((folder for folder in _CANDIDATES if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def find_config(name: str) -> Path:
    """The path `name` if it exists, else the shipped configuration of that name.

    Raises UserError that lists the shipped names.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    raise UserError(f"{name}: no such file, nor a shipped configuration ({', '.join(shipped)})")
