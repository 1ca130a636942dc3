"""Validates configuration and launch once, before run_train.sh starts processes that would all report the same.

These processes validate devices, data and checkpoint (train/setup.py).

usage: python -m swamla_titan.launch.preflight PROCESSES GPUS CONFIG [--section.key value ...]

PROCESSES are the numbers of processes that the run may have, with commas; GPUS is how many this machine must have.
"""

import sys
from collections.abc import Sequence

import torch

from swamla_titan.config import find_config, load_config, split_overrides
from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from swamla_titan.launch.process_group import validate_launch
from swamla_titan.system.console import open_console
from swamla_titan.system.machine import allow_open_files, needed


def preflight(arguments: Sequence[str]) -> None:
    """Raise UserError if the configuration is wrong, fits none of the numbers of processes, or GPUs are missing.

    An elastic run may have several numbers of processes, of which one must fit. Raises OSError if a process may not
    open as many files as it needs.
    """
    overrides, rest = split_overrides(arguments)
    if len(rest) != 3:
        raise UserError(f"{' '.join(rest[3:])}: not known; overrides are written --section.key value")
    processes, gpus, name = rest
    config = load_config(find_config(name), overrides)
    allow_open_files(config.data.num_workers)
    asked = int(gpus)
    sizes = [int(size) for size in processes.split(",")]
    validate_launch(config.parallel, sizes, asked, torch.cuda.device_count() if asked else 0, asked)


def main(arguments: Sequence[str]) -> int:
    """`preflight` as a command: exit code 2 and one message, or 0 and no output."""
    open_console()
    try:
        with needed("the processes cannot be started"):
            preflight(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
