"""What makes a checkpoint folder whole: a manifest of its files, written last, and a rename.

To digest and to read what a large model takes is minutes of one process's time, so both can be shared: each rank
digests the files that it wrote, and on loading every k-th of all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
FORMAT = "swamla-titan checkpoint 1"


# A file's name in the folder -> {"bytes": its size, "sha256": its digest}.
Entries = dict[str, dict[str, Any]]


class Damaged(Exception):
    """A checkpoint folder is not what was written; the message names the file and what is wrong with it."""


def digested(folder: Path, files: Iterable[Path]) -> Entries:
    """Flush these files of a folder to disk and digest them."""
    entries = {}
    for path in files:
        _flush(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
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
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = list(manifest["files"].items())
    except FileNotFoundError:
        return -1, f"{MANIFEST} is missing: the checkpoint was not finished"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return -1, f"{MANIFEST} cannot be read ({error})"
    for place in range(start, len(entries), step):
        name, entry = entries[place]
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return place, f"{name} has {size} bytes instead of {entry['bytes']}"
            if _digest(path) != entry["sha256"]:
                return place, f"{name} has changed since it was written (SHA-256 differs)"
        except OSError as error:
            return place, f"{name}: {error.strerror}"
    return None


def is_ours(folder: Path) -> bool:
    """Whether this code wrote and finished the folder, and so may delete it."""
    try:
        return bool(json.loads((folder / MANIFEST).read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
