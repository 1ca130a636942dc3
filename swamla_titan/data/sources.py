"""From the section [data] to the source it names."""

import dataclasses

from swamla_titan.config.sections import Data
from swamla_titan.data.builtin import BuiltinSource
from swamla_titan.data.document import MIB, Source
from swamla_titan.data.huggingface import HuggingFaceSource, commit_of
from swamla_titan.data.local_files import LocalSource


def open_source(data: Data) -> Source:
    """The source that `data.source` and its keys name. UserError if it is not there or cannot be read."""
    if data.source == "builtin":
        return BuiltinSource()
    if data.source == "local":
        return open_local(data, data.path, "data.path")
    return HuggingFaceSource(
        data.path,
        name=data.name,
        split=data.split,
        text_key=data.text_key,
        max_document_bytes=data.max_document_mib * MIB,
        streams=data.streams,
        revision=data.revision,
    )


def pinned(data: Data) -> Data:
    """The section with `data.revision` as a commit, if it names a data set of the Hub."""
    if data.source != "huggingface":
        return data
    return dataclasses.replace(data, revision=commit_of(data.path, data.revision))


def open_local(data: Data, path: str, setting: str) -> LocalSource:
    """Local files at `path`, read as the keys of [data] say; `setting` names the key that holds the path."""
    return LocalSource(
        path,
        text_key=data.text_key,
        text_separator=data.text_separator,
        max_document_bytes=data.max_document_mib * MIB,
        streams=data.streams,
        setting=setting,
    )
