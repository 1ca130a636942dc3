"""Validation of DCP's index: its chunks cover every element of every tensor, and the files hold these chunks.

DCP fills a tensor with the chunks that the index lists and does not check that they cover it: where one is missing,
memory stays uninitialized. It reads each chunk with torch.load, which trusts the sizes in the chunk.
"""

import functools
import io
import itertools
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata

from swamla_titan.checkpoint.manifest import holds_tensors
from swamla_titan.checkpoint.unpickler import StrictUnpickler

_CELLS = 1 << 24  # of the grid that the borders of a tensor's chunks form
_ELEMENTS = 2**60
# Records of the archive in which torch.save stores a tensor.
_MEMORY = "data/0"
_RECORDS = (
    _MEMORY,
    "data.pkl",
    "byteorder",
    "version",
    ".data/serialization_id",
    ".format_version",
    ".storage_alignment",
)
_MOST_SMALL = 1 << 16  # bytes of a record but the memory; 200 are usual


def require_covered(index: metadata.Metadata) -> None:
    """Raise ValueError unless the chunks of each tensor cover it exactly once, and each is in a file."""
    if type(index.state_dict_metadata) is not dict or type(index.storage_data) is not dict:
        raise ValueError("it lists no tensors")
    for name, entry in index.state_dict_metadata.items():
        if type(name) is not str:
            raise ValueError("it has a tensor without a name")
        if type(entry) is metadata.BytesStorageMetadata:
            continue  # not written by this program, and never loaded
        try:
            _require_tensor(name, entry, index.storage_data)
        except AttributeError as error:
            raise ValueError(f"{name[:200]}: {error}") from None


def _require_tensor(name: str, entry: Any, storage: dict[Any, Any]) -> None:
    shown = name[:200]
    if type(entry) is not metadata.TensorStorageMetadata or type(entry.properties) is not metadata.TensorProperties:
        raise ValueError(f"{shown} is no tensor")
    if not isinstance(entry.properties.dtype, torch.dtype) or not _is_shape(entry.size):
        raise ValueError(f"{shown} has no type or shape")
    if type(entry.chunks) is not list or not all(type(each) is metadata.ChunkStorageMetadata for each in entry.chunks):
        raise ValueError(f"{shown} has no chunks")
    for chunk in entry.chunks:
        if not _is_shape(chunk.offsets) or not _is_shape(chunk.sizes):
            raise ValueError(f"{shown} has a chunk without a place")
        if not len(entry.size) == len(chunk.offsets) == len(chunk.sizes) or any(
            offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size)
        ):
            raise ValueError(f"{shown} of shape {tuple(entry.size)} has a chunk that is not within it")
        info = storage.get(metadata.MetadataIndex(name, chunk.offsets))
        if type(info) is not filesystem._StorageInfo or not _is_stored(info):
            raise ValueError(f"{shown} has a chunk that is in no file of the checkpoint")
        if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > info.length:
            raise ValueError(f"{shown} has a chunk that is longer than what is stored of it")
    _require_cover(shown, entry)


def _is_shape(value: Any) -> bool:
    return type(value) is torch.Size and all(size >= 0 for size in value) and math.prod(value) < _ELEMENTS


def _is_stored(info: Any) -> bool:
    """Whether a chunk's position is well-formed: in a file of this folder, and without transformation of the bytes."""
    name = info.relative_path
    return (
        type(name) is str
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and type(info.offset) is int
        and type(info.length) is int
        and info.offset >= 0
        and info.length >= 0
        and not info.transform_descriptors
    )


def _require_cover(name: str, entry: metadata.TensorStorageMetadata) -> None:
    chunks = [chunk for chunk in entry.chunks if math.prod(chunk.sizes)]
    elements = math.prod(entry.size)
    found = sum(math.prod(chunk.sizes) for chunk in chunks)
    if found != elements:
        raise ValueError(f"{name} has {elements} elements, and its chunks {found}")
    # The numbers of elements are equal, so the chunks cover the tensor unless two of them overlap.
    if len(chunks) > 1 and _overlap([(chunk.offsets, chunk.sizes) for chunk in chunks]):
        raise ValueError(f"{name} has chunks that overlap, and so leave a part of it out")


def _overlap(chunks: list[tuple[torch.Size, torch.Size]]) -> bool:
    """Whether two chunks share an element: marks each in the grid that the borders of all form, which has few cells."""
    dimensions = range(len(chunks[0][0]))
    borders = [
        sorted({border for offsets, sizes in chunks for border in (offsets[d], offsets[d] + sizes[d])})
        for d in dimensions
    ]
    cells = [len(each) - 1 for each in borders]
    if math.prod(cells) > _CELLS:
        return True  # because no parallel plan shards a tensor so finely
    indices = [{border: index for index, border in enumerate(each)} for each in borders]
    taken = np.zeros(cells, dtype=bool)
    for offsets, sizes in chunks:
        block = tuple(slice(indices[d][offsets[d]], indices[d][offsets[d] + sizes[d]]) for d in dimensions)
        if taken[block].any():
            return True
        taken[block] = True
    return False


def require_stored(index: metadata.Metadata, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless the chunks fill the files of these names and sizes exactly, and are in no other."""
    ends = {name: 0 for name in sizes if holds_tensors(name)}
    for key, info in index.storage_data.items():
        if type(key) is not metadata.MetadataIndex or type(info) is not filesystem._StorageInfo or not _is_stored(info):
            raise ValueError("it says of something only half where it is")
        if info.relative_path not in ends:
            raise ValueError(f"{key.fqn[:200]} is in {info.relative_path[:200]}, which is no file of the checkpoint")
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    for name, end in ends.items():
        if end != sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, and the index speaks of {end}")


def chunk_problem(folder: Path, index: metadata.Metadata, start: int, step: int) -> tuple[int, str] | None:
    """Read the chunks start, start + step, ...; returns the index of the first that is not as listed, and a message."""
    chunks = [
        (name, entry.properties.dtype, chunk.sizes, index.storage_data[metadata.MetadataIndex(name, chunk.offsets)])
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
        for chunk in entry.chunks
    ]
    # By file, so that each is opened once.
    order = sorted(range(start, len(chunks), step), key=lambda index: chunks[index][3].relative_path)
    return min(_chunk_problems(folder, chunks, order), default=None)


def _chunk_problems(folder: Path, chunks: list[Any], order: list[int]) -> Iterator[tuple[int, str]]:
    for file_name, indices in itertools.groupby(order, lambda index: chunks[index][3].relative_path):
        with (folder / file_name).open("rb") as file:
            for index in indices:
                name, dtype, sizes, info = chunks[index]
                try:
                    _require_chunk(Window(file, info.offset, info.length), dtype, sizes)
                except _NO_ARCHIVE as error:
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    yield index, f"{file_name} does not hold {name[:200]} as the index has it ({reason})"


# Errors of the readers of archives if a file is none.
_NO_ARCHIVE = (ValueError, KeyError, RuntimeError, OSError, zipfile.BadZipFile, pickle.UnpicklingError)


class Window(io.RawIOBase):
    """A slice of a file, read as a file; DCP's own class is wrong about positions counted from the end."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See io.RawIOBase."""
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """See io.RawIOBase."""
        size = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        read = self._file.readinto(memoryview(buffer)[:size])  # type: ignore[attr-defined]
        self._at += read
        return int(read)


_STORAGES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    "Bool": torch.bool,
}


class _Storage(NamedTuple):
    """Replaces the memory of a tensor while its pickle is validated."""

    dtype: torch.dtype
    elements: int


class _Stored(NamedTuple):
    """Replaces a tensor while its pickle is validated."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _require_chunk(view: Window, dtype: torch.dtype, shape: torch.Size) -> None:
    """Raise an error unless torch.load reads one tensor of this dtype and shape from these bytes and no others."""
    if view.read(4) != b"PK\x03\x04":
        raise ValueError("no archive of torch.save")
    view.seek(0)
    archive = torch._C.PyTorchFileReader(cast(IO[bytes], view))
    records = record_sizes(archive, view)
    for record, size in records.items():
        if record not in _RECORDS or (record != _MEMORY and size > _MOST_SMALL):
            raise ValueError(f"it has a record {record[:80]!r} of {size} bytes")
    small = {record: archive.get_record(record) for record in records if record != _MEMORY}
    if (
        small.get("byteorder", b"little") not in (b"little", b"big")
        or not small.get(".storage_alignment", b"1").isdigit()
    ):
        raise ValueError("its records are not those of torch.save")
    names = _chunk_names()
    found = StrictUnpickler(small["data.pkl"], names, (_stored, dict), persistent=_storage).value()
    if type(found) is not _Stored:
        raise ValueError("no tensor")
    if found.storage.dtype != dtype or found.size != tuple(shape):
        raise ValueError(f"{found.storage.dtype} of shape {found.size}, not {dtype} of shape {tuple(shape)}")
    last = found.offset + sum((size - 1) * stride for size, stride in zip(found.size, found.stride))
    if math.prod(shape) and last >= found.storage.elements:
        raise ValueError("it reaches beyond its memory")
    if records[_MEMORY] != found.storage.elements * dtype.itemsize:
        raise ValueError("its record is of another size than its memory")


def record_sizes(archive: Any, content: Window) -> dict[str, int]:
    """The unpacked size in bytes of each record of an archive, which is in `content`."""
    names = archive.get_all_records()
    if hasattr(archive, "get_record_size"):
        return {name: archive.get_record_size(name) for name in names}
    # An older torch; to unpack the records only for their sizes would take as long as to load them.
    entries = zipfile.ZipFile(cast(IO[bytes], content)).infolist()
    sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if len(sizes) != len(entries) or sizes.keys() != set(names):
        raise ValueError("its records have no names of their own")
    return sizes


@functools.cache
def _chunk_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()}
    names["collections", "OrderedDict"] = dict
    names["torch._utils", "_rebuild_tensor_v2"] = _stored
    return names


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", torch.dtype() as dtype, "0", "cpu", int(elements)) if 0 <= elements < _ELEMENTS:
            return _Storage(dtype, elements)
    raise pickle.UnpicklingError("its memory is not described as torch.save does")


def _stored(*arguments: Any) -> _Stored:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), dict() as hooks) if (
            len(size) == len(stride)
            and offset >= 0
            and not hooks
            and all(type(each) is int and each >= 0 for each in (*size, *stride))
        ):
            return _Stored(storage, offset, size, stride)
    raise pickle.UnpicklingError("it is not described as torch.save does")
