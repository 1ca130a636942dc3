"""Whether a checkpoint is as this program wrote it: asked before anything of it is loaded, wherever one is chosen.

Digests say that nothing has changed by accident. They do not say that this program made it: a checkpoint may come from
anybody, who can make digests fit. So everything that is read of one is held against what it must be, within bounds,
and against the rest of it: its name, its configuration, its index, its files.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from swamla_titan.checkpoint.data_record import read_data_record
from swamla_titan.checkpoint.manifest import Entries, first_changed, holds_tensors, misnamed, read_manifest
from swamla_titan.checkpoint.random_state import random_state_problem
from swamla_titan.checkpoint.reader import Reader
from swamla_titan.checkpoint.tensor_index import chunk_problem, require_stored
from swamla_titan.checkpoint.tensor_names import tensors_of
from swamla_titan.checkpoint.train_state import Record, read_record
from swamla_titan.config import Config, load_config
from swamla_titan.distributed.agreement import all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import Damaged, UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import AveragedWeights, build_optimizer
from swamla_titan.system.bounded import fit, read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "config.toml"
_MOST_CONFIG = 1 << 20  # bytes
_MOST_STATE = 1 << 20  # elements of what is no weight and no optimizer's


def require_whole(path: Path, world: World) -> None:
    """Raise Damaged, on every rank, if anything of a checkpoint is not as it must be; all ranks share the reading."""
    entries, record = broadcast_from_rank_0(world, lambda: _readable(path))
    large = {name: entry for name, entry in entries.items() if holds_tensors(name)}
    _require_none(all_gather_dict(world, {world.rank: first_changed(path, large, world.rank, world.size)}))
    index = all_ranks_or_raise(world, lambda: Reader(path).read_metadata())
    _require_none(all_gather_dict(world, {world.rank: chunk_problem(path, index, world.rank, world.size)}))
    broadcast_from_rank_0(world, lambda: _require_states(path, index, record.step))


def _require_none(found: dict[int, tuple[int, str] | None]) -> None:
    """Of what the ranks found, raise what one process alone would have come upon first."""
    problems = [each for each in found.values() if each is not None]
    if problems:
        raise Damaged(min(problems)[1])


def _readable(path: Path) -> tuple[Entries, Record]:
    """The manifest and the record, once all but the large files is looked through."""
    entries = read_manifest(path)
    changed = first_changed(path, {name: entry for name, entry in entries.items() if not holds_tensors(name)})
    if changed:
        raise Damaged(changed[1])
    try:
        record = read_record(path)
        read_data_record(path)
        if problem := misnamed(path):
            raise Damaged(problem)
        index = Reader(path).read_metadata()
        require_stored(index, {name: entry["bytes"] for name, entry in entries.items()})
        if CONFIG in entries:
            _require_configured(path / CONFIG, record, index.state_dict_metadata)
    except (UserError, ValueError) as error:
        raise Damaged(str(error).removeprefix(f"{path}/")) from None
    except (RecursionError, MemoryError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None
    return entries, record


def _require_configured(path: Path, record: Record, stored: dict[str, Any]) -> None:
    """Raise ValueError unless the record is of the model that the configuration has, and its tensors are there."""
    tables = fit(dict[str, dict[str, Any]], tomllib.loads(read_regular(path, _MOST_CONFIG).decode()), CONFIG)
    model = {f"model.{name}": value for name, value in tables.get("model", {}).items()}
    of_record = {name: value for name, value in record.identity.items() if name.startswith("model.")}
    for name, value in of_record.items():
        if name not in model or model[name] != value:
            raise ValueError(f"{CONFIG} and the record differ in {name[:80]}")
    try:
        config = load_config(path)
    except UserError:
        return  # of another version of this program; a resumed run goes by its own configuration
    if not of_record:
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


def _expected(config: Config) -> dict[str, torch.Tensor]:
    """What a run with this configuration saves of model, optimizer and average, by name; without memory."""
    try:
        with torch.device("meta"):
            model = SWAMLAModel(config.model)
        optimizers = [build_optimizer(model, config.optimizer, None, False)]
        ema = AveragedWeights([model], config.ema.decay, False) if config.ema.decay else None
        groups = tensors_of([model], optimizers, ema)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{CONFIG} describes no model ({str(error).splitlines()[0][:200]})") from None
    return {f"{group}.{name}": tensor for group, members in groups.items() for name, tensor in members.items()}


def _require_states(path: Path, index: metadata.Metadata, step: int) -> None:
    """Raise Damaged unless random states, history of bad steps and loss scale are such; they are small."""
    groups: dict[str, dict[str, torch.Tensor]] = {"random": {}, "bad_steps": {}, "loss_scale": {}}
    for name, entry in index.state_dict_metadata.items():
        group, _, rest = name.partition(".")
        if group in groups and isinstance(entry, metadata.TensorStorageMetadata):
            if math.prod(entry.size) > _MOST_STATE:
                raise Damaged(f"{name[:200]} has {math.prod(entry.size)} elements")
            groups[group][rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    groups = {group: members for group, members in groups.items() if members}
    if not groups:
        return
    from swamla_titan.train.policies.bad_steps import BadSteps
    from swamla_titan.train.policies.loss_scale import LossScale

    dcp.load(groups, storage_reader=Reader(path), no_dist=True)
    checks = {
        "random": random_state_problem,
        "bad_steps": lambda state: BadSteps.problem(state, step),
        "loss_scale": LossScale.problem,
    }
    for group, members in groups.items():
        if problem := checks[group](members):
            raise Damaged(f"{group}.{problem}")
