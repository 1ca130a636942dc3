"""What makes a checkpoint folder whole: a manifest of its files, written last, and a rename.

To digest and to read what a large model takes is minutes of one process's time, so both can be shared: each rank
digests the files that it wrote, and on loading every k-th of all.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from swamla_titan.errors import Damaged
from swamla_titan.system.bounded import Within, fit, parse_json, read_regular, regular_size

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
FORMAT = "swamla-titan checkpoint 1"
THREADS = 8  # that digest a file: one of them digests less than 2 GB/s, fast disks read more
PIECE = 1 << 24  # bytes
RECORD = "train.json"
INDEX = ".metadata"
NEEDED = (INDEX, RECORD)  # no checkpoint is without them
OPTIONAL = ("config.toml", "data.json.gz", "tokenizer.tiktoken")  # what is read of others
# Bytes of what holds no tensors: more is not read, not even to digest it.
MOST_RECORD = 64 << 20  # with 100,000 streams it has 20 MB
MOST_INDEX = 512 << 20  # of 1,000 tensors in 256 parts each it has 50 MB
MOST_OTHER = 64 << 20  # a manifest of 100,000 files has 15 MB


# How a file's digest is named, and made: a small file's of its content, as sha256sum does; a larger one's of the
# digests of its pieces of 16 MiB one after the other (binary, 32 bytes each), which several threads make at a time.
WHOLE, PIECES = "sha256", "sha256_of_16_mib_pieces"
# A file's name in the folder -> {"bytes": its size, and its digest under one of these names}.
Entries = dict[str, dict[str, Any]]


def digested(folder: Path, files: Iterable[Path]) -> Entries:
    """Flush these files of a folder to disk and digest them."""
    entries: Entries = {}
    for path in files:
        _flush(path)
        size = path.stat().st_size
        kind = PIECES if size > PIECE else WHOLE
        entries[str(path.relative_to(folder))] = {"bytes": size, kind: _digest(path, kind)}
    return entries


def commit(temporary: Path, final: Path, known: Entries) -> None:
    """Write the manifest, then give the folder its name; after this it is whole, before it is not.

    Files that are not among the `known` ones are digested here. Files, the manifest and the folder are flushed to disk
    in that order, so a power cut leaves either no folder of that name or a whole one.
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
    # The name is taken where a run is repeated from an older checkpoint because this one was damaged.
    replaced = final.with_name(f"{TEMPORARY_PREFIX}replaced-{final.name}")
    if os.path.lexists(final):
        os.rename(final, replaced if is_ours(final) and not misnamed(final) else _free_name(final))
    os.rename(temporary, final)
    _flush(final.parent)
    remove(replaced)


def _free_name(path: Path) -> Path:
    """A name for what is in a checkpoint's place and not this program's to delete."""
    numbers = itertools.count(1)
    return next(name for n in numbers if not os.path.lexists(name := path.with_name(f"replaced-{n}-{path.name}")))


def read_manifest(folder: Path) -> Entries:
    """The manifest's entries, of files that are there, each of the size that it had when it was written.

    Raises Damaged if they are not; and for a file of this program's that the manifest does not list, or that anybody
    has put in the place of one: a link, a pipe.
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
        most = MOST_INDEX if name == INDEX else MOST_OTHER
        if size > most and not holds_tensors(name):
            raise Damaged(f"{name} has {size} bytes, and {most} is the most that this program writes")
    for name in OPTIONAL:
        if name not in entries and os.path.lexists(folder / name):
            raise Damaged(f"{name} is there, and {MANIFEST} does not list it")
    return entries


def damage_of(folder: Path) -> str | None:
    """What of a checkpoint is not as it was written, as its manifest has it."""
    try:
        changed = first_changed(folder, read_manifest(folder))
    except Damaged as error:
        return str(error)
    return changed and changed[1]


def holds_tensors(name: str) -> bool:
    """Whether this is one of the files that DCP makes of tensors, which may have any size."""
    return name.endswith(".distcp")


def first_changed(folder: Path, entries: Entries, start: int = 0, step: int = 1) -> tuple[int, str] | None:
    """The first of the files start, start + step, ... whose content is another than it was: its place and a message."""
    found = ((place, _change(folder, *item)) for place, item in list(enumerate(entries.items()))[start::step])
    return next(((place, problem) for place, problem in found if problem), None)


def _change(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    kind = PIECES if PIECES in entry else WHOLE
    try:
        changed = _digest(folder / name, kind) != entry[kind]
    except OSError as error:
        return f"{name}: {_reason(error)}"
    return f"{name} has changed since it was written (SHA-256 differs)" if changed else None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@dataclass
class _Entry:
    """Of a file; exactly one of the digests."""

    bytes: Annotated[int, Within(0, 2**60)]
    sha256: str = ""
    sha256_of_16_mib_pieces: str = ""


@dataclass
class _Manifest:
    format: str
    files: dict[str, _Entry]


def _read(folder: Path) -> Entries:
    """The manifest's entries; ValueError if it is none, since it can be damaged as well as any other file."""
    manifest = fit(_Manifest, parse_json(read_regular(folder / MANIFEST, MOST_OTHER)))
    if manifest.format != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    entries: Entries = {}
    for name, entry in manifest.files.items():
        if not _is_name(name):
            raise ValueError(f"it lists {name[:80]!r}, which is no name of a file in this folder")
        digests = {kind: found for kind in (WHOLE, PIECES) if (found := getattr(entry, kind))}
        if len(digests) != 1:
            raise ValueError(f"it does not list the digest of {name}")
        entries[name] = {"bytes": entry.bytes} | digests
    if absent := [name for name in NEEDED if name not in entries]:
        raise ValueError(f"it does not list {absent[0]}")
    return entries


def _is_name(name: str) -> bool:
    return name.isprintable() and PurePath(name).name == name and len(name.encode()) < 256


def is_ours(folder: Path) -> bool:
    """Whether this code wrote and finished the folder and all that is in it, and so may delete it."""
    try:
        names = _read(folder).keys() | {MANIFEST}
        found = list(os.scandir(folder))
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and all(
        each.name in names and not each.is_dir(follow_symlinks=False) for each in found
    )


def has_its_sizes(folder: Path) -> bool:
    """Whether all files of the manifest are there, as long as they were: what can be told without reading them."""
    try:
        return bool(read_manifest(folder))
    except Damaged:
        return False


def misnamed(folder: Path) -> str | None:
    """What is wrong with a checkpoint's name: its record has another step; None also where that cannot be read."""
    try:
        record = parse_json(read_regular(folder / RECORD, MOST_RECORD))
        step = record["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if type(step) is not int or folder.name == name_of(step) or not re.fullmatch("step-[0-9]+", folder.name):
        return None
    return f"its name is not that of step {step}, of which {RECORD} speaks: {name_of(step)}"


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def remove(path: Path) -> None:
    """Delete a folder with all that is in it, a file or a symbolic link, as far as possible."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path, kind: str) -> str:
    """A file's digest, of the kind WHOLE or PIECES."""
    if kind == WHOLE:
        return _sha256(path, 0, None).hex()
    # hashlib lets other threads run.
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = pool.map(lambda start: _sha256(path, start, PIECE), range(0, path.stat().st_size, PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def _sha256(path: Path, start: int, size: int | None) -> bytes:
    """Of `size` bytes from `start` on, or as many as there are; None: to the end."""
    digest, left = hashlib.sha256(), size
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while chunk := file.read(1 << 20 if left is None else min(1 << 20, left)):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.digest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
