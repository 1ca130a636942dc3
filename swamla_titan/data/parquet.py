"""Parquet files: each row group is a unit."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swamla_titan.data.document import Document, Position, decode_utf8, too_large
from swamla_titan.data.faults import DataFault, Fault, fault_of_machine, of_another_size, one_line, refused
from swamla_titan.errors import UserError

BATCH_BYTES = 8 << 20  # text decoded at a time


def row_group_sizes(path: str, column: str) -> list[int]:
    """Bytes of text in each row group, as the file encodes it.

    DataFault if it is no parquet file, UserError if it has no text column of that name.
    """
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise _fault(path, "", error) from error
    if column not in schema.names:
        raise UserError(
            f'{path}: no column "{column}". Set data.text_key to one of the columns there: {", ".join(schema.names)}.'
        )
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(test(values) for test in _TEXT_TYPES):
        raise UserError(
            f'{path}: the column "{column}" does not hold strings but {kind}. '
            "Set data.text_key to the column that holds the text."
        )
    place = metadata.schema.names.index(column) if column in metadata.schema.names else None
    sizes = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sizes.append(group.total_byte_size if place is None else group.column(place).total_uncompressed_size)
    return sizes


_TEXT_TYPES = [
    getattr(pa.types, name)
    for name in ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if hasattr(pa.types, name)  # the views came later than the oldest pyarrow supported
]


@dataclass(frozen=True)
class RowGroup:
    """The rows of one row group; a document is a row. Reading on from a row passes over the rows before it."""

    path: str
    size: int  # of the file
    group: int
    column: str
    max_document_bytes: int

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        start = position["ordinal"] if position else 0
        ordinal = 0
        place = f"row group {self.group}"
        try:
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                if os.path.getsize(self.path) != self.size:
                    raise of_another_size(self.path, self.size)
                if self.group >= file.metadata.num_row_groups:
                    found = f"only {file.metadata.num_row_groups} row groups"
                    raise DataFault(self.path, place, f"{found} where there were more when the run began")
                row_group = file.metadata.row_group(self.group)
                rows = max(1, row_group.num_rows)
                # total_byte_size covers all columns: an upper bound, so a batch holds at most about BATCH_BYTES.
                batch_size = max(1, min(4096, BATCH_BYTES * rows // max(1, row_group.total_byte_size)))
                for batch in file.iter_batches(batch_size, [self.group], [self.column], use_threads=False):
                    if ordinal + batch.num_rows > start:
                        yield from self._documents(batch.column(0), ordinal, start, every, offset)
                    ordinal += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise _fault(self.path, f"row {ordinal} of {place}", error) from error

    def _documents(self, values: Any, first: int, start: int, every: int, offset: int) -> Iterator[Document]:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        # As bytes, not strings: pyarrow would raise for text that is no UTF-8, here it is replaced and counted.
        values = values.cast(pa.large_binary())
        for ordinal in range(max(first, start), first + len(values)):
            if ordinal % every != offset:
                continue
            data = values[ordinal - first].as_py() or b""  # null: an empty document
            place = f"row {ordinal} of row group {self.group}"
            if len(data) > self.max_document_bytes:
                raise too_large(self.path, place, len(data), self.max_document_bytes)
            text, replaced = decode_utf8(data)
            yield Document(text, ordinal, {"ordinal": ordinal + 1}, f"{self.path}, {place}", replaced)


def _fault(path: str, place: str, error: Exception) -> Fault:
    if fault := fault_of_machine(path, place, error):
        return fault
    # Of pages that make no sense pyarrow speaks as of an OSError without a number.
    if isinstance(error, OSError) and error.errno is not None:
        return refused(path, place, error)
    reason = f"not a whole parquet file ({one_line(error)})"
    return DataFault(path, place, reason, "Write or download it again, or remove it", may_pass=True)
