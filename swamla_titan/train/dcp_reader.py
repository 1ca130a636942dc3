"""Reading torch.distributed.checkpoint's folders without running what is in them."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from swamla_titan.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    # Where the checkpoint was written; Python 3.13 has moved the class.
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder, for one that may come from anybody.

    The index of a DCP checkpoint, `.metadata`, is a pickle, and a pickle can call any function. Here it can only build
    what an index consists of. The tensors themselves DCP reads with `weights_only`. Raises UserError for a pickle that
    asks for more or is none.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index: of each tensor its type and shape, and where its chunks are."""
        path = Path(self.path) / filesystem._metadata_fn
        try:
            with path.open("rb") as file:
                index = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the index of a checkpoint ({error}); it is not loaded") from None
        if not isinstance(index, metadata.Metadata):
            raise UserError(f"{path}: not the index of a checkpoint; it is not loaded")
        index.storage_meta = index.storage_meta or metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def _memory_format(kind: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("it asks for builtins.getattr of what is no memory format")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
