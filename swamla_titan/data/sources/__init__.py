"""Sources of documents: `data.source` is the name of a module here.

Each module defines `open_source(data, retry, recorded)`, which returns a `Source`.
"""

import dataclasses
import importlib
from typing import Any

from swamla_titan.config.mixture import data_of
from swamla_titan.config.sections import Data
from swamla_titan.data.document import Source
from swamla_titan.data.retry import Retry


def open_source(data: Data, retry: Retry | None = None, recorded: dict[str, Any] | None = None) -> Source:
    """Open the source that [data] names; UserError if it does not exist or cannot be read.

    `recorded` is the `Source.record` of the run's beginning, which only data.on_error = "skip_file" uses.
    """
    module = importlib.import_module(f"{__name__}.{data.source}")
    source: Source = module.open_source(data, retry or Retry(), recorded if data.on_error == "skip_file" else None)
    return source


def pinned(data: Data) -> Data:
    """The section with `data.revision` resolved to a commit, for a dataset of the Hugging Face Hub; of each source."""
    if data.sources:
        own = [(source, data_of(data, source)) for source in data.sources]
        sources = [
            dataclasses.replace(source, revision=pinned(each).revision) if each.source == "huggingface" else source
            for source, each in own
        ]
        return dataclasses.replace(data, sources=tuple(sources))
    if data.source != "huggingface":
        return data
    from swamla_titan.data.sources.huggingface import commit_of

    return dataclasses.replace(data, revision=commit_of(data.path, data.revision))
