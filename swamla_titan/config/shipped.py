"""The configurations that come with the package, and the commands `config ls` and `config cp`."""

import os
import shutil
from pathlib import Path

import swamla_titan
from swamla_titan.config.toml import name as printable
from swamla_titan.errors import UserError
from swamla_titan.model.sizes import flavor_table
from swamla_titan.system.console import one_line

_PACKAGE = Path(swamla_titan.__file__).resolve().parent
_FOLDER = "train_configs"


def checkout() -> Path | None:
    """The repository that this package runs from, also if it is installed from there as editable; else None."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / _FOLDER).is_dir() else None


def shipped_configs() -> dict[str, Path]:
    """Name -> path of each shipped TOML file, sorted by name."""
    # In the repository the folder stands beside the package; setup.py has it installed within.
    folder = (checkout() or _PACKAGE) / _FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_config(name: str) -> Path:
    """The path `name` if it exists, else the shipped configuration of that name.

    Raises UserError that lists the shipped names.
    """
    path = os.path.expanduser(name)
    shipped = shipped_configs()
    if name in shipped and os.path.isdir(path):  # a folder of that name, perhaps of its runs, is no configuration
        return shipped[name]
    if os.path.lexists(path):  # unlike Path.exists it is False for what can be no name
        return Path(path)
    if name in shipped:
        return shipped[name]
    raise UserError(f"{printable(name)}: no such file, nor a shipped configuration ({', '.join(shipped)})")


def list_configs() -> None:
    """Print each shipped configuration with its first comment line, and the flavors with their parameter counts."""
    print("Configurations (use a name or a path):")
    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").removeprefix(f" {name}:").strip()
        print(f"  {name:<16} {first}")
    print("\nModel flavors (parameters with the GPT-2 vocabulary, `debug` with bytes):")
    print("\n".join(flavor_table()))


def copy_config(name: str, destination: str) -> None:
    """Copy a configuration; raises UserError if the destination exists or cannot be written."""
    source, target = find_config(name), Path(destination)
    if target.is_dir():
        target = target / source.name
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name or remove it")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    command = "./run_train.sh" if checkout() else "swamla-titan train"
    print(one_line(f"{target} written; train with: {command} {target}"))
