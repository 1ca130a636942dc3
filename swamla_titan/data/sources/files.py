"""Files to read: on disk or, by fsspec, in an object store (s3://, gs://, hf://, ...); compressed or not."""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import pyarrow as pa

from swamla_titan.data.faults import (
    DataFault,
    Fault,
    Unreachable,
    network_fault,
    of_another_size,
    one_line,
    refused,
)
from swamla_titan.data.sources.content import HEAD_BYTES, other_than_text
from swamla_titan.errors import UserError

# Compressed files by their endings. They have no index, so each is read from its beginning.
DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: pa.CompressedInputStream(file, "zstd"),
}
_CALLED = {".gz": "gzip data", ".bz2": "bzip2 data", ".xz": "xz data", ".zst": "Zstandard data"}  # in content.py
# What decompressors raise for invalid bytes; of OSErrors, those without a number.
_INVALID = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid, OSError)

_REMOTE_BLOCK = 1 << 20  # bytes of a request at least, and held for each open file of a store
_LARGEST_BLOCK = 1 << 20  # bytes of a compressed block, of which nothing is known before its end
_MOST_HEAD = 16 << 20  # bytes that the head of a compressed file is decompressed to at most

_VERSION = ("size", "ETag", "etag", "blob_id", "mtime")  # as stores call what shows that a file was written again
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # by protocol, the extra of this package that reads it


def is_url(path: str) -> bool:
    """Whether fsspec reads a path, and not the operating system; never from web servers, which have no folders."""
    return "://" in path and not path.startswith(("http://", "https://", "ftp://"))


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there; UserError if there is none.

    Credentials, endpoints and other settings are those of the environment and of fsspec's configuration files.
    """
    import fsspec

    try:
        # Listings that it keeps would hide that a file has changed.
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(url.rpartition("::")[2].partition("://")[0])
        advice = f": pip install 'swamla-titan[{extra}]'" if extra else ""
        raise UserError(f"{url} cannot be read: {one_line(error)}{advice}") from None
    return system, path


def compression(name: str) -> str:
    """The ending by which a file's name says that it is compressed; "" if it does not."""
    return next((ending for ending in DECOMPRESSORS if name.lower().endswith(ending)), "")


def is_folder(url: str) -> bool:
    """Whether a URL is that of a folder of a store, and not of a file; FileNotFoundError if it is neither."""
    system, root = file_system(url)
    return bool(system.info(root.rstrip("/"))["type"] != "file")


def files_below(url: str) -> dict[str, int] | None:
    """{name: bytes} of the files below a folder of a store, without hidden ones; None if the URL is that of a file."""
    if not is_folder(url):
        return None
    system, root = file_system(url)
    root = root.rstrip("/")
    # Not `find`, which leaves out, without a word, folders that cannot be listed now.
    folders = system.walk(root, detail=True, on_error="raise")
    entries = (entry for _, _, files in folders for entry in files.values())
    found = {entry["name"].removeprefix(root).lstrip("/"): int(entry["size"]) for entry in entries}
    # Names that end in "/" stand for folders in tools that show a store as one.
    return {name: found[name] for name in sorted(found) if not re.search(r"(^|/)\.|/$|^$", name)}


def open_file(path: str) -> Any:
    """Open a file to read its bytes, as they are; raises whatever the operating system or fsspec raises."""
    if not is_url(path):
        return open(path, "rb")
    system, name = file_system(path)
    return _StoreFile(system.open(name, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead"))


class _StoreFile(io.RawIOBase):
    """A file of a store; raises ConnectionError where the store answers with less than it was asked for."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def readinto(self, buffer: Any) -> int:
        at = self._file.tell()
        data = self._file.read(len(buffer))
        expected = min(len(buffer), self._file.size - at)
        if len(data) < expected:
            raise ConnectionError(f"{len(data)} bytes came from byte {at} on, of {expected} that were asked for")
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(at, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def opened(path: str, compressed: str = "") -> Iterator[Any]:
    """Open a file to be read, decompressed if it is `compressed` (an ending). Errors inside are raised as Faults."""
    with reading(path, compressed), open_file(path) as file:
        if not compressed:
            yield file
            return
        with DECOMPRESSORS[compressed](file) as decompressed:
            yield decompressed


@contextmanager
def reading(path: str, compressed: str = "") -> Iterator[None]:
    """Raise errors inside, where the file at `path` is read, as Faults."""
    try:
        yield
    except (Fault, UserError):
        raise
    except Exception as error:
        fault = store_fault(path, "", error) if is_url(path) else None
        if fault is None and compressed and isinstance(error, _INVALID) and getattr(error, "errno", None) is None:
            fault = _invalid(path, compressed, error)
        elif fault is None and is_url(path):
            fault = network_fault(path, "", error)
        elif fault is None and isinstance(error, OSError):
            fault = refused(path, "", error)
        if fault is None:
            raise
        raise fault from error


def store_fault(path: str, place: str, error: Exception) -> Fault | None:
    """The fault of a store that does not answer, or has no such file; None for errors that may be the file's own."""
    fault = network_fault(path, place, error)
    return fault if isinstance(fault, Unreachable) or not fault.may_pass else None


def _invalid(path: str, compressed: str, error: Exception) -> DataFault:
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    return _not_whole(path, compressed, "they end too early" if cut else f"{one_line(error)}")


def _not_whole(path: str, compressed: str, found: str) -> DataFault:
    reason = f"its {compressed} data are not whole ({found})"
    return DataFault(path, "", reason, "Write or download it again, or remove it", may_pass=True)


def size_of(path: str) -> int:
    """The size of a file in bytes; raises its Fault if it cannot be asked for."""
    with reading(path):
        if not is_url(path):
            return os.path.getsize(path)
        system, name = file_system(path)
        return int(system.size(name))


def version_of(path: str) -> str:
    """What changes if a file is written again, even with the same size; raises its Fault if it cannot be asked for."""
    with reading(path):
        if not is_url(path):
            status = os.stat(path)
            return f"{status.st_size} {status.st_mtime_ns}"
        system, name = file_system(path)
        found = system.info(name)
        return " ".join(str(found[key]) for key in _VERSION if key in found)


def require_size(path: str, size: int) -> None:
    """Raise DataFault if a file has grown since it had `size` bytes; one that was cut is read up to its end.

    In an object store one of another size is another file, because there none is cut.
    """
    now = size_of(path)
    if now > size or (is_url(path) and now != size):
        raise of_another_size(path, size, now)


def head_of(path: str) -> bytes:
    """The first HEAD_BYTES of a file."""
    with opened(path) as file:
        return bytes(file.read(HEAD_BYTES))


def decompressed_head(path: str, compressed: str) -> tuple[bytes, float]:
    """What the beginning of a compressed file holds, and how many bytes of text a byte of it stands for.

    DataFault if the file is not what its ending says.
    """
    with opened(path) as file:
        head = bytes(file.read(HEAD_BYTES))
        found = _decompressed(head, compressed)
        if not found and len(head) == HEAD_BYTES:  # not yet the end of the first block, which bzip2 needs
            head += file.read(_LARGEST_BLOCK)
            found = _decompressed(head, compressed)
    if head and found is None:
        other = other_than_text(head)
        if other and other.what == _CALLED[compressed]:
            raise _not_whole(path, compressed, "they end too early, or are damaged")
        begins = other.what if other else f"begins with {head[:20]!r}"
        advice = "Write or download it again, give it the ending of what it is, or remove it"
        raise DataFault(path, "", f"it is not whole {compressed} data but {begins}", advice)
    return found or b"", len(found or b"") / max(1, len(head))


def _decompressed(head: bytes, compressed: str) -> bytes | None:
    """What the beginning of a compressed file holds, as far as it can be decompressed; None if that is nothing."""
    found, is_whole = bytearray(), False
    with suppress(*_INVALID), DECOMPRESSORS[compressed](io.BytesIO(head)) as file:
        while len(found) < _MOST_HEAD and (part := file.read(HEAD_BYTES)):
            found += part
        is_whole = True
    return bytes(found) if found or is_whole else None
