"""Reading torch.distributed.checkpoint's folders without running what is in them, and without trusting it."""

import dataclasses
import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from swamla_titan.checkpoint.manifest import INDEX, MOST_INDEX
from swamla_titan.checkpoint.tensor_index import require_covered
from swamla_titan.checkpoint.unpickler import StrictUnpickler
from swamla_titan.errors import UserError
from swamla_titan.system.bounded import read_regular


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder, for one that may come from anybody.

    The index of a DCP checkpoint, `.metadata`, is a pickle, and a pickle can call any function. Here it can only build
    what an index consists of, and its chunks must cover each tensor exactly. The tensors themselves DCP reads with
    `weights_only`. Raises UserError for an index that asks for more, or is none.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index: of each tensor its type and shape, and where its chunks are."""
        path = Path(self.path) / INDEX
        try:
            status = os.lstat(path)
            index = _read(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (pickle.UnpicklingError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not the index of a checkpoint ({error}); it is not loaded") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return dataclasses.replace(index, storage_meta=metadata.StorageMeta(load_id=self.load_id))


@functools.lru_cache(maxsize=1)  # what begins with a checkpoint asks for its index several times
def _read(path: Path, *version: int) -> metadata.Metadata:
    index = StrictUnpickler(read_regular(path, MOST_INDEX), _names(), _CALLED, _CLASSES).value()
    if type(index) is not metadata.Metadata:
        raise ValueError("it is something else")
    require_covered(index)
    return index


def _memory_format(kind: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
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
    # Where the checkpoint was written; Python 3.13 has moved the class.
    found |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
    found |= {(module, "PurePosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
    return found


def _layout(name: Any) -> torch.layout:
    if name != str(torch.strided):
        raise pickle.UnpicklingError("it holds a tensor that is not dense")
    return torch.strided


def _with_fields(cls: type, **types: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """Whether a state is a dictionary with fields of a dataclass, those of `types` of one of these types."""
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
