"""Reads the rank of this process from torchrun's environment variables, and whether it logs to the console.

Other launchers, and shells in which one ran, leave variables of the same names: WORLD_SIZE, RANK, LOCAL_RANK. They
count only together with torchrun's count of restarts; `rank_info` is the one function that reads them.

Standard library only: it runs before torch is imported.
"""

import os
import re
from dataclasses import dataclass

from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line

FOLDER = "SWAMLA_TITAN_LAUNCH_FOLDER"  # names the launch folder, see launch/worker.py
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun sets it for all its workers, and no other launcher does
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")  # where rank 0 hosts the workers' store
TAKE_AWAY = (
    "Start with ./run_train.sh; if this shell has variables of an earlier run, take them away with: "
    f"unset {' '.join((RESTART_COUNT, *RANK_VARIABLES, *MASTER_VARIABLES, FOLDER))}"
)


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process among all that torchrun started, and among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machines: int = 1


def rank_info() -> RankInfo:
    """The rank that torchrun assigned to this process; without torchrun that of a single process.

    Raises UserError if torchrun's variables are incomplete or invalid.
    """
    if RESTART_COUNT not in os.environ:
        return RankInfo()
    wrong = [name for name in RANK_VARIABLES if not re.fullmatch(r"[0-9]{1,7}", os.environ.get(name, ""))]
    if wrong:
        raise _invalid_rank(f"{wrong[0]} is {_shown(wrong[0])}")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in RANK_VARIABLES)
    if not (rank < size and local_rank < local_size <= size):
        raise _invalid_rank(", ".join(f"{name}={os.environ[name]}" for name in RANK_VARIABLES) + " fit no process")
    if size > 1:
        missing = [name for name in MASTER_VARIABLES if not os.environ.get(name)]
        if missing or not re.fullmatch(r"[0-9]{1,5}", os.environ["MASTER_PORT"]):
            name = (missing or ["MASTER_PORT"])[0]
            raise _invalid_rank(f"{name} is {_shown(name)}")
    groups = os.environ.get("GROUP_WORLD_SIZE", "1")
    return RankInfo(rank, size, local_rank, local_size, int(groups) if re.fullmatch(r"[0-9]{1,7}", groups) else 1)


def foreign_variables() -> list[str]:
    """Variables by which this would be one of several processes, if torchrun had started it."""
    if RESTART_COUNT in os.environ:
        return []
    return [
        f"{name}={os.environ[name][:40]!a}" for name in RANK_VARIABLES if os.environ.get(name, "") not in ("", "0", "1")
    ]


def _shown(name: str) -> str:
    return f"{os.environ[name][:40]!a}" if name in os.environ else "not set"


def _invalid_rank(reason: str) -> UserError:
    return UserError(f"{RESTART_COUNT} is set, as torchrun does for the processes it starts, but {reason}. {TAKE_AWAY}")


def logs_to_console() -> bool:
    """Whether this process logs to the console: LOG_RANK names it, or no launcher started it.

    LOG_RANK lists processes by their local ranks; default 0. All raise the same errors, so one message is enough.
    run_train.sh shows no other output, but torchrun alone would. Raises UserError if LOG_RANK names no process of this
    machine.
    """
    if RESTART_COUNT not in os.environ:
        return True
    here = rank_info()
    text = os.environ.get("LOG_RANK") or "0"
    if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", text):
        raise UserError(f"LOG_RANK={one_line(text[:100])}: expected numbers of processes, as in 0,3")
    ranks = [int(number) for number in text.split(",")]
    if max(ranks) >= here.local_size:
        raise UserError(f"LOG_RANK={text[:100]}: the processes of this machine are 0 to {here.local_size - 1}")
    return here.local_rank in ranks
