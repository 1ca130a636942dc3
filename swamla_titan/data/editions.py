"""The training data of a run that is resumed: the same files as before, and perhaps more of them."""

from dataclasses import dataclass
from typing import Any

from swamla_titan.config.sections import Data
from swamla_titan.data.document import Source
from swamla_titan.data.local_files import LocalSource
from swamla_titan.data.retry import Retry
from swamla_titan.data.sources import open_local, open_source, settings

_NAMED = 5  # files


@dataclass(frozen=True)
class Editions:
    """The sources of a run, see `Corpus.earlier`.

    `segments` are the recorded ones, None where an edition is new; `change` says what differs from the recorded data,
    where they cannot be gone on with; `added` names the files that were added.
    """

    sources: list[Source]
    segments: list[dict[str, Any] | None]
    change: str = ""
    added: tuple[str, ...] = ()

    @property
    def are_recorded(self) -> bool:
        """Whether the run goes on with the data it had."""
        return any(segments is not None for segments in self.segments)


def open_editions(data: Data, retry: Retry, recorded: list[dict[str, Any]]) -> Editions:
    """Opens the training data; `recorded` has of each edition what `Corpus.record` gave, and is empty for a new run.

    Files may have been added to a folder: they make two more editions, one of them alone and one of everything.
    UserError if there is no data, or it cannot be read.
    """
    if not recorded:
        return Editions([open_source(data, retry)], [None])
    source = open_source(data, retry, recorded[-1]["source"])
    segments = [edition["segments"] for edition in recorded]
    if source.record() == recorded[-1]["source"]:
        earlier: list[Source] = [_reopened(data, retry, edition["source"]["files"]) for edition in recorded[:-1]]
        return Editions([*earlier, source], segments)
    before, now = (_by_name(each["files"]) for each in (recorded[-1]["source"], source.record()))
    if not isinstance(source, LocalSource) or any(now.get(name) != entry for name, entry in before.items()):
        return Editions([source], [None], _difference(before, now))
    added = [entry for name, entry in now.items() if name not in before]
    earlier = [_reopened(data, retry, edition["source"]["files"]) for edition in recorded]
    sources = [*earlier, _reopened(data, retry, added), source]
    return Editions(sources, [*segments, None, None], added=tuple(entry["name"] for entry in added))


def _reopened(data: Data, retry: Retry, entries: list[dict[str, Any]]) -> Source:
    return open_local(data, data.path, "data.path", data.on_error == "skip_file", retry, entries=entries)


def changed_settings(before: dict[str, str], data: Data) -> str:
    """Which keys differ from the recorded `settings`, "" for none."""
    now = settings(data)
    if before.get("source") != now["source"]:
        now = {"source": now["source"]}  # the keys of one kind of source say nothing of another
    return "; ".join(
        f"data.{name} = {before[name]!r} in the checkpoint, {value!r} now"
        for name, value in now.items()
        if name in before and before[name] != value
    )


def _by_name(files: list[Any]) -> dict[str, dict[str, Any]]:
    """What was recorded of each file: entries of local files, or names and sizes of a folder of Hugging Face."""
    entries = (each if isinstance(each, dict) else {"name": each[0], "bytes": each[1]} for each in files)
    return {entry["name"]: entry for entry in entries}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
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
