"""Running out of GPU memory: what happened, and which keys to change."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RankFailed
from swamla_titan.escaping import one_line

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, or CUDA itself, found no memory on the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error)


Advise = Callable[[Config, World], list[str]]
"""Changes of a configuration that save memory on this rank, with what each saves; those that save most come first."""

# Where the savings could not be computed.
_IN_GENERAL = (
    'a smaller training.local_batch_size, activation_checkpoint.mode = "selective" or "full", a shorter '
    "training.seq_len, more ranks that share weights or sequences, or fewer bytes for moments (optimizer.moments, "
    "optimizer.name)"
)
_LAST = "a smaller model; `swamla-titan plan CONFIG` estimates the memory beforehand"


@contextmanager
def explained_out_of_memory(config: Callable[[], Config], world: World, traces: Path, advise: Advise) -> Iterator[None]:
    """Turns an out-of-memory error inside into a RankFailed that says what to change.

    `config()` is called then. The allocator's full table goes to traces/oom-rank-R.txt. The other ranks wait for this
    one, until the launcher ends them because this one has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = message(error, config(), world, advise)
        path = traces / f"oom-rank-{world.rank}.txt"
        try:
            traces.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{error}\n\n{_table(world.device)}\n", encoding="utf-8", errors="backslashreplace")
            text += f"\nThe whole table of its memory is in {one_line(path)}"
        except OSError as other:
            text += f"\n{one_line(path)} could not be written ({other.strerror})"
        failure = RankFailed(*text.split("\n"))
        logger.error("%s", failure)  # for this rank's log file
        raise failure from error


def message(error: BaseException, config: Config, world: World, advise: Advise) -> str:
    """What happened, how full the device is, and which keys to change."""
    first_line = str(error).strip().splitlines()[0]
    what = ". ".join(first_line.split(". ")[:3]).rstrip(".")  # the rest is about torch's environment variables
    try:
        lines = advise(config, world)
    except Exception:  # no memory may be left to compute it, and the user needs the rest of the message
        logger.debug("no savings computed", exc_info=True)
        lines = [_IN_GENERAL]
    advice = "\n".join(f"  - {line}" for line in (*lines, _LAST))
    return (
        f"rank {world.rank} ran out of memory: {what}.\n{_essentials(world.device)}"
        f"What helps here, as `plan` counts it:\n{advice}"
    )


def _essentials(device: torch.device) -> str:
    """One line about the device's memory; empty without a GPU."""
    if device.type != "cuda":
        return ""
    gib = 2**30
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    line = (
        f"{torch.cuda.get_device_name(device)}: {total / gib:.1f} GiB, {free / gib:.1f} free; tensors take "
        f"{allocated / gib:.1f} (peak {peak / gib:.1f}), torch keeps {(reserved - allocated) / gib:.1f} more.\n"
    )
    if reserved - allocated > 0.1 * total:
        line += "That much in pieces too small: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may help.\n"
    return line


def _table(device: torch.device) -> str:
    return torch.cuda.memory_summary(device) if device.type == "cuda" else "no GPU"
