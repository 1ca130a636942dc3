"""Parquet files: a row group is a unit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swamla_titan.data.document import Document, Position, decode_utf8, too_large
from swamla_titan.data.faults import (
    DataFault,
    Fault,
    fault_of_machine,
    of_another_size,
    one_line,
    refused,
)
from swamla_titan.data.sources.content import HEAD_BYTES, other_than_text
from swamla_titan.data.sources.files import head_of, is_url, open_file, require_size, store_fault
from swamla_titan.data.sources.folder import listed

BATCH_BYTES = 8 << 20  # text decoded at a time
MOST_ROWS = 256  # decoded at a time, because equal texts may be stored once, so that rows hold more bytes than the file


class NoTextColumn(DataFault):
    """A valid file has no text column of the name in data.text_key; one of both is wrong."""


@contextmanager
def _opened(path: str, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a file; what arrow raises is for `_fault`. A file on disk is read by arrow itself, without the GIL."""
    with nullcontext(path) if not is_url(path) else open_file(path) as file, pq.ParquetFile(file, **options) as parquet:
        yield parquet


def row_groups(path: str, column: str) -> list[list[int]]:
    """[bytes of text as the file encodes it, rows] of each row group.

    DataFault if it is not a parquet file, or its text column does not hold text; NoTextColumn if it has none.
    """
    try:
        with _opened(path) as file:
            _require_text_column(path, column, file.schema_arrow)
            metadata = file.metadata
            if _is_signed(path, metadata):
                raise OSError("its footer is signed, as those of files with encrypted columns are")
            leaf = _leaf(metadata, column)
            found = []
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                size = group.total_byte_size if leaf is None else group.column(leaf).total_uncompressed_size
                found.append([max(1, size), group.num_rows])
            if is_any(file.schema_arrow.field(column).type, _BINARY_TYPES):
                _require_text(path, column, file)
    except Fault:
        raise
    except Exception as error:  # pyarrow raises many kinds for invalid bytes
        raise _fault(path, "", error) from error
    return found


def is_any(kind: pa.DataType, names: list[str]) -> bool:
    """Whether a column's type is one of these (names of functions of pyarrow.types), or a dictionary of such values."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    # The oldest pyarrow supported has no views.
    return any(getattr(pa.types, name)(values) for name in names if hasattr(pa.types, name))


STRING_TYPES = ["is_string", "is_large_string", "is_string_view"]
_BINARY_TYPES = ["is_binary", "is_large_binary", "is_binary_view"]
# Writers make a column of nulls of texts that are all missing; these are empty documents.
_TEXT_TYPES = [*STRING_TYPES, "is_null", *_BINARY_TYPES]


def _require_text_column(path: str, column: str, schema: pa.Schema) -> None:
    count = schema.names.count(column)
    if count > 1:
        raise DataFault(
            path, "", f'{count} columns are named "{column}"', "Write it again, with other names for all but one"
        )
    text = [field.name for field in schema if is_any(field.type, _TEXT_TYPES)]
    if count == 0:
        advice = "It has no column of text: remove it"
        if text:
            advice = f"Set data.text_key to one of the columns there that hold text: {listed(text, 20)}"
        raise NoTextColumn(path, "", f'no column "{column}" among {listed(schema.names, 20) or "none"}', advice)
    kind = schema.field(column).type
    if not is_any(kind, _TEXT_TYPES):
        others = f": {listed(text, 20)}" if text else "; this file has none"
        raise NoTextColumn(
            path,
            "",
            f'the column "{column}" does not hold strings but {one_line(ValueError(kind))}',
            f"Set data.text_key to a column that holds the text{others}",
        )


def _is_signed(path: str, metadata: pq.FileMetaData) -> bool:
    """Whether the footer has more than metadata; pyarrow would abort the process on metadata of an encrypted column."""
    with open_file(path) as file:
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(4), "little") != int(metadata.serialized_size)


def _leaf(metadata: pq.FileMetaData, column: str) -> int | None:
    """The index of a top-level column among stored columns; nested columns may have the same name."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    return paths.index(column) if column in paths else None


def _require_text(path: str, column: str, file: pq.ParquetFile) -> None:
    """Raise DataFault if the first values of a binary column are not text."""
    head = b""
    for batch in file.iter_batches(16, columns=[column], use_threads=False):
        for value in _values(batch, column):
            if len(head) > HEAD_BYTES:
                break
            value = value.as_py() or b""
            head += value[:HEAD_BYTES]
            # Checked at the first values, because a signature is at the beginning of a value, and values are alike.
            if other := other_than_text(head):
                raise DataFault(path, f'column "{column}"', f"it holds {other.what}", other.advice)
        if head:
            return


def _values(batch: pa.RecordBatch, column: str) -> Any:
    """The column as bytes, because pyarrow would raise for invalid UTF-8, which is replaced and counted here."""
    values = batch.column(batch.schema.get_field_index(column))
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.large_binary())


@dataclass(frozen=True)
class RowGroup:
    """A row group, whose rows are documents. To continue from a row, the rows before it are decoded too."""

    path: str
    size: int  # of the file
    group: int
    num_documents: int
    column: str
    max_document_bytes: int

    def read(self, position: Position | None, every: int, offset: int) -> Iterator[Document]:
        start = position["ordinal"] if position else 0
        ordinal = 0
        place = f"row group {self.group}"
        try:
            if is_url(self.path):  # where no file is cut: one of another size is another file
                require_size(self.path, self.size)
            with _opened(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                if not is_url(self.path) and os.path.getsize(self.path) != self.size:
                    raise of_another_size(self.path, self.size)
                if self.group >= file.metadata.num_row_groups:
                    found = f"only {file.metadata.num_row_groups} row groups"
                    raise DataFault(self.path, place, f"{found} where there were more when the run began")
                row_group = file.metadata.row_group(self.group)
                rows = max(1, row_group.num_rows)
                # total_byte_size covers all columns, so a batch usually holds at most about BATCH_BYTES.
                batch_size = max(1, min(MOST_ROWS, BATCH_BYTES * rows // max(1, row_group.total_byte_size)))
                for batch in file.iter_batches(batch_size, [self.group], [self.column], use_threads=False):
                    if ordinal + batch.num_rows > start:
                        yield from self._documents(_values(batch, self.column), ordinal, start, every, offset)
                    ordinal += batch.num_rows
        except Fault:
            raise
        except Exception as error:  # pyarrow raises many kinds for bytes that make no sense
            raise _fault(self.path, f"row {ordinal} of {place}", error) from error

    def _documents(self, values: Any, first: int, start: int, every: int, offset: int) -> Iterator[Document]:
        for ordinal in range(max(first, start), first + len(values)):
            if ordinal % every != offset:
                continue
            data = values[ordinal - first].as_py() or b""  # null: an empty document
            place = f"row {ordinal} of row group {self.group}"
            if len(data) > self.max_document_bytes:
                raise too_large(self.path, place, len(data), self.max_document_bytes)
            text, replaced = decode_utf8(data)
            yield Document(text, ordinal, {"ordinal": ordinal + 1}, replaced)


def _fault(path: str, place: str, error: Exception) -> Fault:
    """The fault of a file that pyarrow cannot read."""
    if fault := fault_of_machine(path, place, error):
        return fault
    # For invalid pages pyarrow raises an OSError without a number.
    if isinstance(error, OSError) and error.errno is not None and not is_url(path):
        return refused(path, place, error)
    if is_url(path) and (fault := store_fault(path, place, error)):
        return fault
    head = head_of(path)
    reason = one_line(error)
    if not head.startswith((b"PAR1", b"PARE")):
        other = other_than_text(head)
        found = other.what if other else f"text that begins with {head[:40]!r}" if head else "empty"
        advice = other.advice if other else "Give it the ending of what it is, such as .jsonl or .txt, or remove it"
        advice = advice if head else "Write or download it again, or remove it"
        return DataFault(path, place, f"not a whole parquet file: it is {found}", advice)
    if head.startswith(b"PARE") or "crypt" in reason.lower():
        return DataFault(path, place, f"it is encrypted ({reason})", "Decrypt it first: no keys are known here")
    if isinstance(error, pa.ArrowNotImplementedError):
        return DataFault(path, place, f"pyarrow cannot read it ({reason})", "Write it again with plain columns")
    return DataFault(
        path, place, f"not a whole parquet file ({reason})", "Write or download it again, or remove it", may_pass=True
    )
