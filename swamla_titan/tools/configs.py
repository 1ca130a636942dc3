"""`config ls` and `config cp`."""

import shutil
from pathlib import Path

from swamla_titan.config import find_config, shipped_configs
from swamla_titan.config.shipped import checkout
from swamla_titan.errors import UserError
from swamla_titan.model.sizes import flavor_table
from swamla_titan.system.console import one_line


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
