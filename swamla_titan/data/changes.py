"""Describes how a run's data differ from the data that its checkpoint recorded."""

from collections.abc import Mapping
from typing import Any

_NAMED = 5  # files


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the keys of [data] that differ between two `Corpus.settings`; "" if none does."""
    if before.get("source") != now["source"]:
        now = {"source": now["source"]}  # the keys of one kind of source say nothing of another
    return "; ".join(
        f"data.{name} = {before[name]!r} in the checkpoint, {value!r} now"
        for name, value in now.items()
        if name in before and before[name] != value
    )


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the files that differ between two results of `files_by_name`."""
    gone = [f"{name} is gone" for name in before if name not in now]
    changed = [
        f"{name} has {now[name]['bytes']:,} bytes, before {entry['bytes']:,}"
        if now[name]["bytes"] != entry["bytes"]
        else f"{name} has other contents"
        for name, entry in before.items()
        if name in now and now[name] != entry
    ]
    new = [f"{name} is new" for name in now if name not in before]
    found = gone + changed + new
    more = f"; {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def files_by_name(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a `Source.record` by file; of a folder that `datasets` reads these are names and sizes."""
    files = record.get("files", [])
    entries = (each if isinstance(each, dict) else {"name": each[0], "bytes": each[1]} for each in files)
    return {entry["name"]: entry for entry in entries}


def fingerprint_changes(
    saved: dict[str, Any], current: dict[str, Any], details: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The differences between two fingerprints: name -> a line; empty if cursors of one are valid for the other.

    `details` describes the difference of some names, "" for none.
    """
    changes: dict[str, str] = {}
    names = saved.keys() | current.keys()
    if ("data.sources" in saved) != ("data.sources" in current):
        names -= {"source", "held out"}  # of one source without a name, which that of the sources says
    for name in [name for name in names if name.partition(".")[0] == "source"]:
        if saved.get(name) != current.get(name):
            names -= {name.replace("source", "held out", 1)}  # it follows from the source
    for name in sorted(names):
        # A hash means nothing to a user, so what it stands for is named where that is known.
        detail = (details or {}).get(name)
        if detail:
            changes[name] = f"{name}: {detail}"
        elif saved.get(name) == current.get(name):
            continue
        elif name.startswith("source.") and not (name in saved and name in current):
            changes[name] = f"{name}: {'new' if name in current else 'gone'}"
        elif name == "tokenizer" and _first_word(saved.get(name)) == _first_word(current.get(name)):
            changes[name] = "data.tokenizer: its vocabulary is another than when the run began"
        elif name == "source" and _first_word(saved.get(name)) == _first_word(current.get(name)) == "builtin":
            changes[name] = "data.source: this Python's documentation is another than when the run began"
        elif name == "order":
            changes[name] = "order: this version reads data in another order than the one that wrote the checkpoint"
        else:
            changes[name] = f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
    return changes


def _first_word(value: Any) -> str:
    return str(value).partition(" ")[0]
