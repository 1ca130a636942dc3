"""Files to read: on disk or, by fsspec, in an object store (s3://, gs://, hf://, ...); compressed or not."""

import bz2
import gzip
import io
import lzma
import os
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
# What decompressors raise for invalid bytes; of OSErrors, those without a number.
_INVALID = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid, OSError)

_REMOTE_BLOCK = 1 << 20  # bytes of a request at least, and held for each open file of a store
_LARGEST_BLOCK = 1 << 20  # bytes of a compressed block, of which nothing is known before its end
_MOST_HEAD = 16 << 20  # bytes that the head of a compressed file is decompressed to at most

_STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # by protocol, the package that reads them


def is_url(path: str) -> bool:
    """Whether fsspec reads a path, and not the operating system."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there; UserError if there is none.

    Credentials, endpoints and other settings are those of the environment and of fsspec's configuration files.
    """
    import fsspec

    try:
        # Listings that it keeps would hide that a file has changed.
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        package = _STORES.get(url.partition("://")[0])
        advice = f". Install it: pip install {package}" if package else ""
        raise UserError(f"{url} cannot be read: {one_line(error)}{advice}") from None
    return system, path


def compression(name: str) -> str:
    """The ending by which a file's name says that it is compressed; "" if it does not."""
    return next((ending for ending in DECOMPRESSORS if name.lower().endswith(ending)), "")


@contextmanager
def opened(path: str, compressed: str = "") -> Iterator[Any]:
    """Open a file to be read, decompressed if it is `compressed` (an ending). Errors inside are raised as Faults."""
    with reading(path, compressed):
        if is_url(path):
            system, name = file_system(path)
            file = system.open(name, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
        else:
            file = open(path, "rb")  # noqa: SIM115
        with file:
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
        fault = network_fault(path, "", error) if is_url(path) else None
        is_invalid = bool(compressed) and isinstance(error, _INVALID) and getattr(error, "errno", None) is None
        if is_invalid and not isinstance(fault, Unreachable):
            fault = _invalid(path, compressed, error)
        elif fault is None and isinstance(error, OSError):
            fault = refused(path, "", error)
        if fault is None:
            raise
        raise fault from error


def _invalid(path: str, compressed: str, error: Exception) -> DataFault:
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    found = "they end too early" if cut else f"{one_line(error)}"
    return DataFault(
        path,
        "",
        f"its {compressed} data are not whole ({found})",
        "Write or download it again, or remove it",
        may_pass=True,
    )


def size_of(path: str) -> int:
    """The size of a file in bytes; raises its Fault if it cannot be asked for."""
    with reading(path):
        if not is_url(path):
            return os.path.getsize(path)
        system, name = file_system(path)
        return int(system.size(name))


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
    if head and not found:
        other = other_than_text(head)
        begins = other.what if other else f"begins with {head[:20]!r}"
        advice = "Write or download it again, give it the ending of what it is, or remove it"
        raise DataFault(path, "", f"it is not whole {compressed} data but {begins}", advice)
    return found, len(found) / max(1, len(head))


def _decompressed(head: bytes, compressed: str) -> bytes:
    """What the beginning of a compressed file holds, as far as it can be decompressed."""
    found = bytearray()
    with suppress(*_INVALID), DECOMPRESSORS[compressed](io.BytesIO(head)) as file:
        while len(found) < _MOST_HEAD and (part := file.read(HEAD_BYTES)):
            found += part
    return bytes(found)
