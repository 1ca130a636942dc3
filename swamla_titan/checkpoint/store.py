"""Checkpoints on disk: written through DCP to a temporary folder, committed whole, verified on loading.

checkpoints/step-00000100/
    .metadata, *.distcp    tensors: model, average, optimizer, bad steps, random states
                           (torch.distributed.checkpoint)
    train.json             step, counters, data cursors, identity of the run, versions
    config.toml            the resolved configuration
    tokenizer.tiktoken     the vocabulary, where it was read from a file
    manifest.json          size and SHA-256 of each of the above
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from swamla_titan.checkpoint.dump_folder import FolderLost
from swamla_titan.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY_PREFIX,
    Entries,
    commit,
    digested,
    has_its_sizes,
    is_ours,
    misnamed,
    name_of,
    remove,
)
from swamla_titan.checkpoint.reader import Reader
from swamla_titan.checkpoint.tensor_names import EMA, tensors_of
from swamla_titan.checkpoint.train_state import RECORD, Record
from swamla_titan.checkpoint.verification import CONFIG as CONFIG
from swamla_titan.checkpoint.verification import require_whole
from swamla_titan.distributed.agreement import all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import Damaged, RunFailed, UserError
from swamla_titan.system.machine import limit_of_files

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

VOCABULARY = "tokenizer.tiktoken"
# One process without a process group saves and loads alone. For good, because filters belong to all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_COPIED_AHEAD = 10_000_000  # bytes

_LONGEST = 1000  # characters of what is wrong with a checkpoint
_NAMED = re.compile("step-[0-9]+")


def holds_ema(path: Path) -> bool:
    """Whether a checkpoint has an average of the weights beside them."""
    return any(name.startswith(f"{EMA}.") for name in Reader(path).read_metadata().state_dict_metadata)


def require_weights(path: Path, model: nn.Module, ema: bool = False) -> None:
    """Raise UserError unless a checkpoint has the weights of a model, or their average; it may be without memory."""
    if ema and not holds_ema(path):
        raise UserError(f"{path} holds no average of the weights: it was trained with ema.decay = 0")
    _found_there(path, _weights_of(model, ema))


def load_weights(path: Path, model: nn.Module, ema: bool = False) -> None:
    """Fill a whole model with the weights of a checkpoint, or with their average; UserError if it has none."""
    require_weights(path, model, ema)
    load_tensors(path, _weights_of(model, ema))
    require_finite(path, _weights_of(model, ema), World.alone())


def _weights_of(model: nn.Module, ema: bool) -> dict[str, Any]:
    return {EMA if ema else "model": tensors_of([model])["model"]}


def require_finite(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Raise Damaged, on every rank, if what was loaded holds NaN or infinities, which no run saves; all come here."""
    loaded = [local(tensor.detach()) for group in tensors.values() for tensor in group.values()]
    finite = [each.isfinite().all() for each in loaded if each.is_floating_point()]
    mine = all(each.item() for each in finite)
    if world.all_reduce_max(float(not mine)):
        raise Damaged(f"{path} holds weights or states of the optimizer that are no finite numbers")


class DamagedCheckpoints(Exception):
    """The newest checkpoint turned out damaged while it was loaded: begin again, without those of `damaged`."""

    def __init__(self, damaged: dict[Path, str]) -> None:
        super().__init__()
        self.damaged = damaged


class Checkpoints:
    """The checkpoints of one run, under `folder`."""

    def __init__(
        self,
        folder: Path,
        keep_latest: int,
        world: World | None = None,
        keep_every: int = 0,
        damaged: dict[Path, str] | None = None,
    ) -> None:
        """Kept are the newest `keep_latest` whole ones (0: all), and those of every `keep_every`-th step (0: none).

        `damaged`: those found so before, and how; they are not looked at again.
        """
        self.folder = folder
        self.keep_latest, self.keep_every = keep_latest, keep_every
        self.world = world or World.alone()
        self._known, self._damaged = damaged or {}, dict[Path, str]()
        # Raises FolderLost where the folder above is another run's meanwhile. Asked on the first rank.
        self.may_write: Callable[[], None] = lambda: None
        self._committed = False
        # Given those that retention keeps, and the others: which of these it leaves alone. Asked on the first rank.
        self.spared: Callable[[Sequence[Path], Sequence[Path]], Collection[Path]] = lambda kept, others: ()

    def save(self, tensors: dict[str, Any], record: Record, files: dict[str, bytes]) -> Path:
        """Write and commit one checkpoint, then remove the oldest beyond those to keep; returns its folder.

        All ranks write their parts of `tensors` and digest what they wrote; the first one writes the record and
        `files`, stored beside them by name, and commits. Raises RunFailed on every rank, leaving nothing half-written,
        where the disk does not take it.
        """
        final = self.folder / name_of(record.step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}"

        def prepare() -> None:
            self.may_write()
            if self._committed and not self.folder.exists():
                logger.warning("%s was removed, and the checkpoints with it; it is made again", self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for kind in ("step-*", "replaced-step-*"):
                for leftover in self.folder.glob(TEMPORARY_PREFIX + kind):
                    remove(leftover)
            temporary.mkdir()

        def finish() -> None:
            (temporary / RECORD).write_text(json.dumps(asdict(record), indent=1))
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            self.may_write()
            commit(temporary, final, entries)

        def digest_own() -> Entries:
            # By DCP's names for the files of a rank.
            return digested(temporary, sorted(temporary.glob(f"__{self.world.rank}_*.distcp")))

        try:
            broadcast_from_rank_0(self.world, lambda: self._or_failed(prepare, final))
            all_ranks_or_raise(
                self.world, lambda: self._or_failed(lambda: _write(tensors, temporary, self.world), final)
            )
            entries = all_gather_dict(
                self.world, all_ranks_or_raise(self.world, lambda: self._or_failed(digest_own, final))
            )
            broadcast_from_rank_0(self.world, lambda: self._or_failed(finish, final))
        except RunFailed as error:
            # Only now: while one rank fails, others may still be at work in there.
            if self.world.is_rank_0 and not isinstance(error, FolderLost):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._known.pop(final, None)
        self._damaged.pop(final, None)
        self._committed = True
        broadcast_from_rank_0(self.world, lambda: self._retain(final))
        return final

    def _or_failed(self, work: Callable[[], Result], final: Path) -> Result:
        """`work()`; what the disk or DCP raises becomes a RunFailed."""
        try:
            return work()
        except (OSError, RuntimeError, CheckpointException) as error:
            self.may_write()  # what goes wrong in another run's folder, or in none, is not the disk's fault
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            free = ""
            with suppress(OSError):  # a disk that is ill may refuse this as well
                existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
                free = f"; {shutil.disk_usage(existing).free / 2**30:.1f} GiB are free there"
            free += limit_of_files()
            raise RunFailed(f"{final} could not be written ({reason}){free}") from error

    def newest_whole(self, usable: Callable[[Path], object] = lambda path: None) -> Path | None:
        """The newest undamaged checkpoint; None if there is no checkpoint at all. The same on all ranks.

        All ranks come here and share the reading. Damaged ones are named and passed over, and so are those of which
        `usable(path)`, asked on the first rank, raises a UserError. Raises UserError if every one is: a run must not
        silently start again from nothing.
        """
        problems: dict[Path, str] = {}
        whole = None
        for path in broadcast_from_rank_0(self.world, self._candidates):
            problem = self._known.get(path) or self._problem(path, usable)
            if problem is None:
                whole = path
                break
            problems[path] = problem
        if problems and whole is None:
            raise UserError(
                "no whole checkpoint to resume from; restore one of these, or start anew with another job.dump_folder:",
                *(f"  {path}: {problem}" for path, problem in problems.items()),
            )
        for path, problem in problems.items():
            if path not in self._known:
                self.pass_over(path, problem)
        return whole

    def is_whole(self, path: Path) -> bool:
        """Whether a checkpoint is as it was written; one that is not is named. All ranks come here."""
        problem = self._problem(path)
        if problem:
            self.pass_over(path, problem)
        return problem is None

    def _problem(self, path: Path, usable: Callable[[Path], object] = lambda path: None) -> str | None:
        """What is wrong with a checkpoint; all ranks share the reading."""
        try:
            require_whole(path, self.world)
            broadcast_from_rank_0(self.world, lambda: (usable(path), None)[1])
        except UserError as error:
            problem = "; ".join(str(line).strip() for line in error.args)
            return problem if len(problem) < _LONGEST else problem[:_LONGEST] + "..."
        return None

    def pass_over(self, path: Path, problem: str) -> None:
        """Name a checkpoint as damaged, and remember that it is."""
        self._damaged[path] = problem
        if self.world.is_rank_0:
            logger.warning("checkpoint passed over: %s: %s", path, problem)

    @contextmanager
    def loading(self, path: Path | None) -> Iterator[None]:
        """Encloses what is done with a checkpoint that `newest_whole` gave, before anything else has happened.

        Makes DamagedCheckpoints of Damaged, which is raised on every rank.
        """
        try:
            yield
        except Damaged as error:
            if path is None:
                raise
            self.pass_over(path, str(error))
            raise DamagedCheckpoints(self._known | self._damaged) from None

    def finished(self) -> list[Path]:
        """What is named like a checkpoint, newest first. UserError if that cannot be seen."""
        return [path for path in self._candidates() if path.name == name_of(_step_of(path))]

    def _candidates(self) -> list[Path]:
        """`finished`, and what somebody named almost like a checkpoint, and is one: to be told of, never used."""
        try:
            found = [path for path in self.folder.iterdir() if _NAMED.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):  # a file at this place is refused where it is written
            return []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read ({error.strerror}), so nothing can be resumed") from None
        named = [path for path in found if path.name == name_of(_step_of(path)) or os.path.lexists(path / MANIFEST)]
        return sorted(named, key=lambda path: (_step_of(path), path.name != name_of(_step_of(path))), reverse=True)

    def _retain(self, committed: Path) -> None:
        """Remove what is one too many; if that cannot be done, the new checkpoint is whole all the same."""
        try:
            self._remove_others(committed)
        except (OSError, UserError) as error:
            logger.warning("no older checkpoints were removed: %s", error)

    def _remove_others(self, committed: Path) -> None:
        """Remove those from before `committed`, of which checkpoint.keep_latest and keep_every keep none.

        What claims to be newer is none of this run's, which has come no further: it neither counts nor is removed.
        """
        older = [path for path in self.finished() if _step_of(path) < _step_of(committed)]
        # Damaged ones do not count among those kept, nor are they deleted: they may be all that is left of a step. The
        # same holds for folders to which somebody has added a file, and for copies by the name of another step.
        ours = [committed, *filter(self._is_removable, older)]
        others = ours[self.keep_latest :] if self.keep_latest else []
        spared = self.spared(ours[: self.keep_latest], others) if others else ()
        for path in others:
            if path in spared or (self.keep_every and _step_of(path) % self.keep_every == 0):
                continue
            # Renamed first: a crash while deleting must not leave a half-empty folder that looks like a checkpoint.
            try:
                doomed = path.rename(path.with_name(TEMPORARY_PREFIX + path.name))
            except OSError as error:
                logger.warning("%s is one too many, but could not be removed (%s)", path, error.strerror)
                continue
            shutil.rmtree(doomed, ignore_errors=True)

    def _is_removable(self, path: Path) -> bool:
        if problem := misnamed(path):
            logger.warning("%s is left alone: %s", path, problem)
        return not problem and path not in self._known | self._damaged and is_ours(path) and has_its_sizes(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_tensors(path: Path, tensors: dict[str, Any], world: World | None = None) -> None:
    """Fill `tensors` in place from a checkpoint that may hold more; each rank its part of each.

    Random states of ranks that the checkpoint does not know are left as they are, and so are a history of bad steps
    (`tensors["bad_steps"]`) that it does not have in that length, and a loss scale that it does not have. Raises
    UserError, on every rank, that names the tensors that are missing or of another shape on one of them, before any is
    written.
    """
    world = world or World.alone()
    wanted = all_ranks_or_raise(
        world, lambda: _found_there(path, tensors)
    )  # a pipeline rank may be refused what others are not
    try:
        dcp.load(wanted, storage_reader=Reader(path), no_dist=world.size == 1, process_group=world.host_group)
    except CheckpointException as error:  # on every rank
        reasons = [str(each[0]) for each in error.failures.values()]
        raise Damaged(f"{path} cannot be loaded ({reasons[0] if reasons else error})") from error


def _found_there(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors` without random states that the checkpoint lacks; UserError if it lacks others."""
    stored = Reader(path).read_metadata().state_dict_metadata
    known = {name: state for name, state in tensors.get("random", {}).items() if f"random.{name}" in stored}
    optional = ("bad_steps", "loss_scale")
    wanted = {group: members for group, members in tensors.items() if group not in ("random", *optional)}
    wanted |= {"random": known} if known else {}
    for group in optional:
        there = {
            name: tensor
            for name, tensor in tensors.get(group, {}).items()
            if getattr(stored.get(f"{group}.{name}"), "size", None) == tensor.shape
        }
        wanted |= {group: there} if there else {}
    problems = []
    for group, members in wanted.items():
        for name, tensor in members.items():
            entry = stored.get(f"{group}.{name}")
            if entry is None:
                problems.append(f"{group}.{name} is missing")
            elif not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
                shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "no tensor"
                problems.append(f"{group}.{name} is {shape} there and {tuple(tensor.shape)} here")
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(f"{path} holds another model:", *(f"  {line}" for line in problems[:8] + more))
    return wanted


def _write(tensors: dict[str, Any], folder: Path, world: World) -> None:
    # From the host DCP is to copy nothing ahead: it would wait for all work of the GPU at every few tensors. And one
    # thread is to write: what goes wrong in further ones DCP does not notice.
    on_gpu = any(local(each).is_cuda for group in tensors.values() for each in group.values())
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=_COPIED_AHEAD if on_gpu else 0)
    dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1, process_group=world.host_group)
