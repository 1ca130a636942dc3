"""A process's part in a run, from joining the process group to leaving it, and what it reports when memory is full."""

import faulthandler
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from swamla_titan.checkpoint.dump_folder import FolderLost, Hold, early_records_kept, exclusive
from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World, broadcast_from_rank_0
from swamla_titan.errors import RankFailed, RunFailed, UserError
from swamla_titan.escaping import one_line
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.launch.ranks import foreign_variables
from swamla_titan.launch.signals import StopRequest
from swamla_titan.system.events import close_events, record_event
from swamla_titan.system.machine import explain
from swamla_titan.train.policies.watchdog import Watchdog
from swamla_titan.train.setup import from_newest_intact, set_up, validate_open_files
from swamla_titan.train.trainer import Trainer

logger = logging.getLogger(__name__)

Advise = Callable[[Config, World], list[str]]
"""Computes lines on changes of a configuration that save memory on this rank, the largest saving first."""

# Used if the savings could not be computed.
_IN_GENERAL = (
    'a smaller training.local_batch_size, activation_checkpoint.mode = "selective" or "full", a shorter '
    "training.seq_len, more ranks that share weights or sequences, or fewer bytes for moments (optimizer.moments, "
    "optimizer.name)"
)
_LAST = "a smaller model; `swamla-titan plan CONFIG` estimates the memory beforehand"


def train(config: Config, advise: Advise) -> int:
    """Train as one of the processes that the launcher started; returns the exit code.

    `advise` is called if the memory of a GPU is full.
    """
    if not faulthandler.is_enabled() and sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a crash in C code leaves Python's stacks there
    if foreign := foreign_variables():
        logger.warning(
            "%s left out: torchrun did not start this process, and it trains alone. ./run_train.sh starts several, see "
            "NGPU and NPROC",
            " ".join(foreign),
        )
    validate_open_files(config)  # before each process opens connections to all others
    stop = StopRequest()
    with ExitStack() as stack:
        stack.enter_context(early_records_kept())
        stack.callback(stop.forget)
        stack.push(_leave_process_group)
        world = init_distributed(config.parallel, stop.exit_without_peers)
        if asked := stop.agreed(world.all_reduce_max):
            return asked.code
        folder = Path(config.job.dump_folder)
        # Rank 0 holds the lock for all; it is kept in a list, because a lock cannot be broadcast.
        held: list[Hold] = []
        broadcast_from_rank_0(world, lambda: held.append(stack.enter_context(exclusive(folder))))
        watchdog = Watchdog(config.fault_tolerance, folder / "traces", world)
        stack.callback(watchdog.stop)
        resolved = [config]
        stack.enter_context(explained_out_of_memory(lambda: resolved[-1], world, folder / "traces", advise))
        trainer = build_trainer(config, world, stop, watchdog, held[0] if held else None)
        resolved.append(trainer.config)
        ended: list[int] = []
        stack.push(lambda kind, error, _: _record_end(trainer.step, ended, error))
        stack.push(lambda kind, *_: trainer.close(_ends_alone(kind), kind is FolderLost))
        stack.push(lambda kind, *_: close_events() if kind is FolderLost else None)
        if asked := stop.agreed(world.all_reduce_max):
            ended.append(asked.code)
            return asked.code
        stop.finish_step_first = True
        with _explained_shortage():
            ended.append(trainer.run())
        return ended[0]


def _record_end(step: int, codes: Sequence[int], error: BaseException | None) -> None:
    """Record the exit code of this start, or the error that ended it, and no event after it."""
    if isinstance(error, SystemExit):
        record_event("end", step=step, code=error.code)
    elif error:
        record_event("end", step=step, error=f"{type(error).__name__}: {error}")
    else:
        record_event("end", step=step, code=codes[0])
    close_events()


def build_trainer(config: Config, world: World, stop: StopRequest, watchdog: Watchdog, hold: Hold | None) -> Trainer:
    """A trainer that continues from the newest checkpoint that can be loaded; `hold`: of the dump folder."""
    return from_newest_intact(lambda damaged: Trainer(set_up(config, world, damaged), stop, watchdog, hold))


@contextmanager
def _explained_shortage() -> Iterator[None]:
    """Turns a lack of resources while training into a RankFailed, because the next start may have them again.

    Before training it is a UserError, or ends in cli.py with exit code 2.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        failure = RankFailed(reason)
        logger.error("%s", failure)
        raise failure from error


def _ends_alone(kind: type[BaseException] | None) -> bool:
    """Whether a run that ends with this kind of exception (None: normally) may end on this rank alone.

    The other ranks are then in a collective that this one never enters. Whatever waits for the device, such as
    destroying NCCL's communicators, would hang until a timeout, before the error is reported. The launcher notices that
    this process ends, and ends the others.
    """
    return kind is not None and (not issubclass(kind, UserError | RunFailed) or issubclass(kind, RankFailed))


def _leave_process_group(kind: type[BaseException] | None, *_: object) -> None:
    """Destroy the process group, unless this rank ends alone."""
    if not _ends_alone(kind):
        destroy_distributed()


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
        text = out_of_memory_message(error, config(), world, advise)
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


def out_of_memory_message(error: BaseException, config: Config, world: World, advise: Advise) -> str:
    """The message: what happened, how full the device is, and which keys to change."""
    first_line = str(error).strip().splitlines()[0]
    what = ". ".join(first_line.split(". ")[:3]).rstrip(".")  # the rest is on torch's environment variables
    try:
        lines = advise(config, world)
    except Exception:  # there may be no memory left to compute it, and the user needs the rest of the message
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, or CUDA itself, found no memory on the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error)
