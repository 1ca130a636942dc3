"""From the section [data] to the source it names."""

import dataclasses
import os
from typing import Any

from swamla_titan.config.sections import Data
from swamla_titan.data.builtin import BuiltinSource
from swamla_titan.data.document import MIB, Source
from swamla_titan.data.huggingface import HuggingFaceSource, commit_of
from swamla_titan.data.local_files import LocalSource
from swamla_titan.data.retry import Retry


def open_source(data: Data, retry: Retry | None = None, recorded: dict[str, Any] | None = None) -> Source:
    """The source that `data.source` and its keys name. UserError if it is not there or cannot be read.

    `recorded` is what `Source.record` gave when the run began; it counts with data.on_error = "skip_file" only.
    """
    if data.on_error != "skip_file":
        recorded = None
    if data.source == "builtin":
        return BuiltinSource()
    if data.source == "local":
        return open_local(data, data.path, "data.path", data.on_error == "skip_file", retry, recorded)
    return HuggingFaceSource(
        data.path,
        name=data.name,
        split=data.split,
        text_key=data.text_key,
        max_document_bytes=data.max_document_mib * MIB,
        streams=data.streams,
        revision=data.revision,
        skip_files=data.on_error == "skip_file",
        retry=retry,
        recorded=recorded,
    )


def settings(data: Data) -> dict[str, str]:
    """The keys of [data] that decide what is read as text: where any of them changes, the data are others."""
    names = {
        "builtin": ["source"],
        "local": ["source", "text_key", "text_separator"],
        "huggingface": ["source", "name", "split", "text_key"],
    }[data.source]
    if data.source == "huggingface" and not os.path.isdir(os.path.expanduser(data.path)):
        names = [*names, "path", "revision"]  # a folder may move, and has no revisions
    return {name: getattr(data, name) for name in names}


def pinned(data: Data) -> Data:
    """The section with `data.revision` as a commit, if it names a data set of the Hub."""
    if data.source != "huggingface":
        return data
    return dataclasses.replace(data, revision=commit_of(data.path, data.revision))


def open_local(
    data: Data,
    path: str,
    setting: str,
    skip_files: bool = False,
    retry: Retry | None = None,
    recorded: dict[str, Any] | None = None,
    entries: list[dict[str, Any]] | None = None,
) -> LocalSource:
    """Local files at `path`, read as the keys of [data] say; for the others see LocalSource."""
    return LocalSource(
        path,
        text_key=data.text_key,
        text_separator=data.text_separator,
        max_document_bytes=data.max_document_mib * MIB,
        streams=data.streams,
        setting=setting,
        skip_files=skip_files,
        retry=retry,
        recorded=recorded,
        entries=entries,
    )
