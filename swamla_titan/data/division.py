"""How a source is divided among the streams: by counted tokens where that is quick, by size otherwise."""

from collections.abc import Sequence

from swamla_titan.data.document import Source
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.patience import Patience
from swamla_titan.data.segments import Segments, cut_by_size, cut_counted, ring, shared_units, sizes_of
from swamla_titan.data.token_count import count_tokens, estimated_sizes
from swamla_titan.data.tokenizer import Tokenizer

_UNEVEN = 1.25  # the largest segment as a multiple of the smallest from which on it is worth a warning
_NEAR = 4  # numbers of streams that are tried to either side: of many streams each takes a second


def divide(
    source: Source,
    order: Sequence[int],
    streams: int,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    patience: Patience,
    skips_files: bool,
) -> Segments:
    """Segments of a source for `streams` streams, its units taken in `order`. Raises a Fault for data that cannot be
    read, unless `skips_files`."""
    counted = count_tokens(source, tokenizer, held_out, patience, skips_files)
    if counted is not None:
        rows = ((part, ordinal, tokens) for part, unit in enumerate(order) for ordinal, tokens in counted.get(unit, []))
        return cut_counted(ring(order, {}), rows, streams)
    sizes = estimated_sizes(source, tokenizer, patience)
    documents = [source.num_documents(unit) for unit in range(source.num_units)]
    return cut_by_size(ring(order, shared_units(sizes, documents, streams)), sizes, documents, streams)


def described(segments: Segments) -> str:
    """How the data are divided, in a line for the log."""
    streams = len(segments.cuts)
    if segments.tokens is None:
        return f"{streams} streams, divided by size"
    return f"{segments.tokens:,} tokens to train on, {segments.tokens / streams:,.0f} for each of {streams} streams"


def uneven(source: Source, segments: Segments, seq_len: int) -> str | None:
    """What to tell the user if the streams cannot read the data evenly from the first epoch on, and with how many they
    would; else None."""
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
    """Numbers of streams that may be even: those near, and those that units of one size are shared equally by."""
    near = range(max(1, streams - _NEAR), streams + _NEAR + 1)
    multiples = range(1, 2 * streams // units + 1) if units <= streams else range(0)
    return {*near, *(units * factor for factor in multiples), *(-(-units // part) for part in range(1, 32))}


def _spread(sizes: Sequence[float], documents: Sequence[int | None], streams: int) -> float:
    """The largest of so many segments by size, as a multiple of the smallest."""
    segments = cut_by_size(ring(range(len(sizes)), shared_units(sizes, documents, streams)), sizes, documents, streams)
    found = sizes_of(segments, sizes, documents)
    return max(found) / max(min(found), 1e-9)
