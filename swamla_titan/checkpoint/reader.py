"""Loading tensors from checkpoints, which torch.distributed.checkpoint (DCP) writes, without trusting their content.

Folders that `export` wrote are read as checkpoints that hold weights alone.
"""

import dataclasses
import functools
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from swamla_titan.checkpoint.exported import ExportedWeights, is_exported
from swamla_titan.checkpoint.manifest import INDEX, MOST_INDEX
from swamla_titan.checkpoint.tensor_index import require_covered
from swamla_titan.checkpoint.unpickler import StrictUnpickler
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World, all_ranks_or_raise
from swamla_titan.errors import Damaged, UserError
from swamla_titan.system.bounded import read_regular

# Group -> name within the group -> tensor; a checkpoint stores it as "group.name".
Tensors = Mapping[str, Mapping[str, Tensor]]
_WEIGHTS = "model"  # the group of weights
_SHOWN = 8  # tensors that do not fit, in a message
_PIECE = 1 << 28  # elements of a tensor that are tested at once


def load_tensors(path: Path, tensors: Tensors, world: World | None = None, optional: Tensors | None = None) -> None:
    """Fill `tensors` in place from a checkpoint that may hold more; each rank its shard of each.

    Those of `optional` that the checkpoint lacks, or has in another shape, stay as they are. Raises UserError, on every
    rank, with the names of those of `tensors` that are missing or of another shape on one of them, before any is
    written.
    """
    world = world or World.alone()

    def fitting() -> dict[str, dict[str, Tensor]]:
        require_loadable(path, tensors)
        stored = _shapes(path)
        found = {group: dict(members) for group, members in tensors.items()}
        for group, members in (optional or {}).items():
            if there := {name: each for name, each in members.items() if stored.get(f"{group}.{name}") == each.shape}:
                found[group] = there
        return found

    wanted = all_ranks_or_raise(world, fitting)  # by all, because a rank may lack a tensor of its own pipeline stage
    if is_exported(path):
        all_ranks_or_raise(world, lambda: ExportedWeights(path).load(wanted[_WEIGHTS]))
        return
    try:
        dcp.load(wanted, storage_reader=Reader(path), no_dist=world.size == 1, process_group=world.host_group)
    except CheckpointException as error:  # on every rank
        reasons = [str(each[0]) for each in error.failures.values()]
        raise Damaged(f"{path} cannot be loaded ({reasons[0] if reasons else error})") from error


def require_loadable(path: Path, tensors: Tensors, no_others: bool = False) -> None:
    """Raise UserError unless a checkpoint has all of `tensors`, in their shapes; they may be on the meta device.

    `no_others`: and in their groups no more than these.
    """
    stored = _shapes(path)
    expected = {f"{group}.{name}": each.shape for group, members in tensors.items() for name, each in members.items()}
    problems = []
    for name, shape in expected.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        elif (found := stored[name]) != shape:
            there = "no tensor" if found is None else tuple(found)
            problems.append(f"{name} is {there} there and {tuple(shape)} here")
    others = [name for name in stored if no_others and name.partition(".")[0] in tensors and name not in expected]
    problems += [f"{name[:200]} is there, and not in the model here" for name in others]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UserError(f"{path} holds another model:", *(f"  {line}" for line in problems[:_SHOWN] + more))


def require_finite(path: Path, tensors: Tensors, world: World) -> None:
    """Raise Damaged, on every rank, if loaded tensors hold NaN or infinities, which no run saves; all ranks call it."""
    loaded = [local(tensor.detach()) for group in tensors.values() for tensor in group.values()]
    finite = [is_finite(each) for each in loaded if each.is_floating_point()]
    mine = all(each.item() for each in finite)
    if world.all_reduce_max(float(not mine)):
        raise Damaged(f"{path} holds weights or states of the optimizer that are no finite numbers")


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are, a boolean scalar on their device; in pieces, because torch makes a boolean of each."""
    return torch.stack([piece.isfinite().all() for piece in tensor.reshape(-1).split(_PIECE)]).all()


def stored_groups(path: Path) -> set[str]:
    """The names of the groups that a checkpoint holds."""
    return {name.partition(".")[0] for name in _shapes(path)}


def _shapes(path: Path) -> dict[str, torch.Size | None]:
    """Of each entry by its full name the shape; None: it is no tensor."""
    if is_exported(path):
        return {f"{_WEIGHTS}.{name}": shape for name, shape in ExportedWeights(path).shapes.items()}
    entries = Reader(path).read_metadata().state_dict_metadata
    return {
        name: each.size if isinstance(each, metadata.TensorStorageMetadata) else None for name, each in entries.items()
    }


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder, safe for untrusted ones.

    The index of a DCP checkpoint, `.metadata`, is a pickle, and a pickle can call any function. This reader lets it
    build only the parts of an index, and requires that its chunks cover each tensor exactly. The tensors themselves DCP
    reads with `weights_only`. Raises UserError for anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index: dtype and shape of each tensor, and where its chunks are."""
        path = Path(self.path) / INDEX
        try:
            status = os.lstat(path)
            index = _read(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (pickle.UnpicklingError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not the index of a checkpoint ({error}); it is not loaded") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return dataclasses.replace(index, storage_meta=metadata.StorageMeta(load_id=self.load_id))


@functools.lru_cache(maxsize=1)  # because verification and loading read the index of one checkpoint several times
def _read(path: Path, *version: int) -> metadata.Metadata:
    index = StrictUnpickler(read_regular(path, MOST_INDEX), _names(), _CALLED, _CLASSES).value()
    if type(index) is not metadata.Metadata:
        raise ValueError("it is something else")
    require_covered(index)
    return index


def _memory_format(kind: Any, name: Any) -> Any:
    """Replaces `getattr`, with which Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("it asks for builtins.getattr of what is no memory format")
    return kind[name]


@functools.cache
def _names() -> dict[tuple[str, str], Any]:
    of_dcp = {each.__name__: each for each in (*_CLASSES, metadata._MEM_FORMAT_ENCODING)}
    found: dict[tuple[str, str], Any] = {(each.__module__, name): each for name, each in of_dcp.items()}
    found |= {("torch", name): each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
    found["torch", "Size"] = torch.Size
    found["torch.serialization", "_get_layout"] = _layout
    found["builtins", "getattr"] = _memory_format
    # The path to which the checkpoint was written; Python 3.13 has moved the class.
    found |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
    found |= {(module, "PurePosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
    return found


def _layout(name: Any) -> torch.layout:
    if name != str(torch.strided):
        raise pickle.UnpicklingError("it holds a tensor that is not dense")
    return torch.strided


def _with_fields(cls: type, **types: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """A check whether a state is a dictionary with fields of a dataclass; those in `types` have one of these types."""
    names = {field.name for field in dataclasses.fields(cls)}

    def fits(state: Any) -> bool:
        return (
            type(state) is dict
            and state.keys() <= names
            and all(isinstance(state[name], types[name]) for name in types.keys() & state.keys())
        )

    return fits


_MAYBE_SIZE, _MAYBE_INT = (torch.Size, type(None)), (int, type(None))
_CLASSES: dict[type, Callable[[Any], bool]] = {
    metadata.Metadata: _with_fields(metadata.Metadata),
    metadata.StorageMeta: _with_fields(metadata.StorageMeta),
    metadata.BytesStorageMetadata: lambda state: state == {},
    metadata.TensorStorageMetadata: _with_fields(metadata.TensorStorageMetadata),
    metadata.ChunkStorageMetadata: _with_fields(metadata.ChunkStorageMetadata),
    metadata.TensorProperties: lambda state: type(state) is tuple and len(state) == 5,
    metadata.MetadataIndex: _with_fields(metadata.MetadataIndex, fqn=str, offset=_MAYBE_SIZE, index=_MAYBE_INT),
    filesystem._StorageInfo: _with_fields(filesystem._StorageInfo),
}
_CALLED = (torch.Size, _layout, _memory_format, metadata._MEM_FORMAT_ENCODING, PurePosixPath)
