"""Verification: whether a checkpoint is as this program wrote it, before anything of it is loaded.

Digests show that nothing has changed by accident. They do not show that this program wrote it: a checkpoint may come
from anybody, who can write digests that match. So verification also compares everything that is read with what it must
be, within bounds, and with the rest of the checkpoint: its name, configuration, index and files.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata

from swamla_titan.checkpoint.manifest import CONFIG, Entries, first_changed, holds_tensors, misnamed, read_manifest
from swamla_titan.checkpoint.reader import Reader, load_tensors
from swamla_titan.checkpoint.records import TrainState, read_annex_record, read_data_record, read_train_state
from swamla_titan.checkpoint.state import Average, Declared, Learned, OptimizerStates, Weights
from swamla_titan.checkpoint.tensor_index import chunk_problem, require_stored
from swamla_titan.config import Config, load_config
from swamla_titan.distributed.mesh import World, all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import Damaged, UnknownGroup, UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import AveragedWeights, build_optimizer
from swamla_titan.system.bounded import fit, read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_CONFIG = 1 << 20  # bytes
_MOST_STATE = 1 << 20  # elements of a tensor that was not learned


def require_intact(path: Path, world: World, known: Declared) -> None:
    """Raise Damaged, on every rank, if anything of a checkpoint is not as it must be; all ranks share the reading.

    `known`: the groups of tensors that it may hold, each of which checks its own.
    """
    entries, state = broadcast_from_rank_0(world, lambda: _small_files(path))
    large = {name: entry for name, entry in entries.items() if holds_tensors(name)}
    _require_none(all_gather_dict(world, {world.rank: first_changed(path, large, world.rank, world.size)}))
    index = all_ranks_or_raise(world, lambda: Reader(path).read_metadata())
    _require_none(all_gather_dict(world, {world.rank: chunk_problem(path, index, world.rank, world.size)}))
    broadcast_from_rank_0(world, lambda: _require_states(path, index, state.step, known))


def _require_none(found: dict[int, tuple[int, str] | None]) -> None:
    """Of the problems that the ranks found, raise the first: the one that a single process would find."""
    problems = [each for each in found.values() if each is not None]
    if problems:
        raise Damaged(min(problems)[1])


def _small_files(path: Path) -> tuple[Entries, TrainState]:
    """Verify all files but those of tensors; returns the manifest's entries and the train state."""
    entries = read_manifest(path)
    changed = first_changed(path, {name: entry for name, entry in entries.items() if not holds_tensors(name)})
    if changed:
        raise Damaged(changed[1])
    try:
        state = read_train_state(path)
        read_data_record(path)
        read_annex_record(path)
        if problem := misnamed(path):
            raise Damaged(problem)
        index = Reader(path).read_metadata()
        require_stored(index, {name: entry["bytes"] for name, entry in entries.items()})
        if CONFIG in entries:
            _require_configured(path / CONFIG, state, index.state_dict_metadata)
    except (UserError, ValueError) as error:
        raise Damaged(str(error).removeprefix(f"{path}/")) from None
    except (RecursionError, MemoryError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None
    return entries, state


def _require_configured(path: Path, state: TrainState, stored: dict[str, Any]) -> None:
    """Raise ValueError unless configuration and train state have the same model, and its tensors are stored."""
    tables = fit(dict[str, dict[str, Any]], tomllib.loads(read_regular(path, _MOST_CONFIG).decode()), CONFIG)
    model = _flat("model", tables.get("model", {}))
    fingerprint = {name: value for name, value in state.fingerprint.items() if name.startswith("model.")}
    for name, value in fingerprint.items():
        if name not in model or model[name] != value:
            raise ValueError(f"{CONFIG} and the fingerprint differ in {name[:80]}")
    try:
        config = load_config(path)
    except UserError:
        return  # another version of this program wrote it; a resumed run uses its own configuration
    if not fingerprint:
        return
    if config.model.num_layers > len(stored):
        raise ValueError(f"{CONFIG} has more layers than there are tensors")
    for name, tensor in _expected(config).items():
        entry = stored.get(name)
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"{name} is missing")
        if entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            found, expected = (
                f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
                for dtype, shape in ((entry.properties.dtype, entry.size), (tensor.dtype, tensor.shape))
            )
            raise ValueError(f"{name} is {found}, and by {CONFIG} it is {expected}")


def _flat(section: str, table: dict[str, Any]) -> dict[str, Any]:
    """Keys by their dotted names, of a table and those within it."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{section}.{key}"
        found |= _flat(name, value) if isinstance(value, dict) else {name: value}
    return found


def _expected(config: Config) -> dict[str, torch.Tensor]:
    """The tensors, on the meta device, that a run with this configuration learns, by their names in a checkpoint."""
    try:
        with torch.device("meta"):
            parts = [SWAMLAModel(config.model)]
        optimizer = build_optimizer(parts[0], config.optimizer, None, False)
        groups = [Weights(parts), OptimizerStates(parts, [optimizer], config.optimizer)]
        if config.ema.decay:
            groups.append(Average(parts, AveragedWeights(parts, config.ema.decay, False)))
        return {f"{each.group}.{name}": tensor for each in groups for name, tensor in each.state_dict().items()}
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{CONFIG} describes no model ({str(error).splitlines()[0][:200]})") from None


def _require_states(path: Path, index: metadata.Metadata, step: int, known: Declared) -> None:
    """Raise UnknownGroup for a group that is not `known`, and Damaged where its class finds the content invalid."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in index.state_dict_metadata.items():
        group, _, rest = name.partition(".")
        if group not in known:
            raise UnknownGroup(
                f"{path}: {name[:200]} is of no group of tensors that this version of the program knows. A newer "
                "version wrote it: use that one, or move the checkpoint away to continue from the one before"
            )
        if issubclass(known[group], Learned) or not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        if math.prod(entry.size) > _MOST_STATE:
            raise Damaged(f"{name[:200]} has {math.prod(entry.size)} elements")
        found.setdefault(group, {})[rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    if found:
        load_tensors(path, found)
    for group, members in found.items():
        if problem := known[group].problem(members, step):
            raise Damaged(f"{group}.{problem}")
