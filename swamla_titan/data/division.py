"""Divides a source among the streams: by counted tokens where counting is quick, by size otherwise."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swamla_titan.data.document import MIB, Document, Index, Source
from swamla_titan.data.faults import DataFault
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.retry import Retry, documents_by_unit, read_on
from swamla_titan.data.segments import (
    DocumentRing,
    DocumentSegments,
    Segments,
    cut_by_size,
    cut_counted,
    cuts_by_tokens,
    ring,
    shared_units,
    sizes_of,
)
from swamla_titan.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Up to so much text all of it is tokenized once when a run begins, which takes seconds. The limit decides the order of
# the data, so it is not a setting.
COUNTED_BYTES = 64 * MIB
# Where the size is known only after reading, as on a server, a source of more units than this is not read to count.
COUNTED_UNITS = 256

_INDEXED = 1 << 20  # documents of an index that are looked up together

_SAMPLED_UNITS, _SAMPLED_CHARS = 256, 1 << 15
_REPORTED_BYTES = 8 * MIB

_UNEVEN = 1.25  # the largest segment as a multiple of the smallest from which on it is worth a warning
_NEAR = 4  # numbers of streams that are tried to either side: of many streams each takes a second


def divide(
    source: Source,
    order: Sequence[int],
    streams: int,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    retry: Retry,
    skips_files: bool,
) -> Segments:
    """Divide a source, with its units in `order`, into a segment for each of `streams` streams.

    Raises a Fault for data that cannot be read, unless `skips_files`.
    """
    counted = count_tokens(source, tokenizer, held_out, retry, skips_files)
    if counted is not None:
        rows = ((part, ordinal, tokens) for part, unit in enumerate(order) for ordinal, tokens in counted.get(unit, []))
        return cut_counted(ring(order, {}), rows, streams)
    sizes = estimated_sizes(source, tokenizer, retry)
    documents = [source.num_documents(unit) for unit in range(source.num_units)]
    return cut_by_size(ring(order, shared_units(sizes, documents, streams)), sizes, documents, streams)


def divide_documents(index: Index, ring: DocumentRing, streams: int, held_out: HeldOut) -> Segments:
    """Divide the documents of an index, in the ring's order, into a segment for each of `streams` streams."""
    tokens = training_tokens(index, held_out)
    total = int(tokens.sum(dtype=np.int64))

    def tables() -> Iterator[np.ndarray]:
        for first in range(0, len(ring), _INDEXED):
            places = np.arange(first, min(len(ring), first + _INDEXED))
            yield np.stack([places, ring.documents(places)[1], tokens[ring.numbers(places)].astype(np.int64)], axis=1)

    return DocumentSegments(ring, cuts_by_tokens(tables(), total, streams), total)


def training_tokens(index: Index, held_out: HeldOut) -> np.ndarray:
    """The tokens of each document of an index, uint32 [n]; 0 for those that are held out."""
    parts = (np.where(held_out.among(hashes), 0, counts).astype(np.uint32) for counts, hashes in index.scan())
    return np.concatenate([*parts])


def described(segments: Segments) -> str:
    """A log line on how the data are divided."""
    streams = len(segments.cuts)
    if segments.tokens is None:
        return f"{streams} streams, divided by size"
    return f"{segments.tokens:,} tokens to train on, {segments.tokens / streams:,.0f} for each of {streams} streams"


def uneven(source: Source, segments: Segments, seq_len: int) -> str | None:
    """A warning if streams cannot read the data evenly in the first epoch, with a number that can; else None."""
    streams = len(segments.cuts)
    if segments.tokens is not None:
        if segments.tokens >= streams * seq_len or streams == 1:
            return None
        return (
            f"the training data hold {segments.tokens:,} tokens, less than a sequence of {seq_len} for each of "
            f"data.streams = {streams}: until every stream has begun, some text is read more often than other. In a "
            f"new run, data.streams = {max(1, segments.tokens // seq_len)} reads it evenly"
        )
    sizes = [float(max(1, size)) for size in source.unit_sizes]
    if len(sizes) > streams / (_UNEVEN - 1):
        return None
    documents = [source.num_documents(unit) for unit in range(source.num_units)]
    # Not of the segments themselves, whose sizes are in tokens by estimate.
    spread = _spread(sizes, documents, streams)
    if spread <= _UNEVEN:
        return None
    nearest = sorted(_candidates(streams, len(sizes)), key=lambda count: (abs(count - streams), count))
    even = next((count for count in nearest if _spread(sizes, documents, count) < _UNEVEN), None)
    better = f"; data.streams = {even} is even" if even else ""
    return (
        f"{len(sizes)} shards, whose texts are not counted, cannot be shared equally by data.streams = {streams}: one "
        f"stream's part is {spread:.1f} times another's, and text at the seams is read once more or less than other"
        f"{better}"
    )


def _candidates(streams: int, units: int) -> set[int]:
    """Numbers of streams to try: those near `streams`, and those that divide units of one size equally."""
    near = range(max(1, streams - _NEAR), streams + _NEAR + 1)
    multiples = range(1, 2 * streams // units + 1) if units <= streams else range(0)
    return {*near, *(units * factor for factor in multiples), *(-(-units // part) for part in range(1, 32))}


def _spread(sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> float:
    """Ratio of the largest to the smallest segment, if the source is cut by size into one per stream."""
    segments = cut_by_size(ring(range(len(sizes)), shared_units(sizes, documents, streams)), sizes, documents, streams)
    found = sizes_of(segments, sizes, documents)
    return max(found) / max(min(found), 1e-9)


def count_tokens(
    source: Source, tokenizer: Tokenizer, held_out: HeldOut, retry: Retry, skips_files: bool
) -> dict[int, list[tuple[int, int]]] | None:
    """Count the tokens of all training documents: {unit: [(ordinal, tokens), ...]}; None for a large corpus.

    The end-of-text token of each document counts.
    """
    size = source.text_bytes
    if source.num_units > COUNTED_UNITS if size is None else size > COUNTED_BYTES:
        return None
    if size is not None and size > _REPORTED_BYTES:
        logger.info("data: counting the tokens of %.0f MB of text, to divide them evenly", size / 1e6)
    if size is None:
        logger.info("data: reading up to %.0f MB of text, to divide them evenly if that is all", COUNTED_BYTES / 1e6)
    texts: list[tuple[int, Document]] = []
    chars = 0
    for unit, document in documents_by_unit(source, retry, [] if skips_files else None):
        if document.is_empty or document in held_out:
            continue
        chars += len(document.text)
        if chars > COUNTED_BYTES:  # more than its size, as what is compressed may be; nothing was tokenized yet
            return None
        texts.append((unit, document))
    counted: dict[int, list[tuple[int, int]]] = {}
    # Threads run in parallel, because the tokenizer releases the GIL.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        lengths = threads.map(lambda entry: len(tokenizer.encode_array(entry[1].text)) + 1, texts)
        for (unit, document), length in zip(texts, lengths):
            counted.setdefault(unit, []).append((document.ordinal, length))
    return counted


def estimated_sizes(source: Source, tokenizer: Tokenizer, retry: Retry) -> list[float]:
    """Estimate the tokens of each unit, up to a common factor.

    The estimate is a unit's size in bytes times the tokens per byte at the start of the nearest of some hundred sampled
    units, because code, prose and other languages differ by up to a factor of two.
    """
    sizes = [float(max(1, size)) for size in source.unit_sizes]
    if source.text_bytes is None:
        return sizes  # nothing is known of their sizes
    step = max(1, len(sizes) // _SAMPLED_UNITS)
    rates: list[float] = []
    damaged: set[str] = set()  # files of which no further unit is read, because each may take as many retries
    for unit in range(0, len(sizes), step):
        rate = 0.0
        if source.unit_files[unit] not in damaged:
            try:
                rate = _tokens_per_byte(read_on(source, unit, None, 1, 0, retry), tokenizer)
            except DataFault:  # reported when the streams find it
                damaged.add(source.unit_files[unit])
        rates.append(rate)
    known = [rate for rate in rates if rate]
    mean = sum(known) / len(known) if known else 1.0
    return [size * (rates[min(len(rates) - 1, round(unit / step))] or mean) for unit, size in enumerate(sizes)]


def _tokens_per_byte(documents: Iterable[Document], tokenizer: Tokenizer) -> float:
    """Tokens per byte at the beginning of a unit; 0 if it is empty."""
    found = np.zeros(2)  # tokens, bytes
    first = np.zeros(2)
    chars, before = 0, None
    for document in documents:
        text = document.text[: _SAMPLED_CHARS - chars]
        chars += len(text)
        size = float(len(text.encode("utf-8", errors="surrogatepass")))
        after = document.position.get("byte")
        if after is not None and before is not None and document.text:
            size = (after - before) * len(text) / len(document.text)  # with all that stands beside it in the file
        sample = np.array([len(tokenizer.encode_array(text)), size])
        if after is not None and before is None:
            first = sample  # of which it is not known where its line begins
        else:
            found += sample
        before = after
        if chars >= _SAMPLED_CHARS:
            break
    tokens, size = found if found[0] else first
    return float(tokens / size) if size else 0.0
