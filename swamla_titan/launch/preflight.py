"""What run_train.sh asks once, before it starts several processes that would each refuse on their own.

usage: python -m swamla_titan.launch.preflight PROCESSES GPUS CONFIG [--section.key value ...]

PROCESSES are the numbers of processes that the run may have, with commas; GPUS is how many this machine must have.
"""

import sys
from collections.abc import Sequence

import torch

from swamla_titan.config import find_config, load_config, split_overrides
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from swamla_titan.launch.process_group import refuse_without_gpus
from swamla_titan.system.console import open_console
from swamla_titan.system.machine import allow_open_files_to_train, needed


def preflight(arguments: Sequence[str]) -> None:
    """Raises UserError if the configuration is wrong, fits none of the numbers of processes, or GPUs are missing.

    An elastic run may have several numbers of processes; it is refused only where none would do. OSError if a process
    may not open as many files as it needs.
    """
    overrides, rest = split_overrides(arguments)
    if len(rest) != 3:
        raise UserError(f"{' '.join(rest[3:])}: not known; overrides are written --section.key value")
    processes, gpus, name = rest
    config = load_config(find_config(name), overrides)
    allow_open_files_to_train(config.data.num_workers)
    refusals = []
    sizes = [int(size) for size in processes.split(",")]
    for size in sizes:
        try:
            fit_degrees(config.parallel, size)
        except UserError as refusal:
            refusals.append(refusal)
    if len(refusals) == len(sizes):
        raise refusals[-1]
    if gpus == "0":
        refuse_without_gpus(config.parallel)
    there = torch.cuda.device_count()
    if there < int(gpus):
        fewer = f"set NGPU={there}, or " if there else "set "
        raise UserError(f"NGPU={gpus}: torch sees {there} here; {fewer}NGPU=0 and NPROC for the CPU")


def main(arguments: Sequence[str]) -> int:
    """`preflight` as a command: exit code 2 and one message, or 0 and silence."""
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
