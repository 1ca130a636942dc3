"""Data sets read with Hugging Face's `datasets`, streamed: from the Hub, or from a local folder."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.data._utils.worker as torch_worker

from swamla_titan.data.document import Document, Position, replace_surrogates, too_large
from swamla_titan.data.faults import DataFault, Fault, Unreachable, network_fault
from swamla_titan.data.patience import Patience
from swamla_titan.errors import UserError

logger = logging.getLogger(__name__)


class HuggingFaceSource:
    """One split of a data set; a unit is a shard, as `datasets` counts them (a file, or a row group of one)."""

    def __init__(
        self,
        path: str,
        *,
        name: str,
        split: str,
        text_key: str,
        max_document_bytes: int,
        streams: int,
        revision: str = "",
        patience: Patience | None = None,
        recorded: dict[str, Any] | None = None,
    ) -> None:
        import datasets  # takes a second, and only this source needs it

        if not path:
            raise UserError("data.path is empty: give the name of a data set, or a folder that holds one.")
        self._label = " ".join(part for part in (path, name, f"[{split}]") if part)
        self._text_key = text_key
        self._max_document_bytes = max_document_bytes
        _leave_retrying_to_us()

        def load() -> Any:
            dataset = datasets.load_dataset(path, name or None, split=split, streaming=True, revision=revision or None)
            if dataset.num_shards < streams and hasattr(dataset, "reshard"):
                # By row groups instead of files, where the format allows it; it opens every file, which is only
                # worth its time while there are too few shards for the streams.
                dataset = dataset.reshard()
            return dataset, dataset.column_names

        dataset, columns = self._loaded(load, patience or Patience())
        if columns is not None:
            self._require_column(columns)
            dataset = dataset.select_columns([text_key])
        self._dataset = dataset
        self._num_units: int = dataset.num_shards
        folder = os.path.isdir(path)
        self._files = _as_recorded(recorded, _names_and_sizes(path), self._num_units) if folder else []
        content = self._files if folder else (path, revision or None)  # a folder may move
        identity = repr((content, name, split, text_key, self._num_units))
        self._fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @property
    def num_units(self) -> int:
        return self._num_units

    @property
    def unit_sizes(self) -> list[int]:
        return [1] * self._num_units  # unknown before they are read

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def file_of(self, unit: int) -> str:
        return f"{self._label}, shard {unit}"

    def record(self) -> dict[str, Any]:
        return {"files": [list(each) for each in self._files], "units": self._num_units}

    @property
    def passed_over(self) -> list[Fault]:
        return []  # what cannot be opened has no shards that could be counted

    def describe(self) -> str:
        return f"{self._label}, {self._num_units} shard" + ("" if self._num_units == 1 else "s")

    def read(self, unit: int, position: Position | None = None, every: int = 1, offset: int = 0) -> Iterator[Document]:
        _leave_retrying_to_us()
        shard = self._dataset.shard(num_shards=self._num_units, index=unit)
        first = 0
        if position:
            first = position["ordinal"]
            shard.load_state_dict(json.loads(position["state"]))
        rows = iter(shard)
        for ordinal in itertools.count(first):
            place = f"row {ordinal}"
            try:
                with _outside_of_a_loader_worker():
                    row = next(rows, None)
            except Exception as error:  # whatever lies below: HTTP, file system, parser
                raise network_fault(self.file_of(unit), place, error) from error
            if row is None:
                return
            if ordinal % every == offset:
                # The state as text: it is stored as it stands, and nothing else looks into it.
                state = json.dumps(shard.state_dict())
                text, replaced = self._text(row, self.file_of(unit), place)
                yield Document(
                    text, ordinal, {"ordinal": ordinal + 1, "state": state}, f"{self.file_of(unit)}, {place}", replaced
                )

    def _text(self, row: dict[str, Any], file: str, place: str) -> tuple[str, int]:
        if self._text_key not in row:
            self._require_column(list(row))
        value = row[self._text_key]
        if value is None:
            return "", 0
        if not isinstance(value, str):
            raise DataFault(
                file,
                place,
                f'the column "{self._text_key}" is not a string but {value!r:.60}',
                "Set data.text_key to the column that holds the text",
            )
        if len(value) > self._max_document_bytes:
            raise too_large(file, place, len(value), self._max_document_bytes)
        return replace_surrogates(value)

    def _loaded(self, load: Callable[[], Any], patience: Patience) -> Any:
        while True:
            try:
                return load()
            except Exception as error:  # whatever lies below: HTTP, file system, parser, builder
                fault = network_fault(f"data.path, data.name, data.split: {self._label}", "", error)
                # A wrong key looks like many things, but a network that is down says so.
                if isinstance(fault, Unreachable) and patience.again(fault):
                    continue
                patience.give_up(fault)
                if fault.of_machine:
                    raise fault from error
                tried = f" ({fault.tried})" if fault.tried else ""
                raise UserError(
                    f"{fault.file} cannot be loaded: {_reason(error)}{tried}. Check the three keys and the network."
                ) from error

    def _require_column(self, columns: list[str]) -> None:
        if self._text_key not in columns:
            raise UserError(
                f'{self._label}: no column "{self._text_key}". '
                f"Set data.text_key to one of the columns there: {', '.join(columns)}."
            )


def commit_of(path: str, revision: str) -> str:
    """The commit that a revision (empty: the newest) of a data set means, so that a whole run reads the same one.

    For a folder, and where the Hub cannot be asked, the revision as it is.
    """
    from huggingface_hub import HfApi

    if os.path.isdir(path):
        return revision
    try:
        return HfApi().dataset_info(path, revision=revision or None, timeout=30).sha or revision
    except Exception as error:  # offline, or no such data set: loading it says which
        logger.warning(
            "data.path: the commit of %s is not known (%s). If the data set changes, a resumed run will not notice.",
            path,
            _reason(error),
        )
        return revision


def _names_and_sizes(folder: str) -> list[tuple[str, int]]:
    found = []
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [os.path.join(place, name) for name in files if not name.startswith(".")]
        found += [(os.path.relpath(name, folder), os.path.getsize(name)) for name in names if os.path.exists(name)]
    return sorted(found)


def _as_recorded(
    recorded: dict[str, Any] | None, files: list[tuple[str, int]], num_units: int
) -> list[tuple[str, int]]:
    """The files of a folder as they were when the run began, if they are those but for their sizes: a file that was cut
    is still the run's. Otherwise as they are now, which makes it another data set."""
    before = [(name, size) for name, size in (recorded or {}).get("files", [])]
    if (recorded or {}).get("units") != num_units or [name for name, _ in before] != [name for name, _ in files]:
        return files
    for (name, size), (_, was) in zip(files, before):
        if size != was:
            logger.warning("data.path: %s has %d bytes; when the run began, it had %d", name, size, was)
    return before


def _leave_retrying_to_us() -> None:
    """Has `datasets` report what fails at once. By itself it tries for minutes, during which nothing is told, and the
    data might be given up although nobody chose that time."""
    import datasets

    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        setattr(datasets.config, name, 1)
    for name in vars(datasets.config).keys() & _WAITS:
        setattr(datasets.config, name, 0)


# Seconds that it would sleep after the last try as well; which of them there are depends on its version.
_WAITS = {
    "STREAMING_READ_RETRY_INTERVAL",
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL",
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL",
    "STREAMING_OPEN_RETRY_INTERVAL",
}


@contextmanager
def _outside_of_a_loader_worker() -> Iterator[None]:
    """Hides torch's loader worker from `datasets` while it reads.

    In a worker it would deal the shards out over the workers by itself, and a unit here is one shard: every worker
    but the first would see an empty data set. Which unit is read by whom is decided by the streams.
    """
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}" if str(error) else type(error).__name__
