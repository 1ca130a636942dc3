"""The files of a checkpoint and its manifest: the manifest is written last, then the folder gets its name by a rename.

One process takes minutes to digest the files of a large model, so the ranks share the work: each digests the files that
it wrote, and on loading every k-th of all.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from swamla_titan.errors import Damaged
from swamla_titan.system.bounded import Within, fit, parse_json, read_regular, regular_size

MANIFEST = "manifest.json"
INDEX = ".metadata"  # of torch.distributed.checkpoint (DCP)
TRAIN_STATE = "train.json"
CONFIG = "config.toml"
DATA = "data.json.gz"
VOCABULARY = "tokenizer.tiktoken"
ANNEX_RECORD = "annexes.json.gz"
NEEDED = (INDEX, TRAIN_STATE)  # every checkpoint has them
OPTIONAL = (CONFIG, DATA, VOCABULARY, ANNEX_RECORD)
TEMPORARY_PREFIX = ".tmp-"
FORMAT = "swamla-titan checkpoint 1"
PIECE = 1 << 24  # bytes
_THREADS = 8  # that digest a file: one of them digests less than 2 GB/s, fast disks read more
# The most bytes of files without tensors: longer ones are not read, not even to digest them.
MOST_TRAIN_STATE = 64 << 20  # with 100,000 streams it has 20 MB
MOST_INDEX = 512 << 20  # of 1,000 tensors in 256 chunks each it has 50 MB
_MOST_OTHER = 64 << 20  # a manifest of 100,000 files has 15 MB

# The two kinds of digest, by their names in the manifest: of a small file's content, as sha256sum makes it; of a larger
# file the digest of the digests (binary, 32 bytes) of its pieces of 16 MiB, which several threads compute.
_OF_CONTENT, _OF_PIECES = "sha256", "sha256_of_16_mib_pieces"
# File name in the folder -> {"bytes": size, and the digest under its kind}.
Entries = dict[str, dict[str, Any]]


def digested(folder: Path, files: Iterable[Path]) -> Entries:
    """Flush these files of a folder to disk, and return their sizes and digests."""
    entries: Entries = {}
    for path in files:
        _flush(path)
        size = path.stat().st_size
        kind = _OF_PIECES if size > PIECE else _OF_CONTENT
        entries[str(path.relative_to(folder))] = {"bytes": size, kind: _digest(path, kind)}
    return entries


def commit(temporary: Path, final: Path, known: Entries) -> None:
    """Write the manifest of a `temporary` folder, then rename the folder to `final`.

    Digests the files that are not among the `known` entries. Flushes files, manifest and folder to disk in that order,
    so that a power cut leaves either no folder of that name or a complete one. Raises OSError.
    """
    files = {str(path.relative_to(temporary)): path for path in sorted(temporary.rglob("*")) if path.is_file()}
    entries = known | digested(temporary, [path for name, path in files.items() if name not in known])
    missing = known.keys() - files.keys()
    if missing:
        raise OSError(f"{min(missing)} was written by another process and is not there: is this a shared folder?")
    entries = {name: entries[name] for name in files}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    _flush(manifest)
    _flush(temporary)
    # The name is taken if a run has continued from an older checkpoint because this one was damaged.
    replaced = final.with_name(f"{TEMPORARY_PREFIX}replaced-{final.name}")
    if os.path.lexists(final):
        os.rename(final, replaced if is_ours(final) and not misnamed(final) else _free_name(final))
    os.rename(temporary, final)
    _flush(final.parent)
    remove(replaced)


def _free_name(path: Path) -> Path:
    """A free name for something that occupies a checkpoint's path and that this program must not delete."""
    numbers = itertools.count(1)
    return next(name for n in numbers if not os.path.lexists(name := path.with_name(f"replaced-{n}-{path.name}")))


def read_manifest(folder: Path) -> Entries:
    """Read the manifest and compare the sizes of all files with it; returns its entries.

    Raises Damaged if a file is missing, is no regular file (a link, a pipe) or has another size, and if one of this
    program's files is there that the manifest does not list.
    """
    try:
        entries = _read(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{MANIFEST} is missing: the checkpoint was not finished") from None
    except (ValueError, OSError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({_reason(error)})") from None
    for name, entry in entries.items():
        try:
            size = regular_size(folder / name)
        except (ValueError, OSError) as error:
            raise Damaged(f"{name}: {_reason(error)}") from None
        if size != entry["bytes"]:
            raise Damaged(f"{name} has {size} bytes instead of {entry['bytes']}")
        most = MOST_INDEX if name == INDEX else _MOST_OTHER
        if size > most and not holds_tensors(name):
            raise Damaged(f"{name} has {size} bytes, and {most} is the most that this program writes")
    for name in OPTIONAL:
        if name not in entries and os.path.lexists(folder / name):
            raise Damaged(f"{name} is there, and {MANIFEST} does not list it")
    return entries


def damage_of(folder: Path) -> str | None:
    """The first difference between a checkpoint's files and its manifest, as a message; None if there is none."""
    try:
        changed = first_changed(folder, read_manifest(folder))
    except Damaged as error:
        return str(error)
    return changed and changed[1]


def holds_tensors(name: str) -> bool:
    """Whether DCP stores tensors in a file of this name; such a file may have any size."""
    return name.endswith(".distcp")


def first_changed(folder: Path, entries: Entries, start: int = 0, step: int = 1) -> tuple[int, str] | None:
    """Digest the files start, start + step, ...; returns the index of the first that has changed, and a message."""
    found = ((index, _change(folder, *item)) for index, item in list(enumerate(entries.items()))[start::step])
    return next(((index, problem) for index, problem in found if problem), None)


def _change(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    kind = _OF_PIECES if _OF_PIECES in entry else _OF_CONTENT
    try:
        changed = _digest(folder / name, kind) != entry[kind]
    except OSError as error:
        return f"{name}: {_reason(error)}"
    return f"{name} has changed since it was written (SHA-256 differs)" if changed else None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@dataclass
class _Entry:
    """A file: its size and exactly one of the digests."""

    bytes: Annotated[int, Within(0, 2**60)]
    sha256: str = ""
    sha256_of_16_mib_pieces: str = ""


@dataclass
class _Manifest:
    format: str
    files: dict[str, _Entry]


def _read(folder: Path) -> Entries:
    """The manifest's entries; ValueError if the file, which may be damaged like any other, is no manifest."""
    manifest = fit(_Manifest, parse_json(read_regular(folder / MANIFEST, _MOST_OTHER)))
    if manifest.format != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    entries = _entries(manifest.files)
    if absent := [name for name in NEEDED if name not in entries]:
        raise ValueError(f"it does not list {absent[0]}")
    return entries


def read_digests(path: Path) -> Entries:
    """The entries of a JSON file that has nothing else; OSError or ValueError if it cannot be read or is no such."""
    return _entries(fit(dict[str, _Entry], parse_json(read_regular(path, _MOST_OTHER))))


def _entries(files: dict[str, _Entry]) -> Entries:
    entries: Entries = {}
    for name, entry in files.items():
        if not _is_name(name):
            raise ValueError(f"it lists {name[:80]!r}, which is no name of a file in this folder")
        digests = {kind: found for kind in (_OF_CONTENT, _OF_PIECES) if (found := getattr(entry, kind))}
        if len(digests) != 1:
            raise ValueError(f"it does not list the digest of {name}")
        entries[name] = {"bytes": entry.bytes} | digests
    return entries


def _is_name(name: str) -> bool:
    return name.isprintable() and PurePath(name).name == name and len(name.encode()) < 256


def is_ours(folder: Path) -> bool:
    """Whether this program wrote the folder and everything in it, and so may delete it."""
    try:
        names = _read(folder).keys() | {MANIFEST}
        found = list(os.scandir(folder))
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and all(
        each.name in names and not each.is_dir(follow_symlinks=False) for each in found
    )


def has_its_sizes(folder: Path) -> bool:
    """Whether all files of the manifest are there and have their sizes; reads none of them."""
    try:
        return bool(read_manifest(folder))
    except Damaged:
        return False


def misnamed(folder: Path) -> str | None:
    """A message if a checkpoint's name is not that of the step in its train state; None also if that is unreadable."""
    try:
        step = parse_json(read_regular(folder / TRAIN_STATE, MOST_TRAIN_STATE))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if type(step) is not int or folder.name == name_of(step) or not re.fullmatch("step-[0-9]+", folder.name):
        return None
    return f"its name is not that of step {step}, as {TRAIN_STATE} has it: {name_of(step)}"


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def remove(path: Path) -> None:
    """Delete a folder with its content, a file or a symbolic link, as far as possible."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path, kind: str) -> str:
    """Compute a file's digest of one of the two kinds."""
    if kind == _OF_CONTENT:
        return _sha256(path).hex()
    # Threads, because hashlib releases the GIL.
    with ThreadPoolExecutor(_THREADS) as pool:
        pieces = pool.map(lambda start: _sha256(path, start, PIECE), range(0, path.stat().st_size, PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def _sha256(path: Path, start: int = 0, left: int = sys.maxsize) -> bytes:
    """The digest of `left` bytes from `start` on, or of as many as there are."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while chunk := file.read(min(1 << 20, left)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
