"""What makes a checkpoint folder whole: a manifest of its files, written last, and a rename.

To digest and to read what a large model takes is minutes of one process's time, so both can be shared: each rank
digests the files that it wrote, and on loading every k-th of all.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
FORMAT = "swamla-titan checkpoint 1"
THREADS = 8  # that digest a file: one of them digests less than 2 GB/s, fast disks read more
PIECE = 1 << 24  # bytes
NEEDED = (".metadata", "train.json")  # no checkpoint is without them


# How a file's digest is named, and made: a small file's of its content, as sha256sum does; a larger one's of the
# digests of its pieces of 16 MiB one after the other (binary, 32 bytes each), which several threads make at a time.
WHOLE, PIECES = "sha256", "sha256_of_16_mib_pieces"
# A file's name in the folder -> {"bytes": its size, and its digest under one of these names}.
Entries = dict[str, dict[str, Any]]


class Damaged(Exception):
    """A checkpoint folder is not what was written; the message names the file and what is wrong with it."""


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
        os.rename(final, replaced if is_ours(final) else _free_name(final))
    os.rename(temporary, final)
    _flush(final.parent)
    remove(replaced)


def _free_name(path: Path) -> Path:
    """A name for what is in a checkpoint's place and not this program's to delete."""
    numbers = itertools.count(1)
    return next(name for n in numbers if not os.path.lexists(name := path.with_name(f"replaced-{n}-{path.name}")))


def verify(folder: Path) -> None:
    """Raise Damaged unless every file of the manifest is there with the size and digest it was written with."""
    found = first_damage(folder)
    if found is not None:
        raise Damaged(found[1])


def first_damage(folder: Path, start: int = 0, step: int = 1) -> tuple[int, str] | None:
    """The first damage among the manifest's files start, start + step, ...: its place there and what it is.

    None: they are as they were written. A manifest that is none comes before all files, at place -1.
    """
    try:
        entries = list(_read(folder).items())
    except FileNotFoundError:
        return -1, f"{MANIFEST} is missing: the checkpoint was not finished"
    except (ValueError, OSError) as error:
        return -1, f"{MANIFEST} cannot be read ({error})"
    found = ((place, _damage(folder, *entries[place])) for place in range(start, len(entries), step))
    return next(((place, problem) for place, problem in found if problem), None)


def _damage(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of the manifest."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        kind = PIECES if PIECES in entry else WHOLE
        if _digest(path, kind) != entry[kind]:
            return f"{name} has changed since it was written (SHA-256 differs)"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def _read(folder: Path) -> Entries:
    """The manifest's entries; ValueError if it is none, since it can be damaged as well as any other file."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries, entries.values())):
        raise ValueError("it does not list names, sizes and digests of files in this folder")
    if absent := [name for name in NEEDED if name not in entries]:
        raise ValueError(f"it does not list {absent[0]}")
    return entries


def _is_entry(name: str, entry: Any) -> bool:
    path = PurePath(name)
    is_within = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_within and isinstance(entry, dict) and "bytes" in entry and not entry.keys().isdisjoint({WHOLE, PIECES})


def is_ours(folder: Path) -> bool:
    """Whether this code wrote and finished the folder and all that is in it, and so may delete it."""
    try:
        entries = _read(folder)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and files <= entries.keys() | {MANIFEST}


def has_its_sizes(folder: Path) -> bool:
    """Whether all files of the manifest are there, as long as they were: what can be told without reading them."""
    try:
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in _read(folder).items())
    except (OSError, ValueError):
        return False


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
