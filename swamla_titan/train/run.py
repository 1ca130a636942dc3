"""A process's part in a run, from joining the others to leaving them."""

import faulthandler
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from swamla_titan.checkpoint.dump_folder import FolderLost, Hold, exclusive
from swamla_titan.checkpoint.store import DamagedCheckpoints
from swamla_titan.config import Config
from swamla_titan.distributed.agreement import broadcast_from_rank_0
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RankFailed, RunFailed, UserError
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.launch.signals import StopRequest
from swamla_titan.launch.worker import foreign_variables
from swamla_titan.system.machine import allow_open_files_to_train, explain, needed
from swamla_titan.train.policies.out_of_memory import Advise, explained_out_of_memory
from swamla_titan.train.policies.watchdog import Watchdog
from swamla_titan.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: Config, advise: Advise) -> int:
    """Run a configuration to its end, as one of the processes that the launcher started; returns the exit code.

    `advise` is asked where a GPU's memory is full.
    """
    if not faulthandler.is_enabled() and sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a crash of C code leaves the stacks of Python there
    if foreign := foreign_variables():
        logger.warning(
            "%s left out: torchrun did not start this process, and it trains alone. ./run_train.sh starts several, see "
            "NGPU and NPROC",
            " ".join(foreign),
        )
    with needed("the run cannot be started"):  # before processes connect to each other, each with several of all others
        allow_open_files_to_train(config.data.num_workers)
    stop = StopRequest()
    with ExitStack() as stack:
        stack.callback(stop.forget)
        stack.push(_leave_together)
        world = init_distributed(config.parallel, stop.exit_without_peers)
        if asked := stop.agreed(world.all_reduce_max):
            return asked.code
        folder = Path(config.job.dump_folder)
        # One rank holds the folder for all; the lock does not travel, so nothing is returned.
        held: list[Hold] = []
        broadcast_from_rank_0(world, lambda: held.append(stack.enter_context(exclusive(folder))))
        watchdog = Watchdog(config.fault_tolerance, folder / "traces", world)
        stack.callback(watchdog.close)
        resolved = [config]
        stack.enter_context(explained_out_of_memory(lambda: resolved[-1], world, folder / "traces", advise))
        trainer = _begun(config, world, stop, watchdog, held[0] if held else None)
        resolved.append(trainer.config)
        stack.push(lambda kind, *_: trainer.close(_in_trouble_alone(kind), kind is FolderLost))
        if asked := stop.agreed(world.all_reduce_max):
            return asked.code
        stop.finish_step_first = True
        with _explained():
            return trainer.run()


def _begun(config: Config, world: World, stop: StopRequest, watchdog: Watchdog, hold: Hold | None) -> Trainer:
    """A trainer, from the newest checkpoint that can be loaded."""
    damaged: dict[Path, str] = {}
    while True:
        try:
            return Trainer(config, world, stop, watchdog, hold, damaged)
        except DamagedCheckpoints as found:
            damaged = found.damaged


@contextmanager
def _explained() -> Iterator[None]:
    """Makes a RankFailed of what this machine lacks while it trains: it may be there again at the next start.

    What it lacks before is a UserError or ends in cli.py, with 2.
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


def _in_trouble_alone(kind: type[BaseException] | None) -> bool:
    """Whether a run that ends with this kind of exception, None: in order, ends on this rank only, for all it knows.

    The others are then in a collective that it does not come to, and whatever waits for the device, as NCCL's good-bye
    does, would stand still until a time-out, with the error untold. The launcher sees a process that dies, and ends the
    others.
    """
    return kind is not None and (not issubclass(kind, UserError | RunFailed) or issubclass(kind, RankFailed))


def _leave_together(kind: type[BaseException] | None, *_: object) -> None:
    """Say good-bye to the other processes, unless this one is in trouble alone."""
    if not _in_trouble_alone(kind):
        destroy_distributed()
