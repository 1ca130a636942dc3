"""The sources of documents, each a module of this package by the name that `data.source` has for it.

It defines `open_source(data, retry, recorded)`, which returns its `Source`.
"""

import dataclasses
import importlib
from typing import Any

from swamla_titan.config.sections import Data
from swamla_titan.data.document import Source
from swamla_titan.data.retry import Retry


def open_source(data: Data, retry: Retry | None = None, recorded: dict[str, Any] | None = None) -> Source:
    """The source that `data.source` and its keys name. UserError if it is not there or cannot be read.

    `recorded` is the `Source.record` of when the run began; it counts with data.on_error = "skip_file" only.
    """
    module = importlib.import_module(f"{__name__}.{data.source}")
    source: Source = module.open_source(data, retry or Retry(), recorded if data.on_error == "skip_file" else None)
    return source


def pinned(data: Data) -> Data:
    """The section with `data.revision` as a commit, if it names a dataset of the Hub."""
    if data.source != "huggingface":
        return data
    from swamla_titan.data.sources.huggingface import commit_of

    return dataclasses.replace(data, revision=commit_of(data.path, data.revision))
