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
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from swamla_titan.errors import RunFailed, UserError
from swamla_titan.machine import limit_of_files
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import AveragedWeights
from swamla_titan.parallel.agreement import agree, from_first, merged
from swamla_titan.parallel.sharded import local, plain
from swamla_titan.parallel.world import World
from swamla_titan.train.dcp_reader import Reader
from swamla_titan.train.manifest import (
    TEMPORARY_PREFIX,
    Entries,
    commit,
    digested,
    first_damage,
    has_its_sizes,
    is_ours,
    remove,
)
from swamla_titan.train.record import RECORD, Record

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_EMA = "ema"
CONFIG = "config.toml"
VOCABULARY = "tokenizer.tiktoken"
# One process without a process group saves and loads alone. For good, because filters belong to all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_COPIED_AHEAD = 10_000_000  # bytes

_NAME = re.compile(r"step-(\d{8,})")


def tensors_of(
    parts: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    ema: AveragedWeights | None = None,
) -> dict[str, Any]:
    """The live tensors to save or to load into, by name; loading writes them in place.

    `parts` are the model, or the pipeline stages that this rank holds, each with its optimizer. Names and shapes are
    those of the whole model whatever the plan, so a checkpoint of one plan loads into any other. A tied output head
    goes by the embedding's name: on a stage that holds it alone it is a copy. Of the optimizer only tensors are taken:
    learning rates and the like follow from the configuration and the step.
    """
    tensors: dict[str, Any] = {"model": {}} | ({"optimizer": {}} if optimizers else {}) | ({_EMA: {}} if ema else {})
    for part in parts:
        for name, weight in get_model_state_dict(part).items():
            tensors["model"].setdefault(_stored_name(name, part), plain(weight))
    for part, optimizer in zip(parts, optimizers):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for name, value in get_optimizer_state_dict(part, optimizer, options=options).items():
            if isinstance(value, torch.Tensor):
                tensors["optimizer"].setdefault(_stored_name(name, part), value)
    if ema:
        for part in parts:
            tensors[_EMA] = ema.of_part(part) | tensors[_EMA]
    return tensors


def holds_ema(path: Path) -> bool:
    """Whether a checkpoint has an average of the weights beside them."""
    return any(name.startswith(f"{_EMA}.") for name in Reader(path).read_metadata().state_dict_metadata)


def load_weights(path: Path, model: nn.Module, ema: bool = False) -> None:
    """Fill a whole model with the weights of a checkpoint, or with their average; UserError if it has none."""
    if ema and not holds_ema(path):
        raise UserError(f"{path} holds no average of the weights: it was trained with ema.decay = 0")
    load_tensors(path, {_EMA if ema else "model": tensors_of([model])["model"]})


def _stored_name(name: str, part: nn.Module) -> str:
    tied = isinstance(part, SWAMLAModel) and part.config.tie_embeddings
    return re.sub(r"(^|\.)head\.weight", r"\1embedding.weight", name) if tied else name


class Checkpoints:
    """The checkpoints of one run, under `folder`."""

    def __init__(self, folder: Path, keep_latest: int, world: World | None = None, keep_every: int = 0) -> None:
        """Kept are the newest `keep_latest` whole ones (0: all), and those of every `keep_every`-th step (0: none)."""
        self.folder = folder
        self.keep_latest, self.keep_every = keep_latest, keep_every
        self.world = world or World.alone()
        self._damaged: set[Path] = set()  # found so by is_whole
        # Given those that retention keeps, and the others: which of these it leaves alone. Asked on the first rank.
        self.spared: Callable[[Sequence[Path], Sequence[Path]], Collection[Path]] = lambda kept, others: ()

    def save(self, tensors: dict[str, Any], record: Record, files: dict[str, bytes]) -> Path:
        """Write and commit one checkpoint, then remove the oldest beyond those to keep; returns its folder.

        All ranks write their parts of `tensors` and digest what they wrote; the first one writes the record and
        `files`, stored beside them by name, and commits. Raises RunFailed on every rank, leaving nothing half-written,
        where the disk does not take it.
        """
        final = self.folder / f"step-{record.step:08d}"
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}"

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for kind in ("step-*", "replaced-step-*"):
                for leftover in self.folder.glob(TEMPORARY_PREFIX + kind):
                    remove(leftover)
            temporary.mkdir()

        def finish() -> None:
            (temporary / RECORD).write_text(json.dumps(asdict(record), indent=1))
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            commit(temporary, final, entries)

        def digest_own() -> Entries:
            # By DCP's names for the files of a rank.
            return digested(temporary, sorted(temporary.glob(f"__{self.world.rank}_*.distcp")))

        try:
            from_first(self.world, lambda: self._or_failed(prepare, final))
            agree(self.world, lambda: self._or_failed(lambda: _write(tensors, temporary, self.world), final))
            entries = merged(self.world, agree(self.world, lambda: self._or_failed(digest_own, final)))
            from_first(self.world, lambda: self._or_failed(finish, final))
        except RunFailed:
            # Only now: while one rank fails, others may still be at work in there.
            if self.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._damaged.discard(final)
        from_first(self.world, self._retain)
        return final

    def _or_failed(self, work: Callable[[], Result], final: Path) -> Result:
        """`work()`; what the disk or DCP raises becomes a RunFailed."""
        try:
            return work()
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            free = ""
            with suppress(OSError):  # a disk that is ill may refuse this as well
                existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
                free = f"; {shutil.disk_usage(existing).free / 2**30:.1f} GiB are free there"
            free += limit_of_files()
            raise RunFailed(f"{final} could not be written ({reason}){free}") from error

    def newest_whole(self) -> Path | None:
        """The newest undamaged checkpoint; None if there is no checkpoint at all. The same on all ranks.

        All ranks come here and share the reading. Damaged ones are named and passed over. Raises UserError if every one
        is damaged: a run must not silently start again from nothing.
        """
        damaged = []
        for path in from_first(self.world, self.finished):
            problem = self._problem(path)
            if problem is None:
                return path
            damaged.append(f"{path}: {problem}")
        if damaged:
            raise UserError(
                "no whole checkpoint to resume from:",
                *(f"  {line}" for line in damaged),
                "restore one of them, or start anew with another job.dump_folder",
            )
        return None

    def is_whole(self, path: Path) -> bool:
        """Whether a checkpoint is as it was written; one that is not is named. All ranks come here."""
        return self._problem(path) is None

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; all ranks share the reading. One that is damaged is named."""
        found = merged(self.world, {self.world.rank: first_damage(path, self.world.rank, self.world.size)})
        problems = [each for each in found.values() if each is not None]
        if not problems:
            return None
        _, problem = min(problems)  # what one process alone would have come upon
        self._damaged.add(path)
        if self.world.is_first:
            logger.warning("checkpoint passed over: %s: %s", path, problem)
        return problem

    def finished(self) -> list[Path]:
        """What is named like a checkpoint, newest first. UserError if that cannot be seen."""
        try:
            found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):  # a file at this place is refused where it is written
            return []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read ({error.strerror}), so nothing can be resumed") from None
        return sorted(found, key=_step_of, reverse=True)

    def _retain(self) -> None:
        """Remove what is one too many; if that cannot be done, the new checkpoint is whole all the same."""
        try:
            self._remove_others()
        except (OSError, UserError) as error:
            logger.warning("no older checkpoints were removed: %s", error)

    def _remove_others(self) -> None:
        # Damaged ones do not count among those kept, nor are they deleted: they may be all that is left of a step. The
        # same holds for folders to which somebody has added a file.
        ours = [path for path in self.finished() if is_ours(path) and has_its_sizes(path) and path not in self._damaged]
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
    wanted = agree(world, lambda: _found_there(path, tensors))  # a pipeline rank may be refused what others are not
    dcp.load(wanted, storage_reader=Reader(path), no_dist=world.size == 1, process_group=world.host_group)


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
