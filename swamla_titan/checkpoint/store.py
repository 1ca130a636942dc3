"""The checkpoints of a run on disk: saved through DCP to a temporary folder, committed by a rename, chosen, removed.

checkpoints/step-00000100/
    .metadata, *.distcp    tensors by group, see state.py (torch.distributed.checkpoint, DCP)
    train.json             train state: step, counters, data cursors, fingerprint of the run, versions
    config.toml            the resolved configuration
    data.json.gz           the data record
    tokenizer.tiktoken     the vocabulary, where it was read from a file
    annexes.json.gz        of a model with annexes: their hashes, and the compressed vocabulary
    manifest.json          size and SHA-256 of each of the above
"""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from swamla_titan.checkpoint.dump_folder import FolderLost
from swamla_titan.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    TEMPORARY_PREFIX,
    TRAIN_STATE,
    Entries,
    commit,
    digested,
    has_its_sizes,
    is_ours,
    misnamed,
    name_of,
    read_manifest,
    remove,
)
from swamla_titan.checkpoint.reader import Tensors, load_tensors
from swamla_titan.checkpoint.records import TrainState, read_train_state
from swamla_titan.checkpoint.state import OF_MODELS, Declared
from swamla_titan.checkpoint.verification import require_intact
from swamla_titan.config import Config, load_config
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import Damaged, RunFailed, UnknownGroup, UserError
from swamla_titan.system.machine import limit_of_files

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# One process without a process group saves and loads alone. For good, because filters belong to all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_COPIED_AHEAD = 10_000_000  # bytes
_LONGEST = 1000  # characters of what is wrong with a checkpoint
_NAMED = re.compile("step-[0-9]+")


class DamagedCheckpoints(Exception):
    """The newest checkpoint was found damaged while it was loaded: begin again, without the `damaged` ones."""

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
        known: Declared = OF_MODELS,
    ) -> None:
        """Retention keeps the newest `keep_latest` intact ones (0: all) and each `keep_every`-th step (0: none).

        `damaged`: those found damaged before, and how; they are not read again. `known`: the groups of tensors that
        they may hold.
        """
        self.folder = folder
        self.keep_latest, self.keep_every = keep_latest, keep_every
        self.world = world or World.alone()
        self._known = known
        self._damaged_before, self._damaged = damaged or {}, dict[Path, str]()
        # Raises FolderLost where the dump folder belongs to another run meanwhile. Called on rank 0.
        self.may_write: Callable[[], None] = lambda: None
        self._committed = False
        # Of the checkpoints that retention does not keep, those that it must not remove: (kept, others) -> protected.
        # Called on rank 0.
        self.protected: Callable[[Sequence[Path], Sequence[Path]], Collection[Path]] = lambda kept, others: ()

    def save(self, tensors: Tensors, state: TrainState, files: dict[str, bytes]) -> Path:
        """Write and commit one checkpoint, then remove the oldest beyond those to keep; returns its folder.

        All ranks write their shards of `tensors` and digest what they wrote; rank 0 writes the train state and `files`,
        by name, and commits. Raises RunFailed on every rank, and removes the temporary folder, if the disk fails.
        """
        final = self.folder / name_of(state.step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}"

        try:
            self._write(tensors, state, files, temporary, final)
        except RunFailed as error:
            # Only now, because while one rank fails, others may still write there.
            if self.world.is_rank_0 and not isinstance(error, FolderLost):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._damaged_before.pop(final, None)
        self._damaged.pop(final, None)
        self._committed = True
        broadcast_from_rank_0(self.world, lambda: self._retain(final))
        return final

    def _write(
        self, tensors: Tensors, state: TrainState, files: dict[str, bytes], temporary: Path, final: Path
    ) -> None:
        def digest_own() -> Entries:
            # Under DCP's names for the files of a rank.
            return digested(temporary, sorted(temporary.glob(f"__{self.world.rank}_*.distcp")))

        def finish(entries: Entries) -> None:
            for name, content in {TRAIN_STATE: state.to_json().encode(), **files}.items():
                (temporary / name).write_bytes(content)
            self.may_write()
            commit(temporary, final, entries)

        def on_all(work: Callable[[], Result]) -> Result:
            return all_ranks_or_raise(self.world, lambda: self._or_failed(work, final))

        def on_rank_0(work: Callable[[], None]) -> None:
            broadcast_from_rank_0(self.world, lambda: self._or_failed(work, final))

        on_rank_0(lambda: self._make(temporary))
        on_all(lambda: _save_tensors(tensors, temporary, self.world))
        entries = all_gather_dict(self.world, on_all(digest_own))
        on_rank_0(lambda: finish(entries))

    def _make(self, temporary: Path) -> None:
        """Make the temporary folder, and remove those that earlier attempts left."""
        self.may_write()
        if self._committed and not self.folder.exists():
            logger.warning("%s was removed, and the checkpoints with it; it is made again", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("step-*", "replaced-step-*"):
            for leftover in self.folder.glob(TEMPORARY_PREFIX + kind):
                remove(leftover)
        temporary.mkdir()

    def _or_failed(self, work: Callable[[], Result], final: Path) -> Result:
        """`work()`; an error of the disk or of DCP becomes a RunFailed."""
        try:
            return work()
        except (OSError, RuntimeError, CheckpointException) as error:
            self.may_write()  # a folder that is gone, or another run's, is not the disk's fault
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            free = ""
            with suppress(OSError):  # a failing disk may refuse this as well
                existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
                free = f"; {shutil.disk_usage(existing).free / 2**30:.1f} GiB are free there"
            free += limit_of_files()
            raise RunFailed(f"{final} could not be written ({reason}){free}") from error

    def newest_intact(self, usable: Callable[[Path], None] = lambda path: None) -> Path | None:
        """The newest intact checkpoint; None if there is no checkpoint at all. The same on all ranks.

        All ranks call it and share the reading. Damaged checkpoints are skipped with a warning, and so are those for
        which `usable(path)`, called on rank 0, raises a UserError. Raises UserError if none is left, because a run must
        not silently start again from nothing.
        """
        problems: dict[Path, str] = {}
        newest = None
        for path in broadcast_from_rank_0(self.world, self._candidates):
            problem = self._damaged_before.get(path) or self._problem(path, usable)
            if problem is None:
                newest = path
                break
            problems[path] = problem
        if problems and newest is None:
            raise UserError(
                "there is no intact checkpoint; restore one of these, or train again with another job.dump_folder:",
                *(f"  {path}: {problem}" for path, problem in problems.items()),
            )
        for path, problem in problems.items():
            if path not in self._damaged_before:
                self._skip(path, problem)
        return newest

    def load_first(self, paths: Iterable[Path], load: Callable[[Path], None]) -> Path | None:
        """Load the first of `paths` that is intact and of which `load(path)` raises no UserError; None: there is none.

        All ranks call it; the others are skipped with a warning.
        """
        for path in paths:
            try:
                if problem := self._problem(path):
                    self._skip(path, problem)
                    continue
                load(path)
                return path
            except UserError as error:
                logger.warning("checkpoint skipped: %s", error)
        return None

    def _problem(self, path: Path, usable: Callable[[Path], None] = lambda path: None) -> str | None:
        """What is wrong with a checkpoint; all ranks share the reading. Raises UnknownGroup: it is not damaged."""
        try:
            require_intact(path, self.world, self._known)
            broadcast_from_rank_0(self.world, lambda: usable(path))
        except UnknownGroup:
            raise
        except UserError as error:
            problem = "; ".join(str(line).strip() for line in error.args)
            return problem if len(problem) < _LONGEST else problem[:_LONGEST] + "..."
        return None

    def _skip(self, path: Path, problem: str) -> None:
        """Warn of a damaged checkpoint, and remember it."""
        self._damaged[path] = problem
        if self.world.is_rank_0:
            logger.warning("checkpoint skipped: %s: %s", path, problem)

    @contextmanager
    def loading(self, path: Path | None) -> Iterator[None]:
        """Turn Damaged, raised on every rank while a result of `newest_intact` is loaded, into DamagedCheckpoints.

        Nothing else may have happened since, because the run then begins again without this checkpoint. For None, and
        for a checkpoint of another run, it stays what it is.
        """
        try:
            yield
        except Damaged as error:
            if path is None or path.parent != self.folder:
                raise
            self._skip(path, str(error))
            raise DamagedCheckpoints(self._damaged_before | self._damaged) from None

    def peek(self, path: Path, tensors: Tensors) -> tuple[int, Config] | None:
        """Read step and configuration of a checkpoint, and into `tensors` those that it holds, without its digests.

        Called by a single rank. None, with a warning, if the checkpoint cannot be read.
        """
        try:
            read_manifest(path)
            if problem := misnamed(path):
                raise Damaged(problem)
            load_tensors(path, {}, optional=tensors)
            return read_train_state(path).step, load_config(path / CONFIG)
        except Damaged as error:
            logger.warning("checkpoint skipped: %s: %s", path, error)
        except (Exception, CheckpointException) as error:  # whatever the reader of a damaged pickle or zip raises
            logger.warning("checkpoint skipped: %s cannot be read (%s)", path, error)
        return None

    def finished(self) -> list[Path]:
        """The paths that are named as checkpoints are, newest first. UserError if the folder cannot be read."""
        return [path for path in self._candidates() if path.name == name_of(_step_of(path))]

    def _candidates(self) -> list[Path]:
        """`finished`, and checkpoints that were renamed to similar names, which are reported and never used."""
        try:
            found = [path for path in self.folder.iterdir() if _NAMED.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):  # saving refuses a file at this path
            return []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read ({error.strerror}), so nothing can be resumed") from None
        named = [path for path in found if path.name == name_of(_step_of(path)) or os.path.lexists(path / MANIFEST)]
        return sorted(named, key=lambda path: (_step_of(path), path.name != name_of(_step_of(path))), reverse=True)

    def _retain(self, committed: Path) -> None:
        """Remove the checkpoints that retention does not keep; only warns if that fails."""
        try:
            self._remove_others(committed)
        except (OSError, UserError) as error:
            logger.warning("no older checkpoints were removed: %s", error)

    def _remove_others(self, committed: Path) -> None:
        """Remove the checkpoints older than `committed` that neither keep_latest nor keep_every keeps.

        This run did not write what has the name of a later step: it neither counts nor is removed.
        """
        older = [path for path in self.finished() if _step_of(path) < _step_of(committed)]
        # Damaged ones neither count as kept nor are removed, because they may be all that is left of a step. The same
        # holds for folders to which a file was added, and for copies under the name of another step.
        ours = [committed, *filter(self._is_removable, older)]
        others = ours[self.keep_latest :] if self.keep_latest else []
        protected = self.protected(ours[: self.keep_latest], others) if others else ()
        for path in others:
            if path in protected or (self.keep_every and _step_of(path) % self.keep_every == 0):
                continue
            # Renamed first, because a crash while deleting must not leave part of a folder under a checkpoint's name.
            try:
                doomed = path.rename(path.with_name(TEMPORARY_PREFIX + path.name))
            except OSError as error:
                logger.warning("%s is one too many, but could not be removed (%s)", path, error.strerror)
                continue
            shutil.rmtree(doomed, ignore_errors=True)

    def _is_removable(self, path: Path) -> bool:
        if problem := misnamed(path):
            logger.warning("%s is left alone: %s", path, problem)
        return (
            not problem and path not in self._damaged_before | self._damaged and is_ours(path) and has_its_sizes(path)
        )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _save_tensors(tensors: Tensors, folder: Path, world: World) -> None:
    # From the host DCP must copy nothing ahead, because it would wait for all work of the GPU at every few tensors. And
    # one thread writes, because DCP does not notice the errors of further ones.
    on_gpu = any(local(each).is_cuda for group in tensors.values() for each in group.values())
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=_COPIED_AHEAD if on_gpu else 0)
    dcp.save({**tensors}, storage_writer=writer, no_dist=world.size == 1, process_group=world.host_group)


def find_checkpoint(
    name: str, known: Declared, usable: Callable[[Path], None] = lambda path: None, world: World | None = None
) -> Path:
    """The checkpoint folder `name`, or the newest intact one of the dump folder `name` that is also usable.

    All ranks call this. Raises UserError if there is none, if the one asked for is damaged, or if `usable(path)`, which
    rank 0 calls, raises it.
    """
    path, world = Path(name), world or World.alone()
    if broadcast_from_rank_0(world, lambda: _is_checkpoint(path)):
        try:
            require_intact(path, world, known)
        except Damaged as error:
            raise UserError(f"{path}: {error}") from None
        broadcast_from_rank_0(world, lambda: usable(path))
        return path
    newest = Checkpoints(path / "checkpoints", keep_latest=0, world=world, known=known).newest_intact(usable)
    if newest is None:
        raise UserError(f"{path}: neither a checkpoint nor the dump folder of a run that has one")
    return newest


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as one checkpoint; links and pipes in place of its files count, and are refused."""
    has = {name: os.path.lexists(path / name) for name in (MANIFEST, CONFIG, "checkpoints")}
    return has[MANIFEST] or (has[CONFIG] and not has["checkpoints"])
