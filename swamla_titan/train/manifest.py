"""What makes a checkpoint folder whole: a manifest of its files, written last, and a rename."""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
FORMAT = "swamla-titan checkpoint 1"


class Damaged(Exception):
    """A checkpoint folder is not what was written; the message names the file and what is wrong with it."""


def commit(temporary: Path, final: Path) -> None:
    """Digest every file into the manifest, then give the folder its name; after this it is whole, before it is not.

    Files and folders are flushed to disk in that order, so a power cut leaves either no folder of that name or a
    whole one.
    """
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        _flush(path)
        entries[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
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
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = manifest["files"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing: the checkpoint was not finished") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error})") from None
    for name, entry in entries.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{name} has {size} bytes instead of {entry['bytes']}")
            if _digest(path) != entry["sha256"]:
                raise Damaged(f"{name} has changed since it was written (SHA-256 differs)")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None


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
