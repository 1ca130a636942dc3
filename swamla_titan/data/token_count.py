"""How many tokens each document has: counted for a small corpus, estimated from samples for a large one."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swamla_titan.data.document import MIB, Document, Source
from swamla_titan.data.faults import DataFault
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.patience import Patience, read_on
from swamla_titan.data.reading import documents_by_unit
from swamla_titan.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Up to so much text all of it is tokenized once when a run begins, which takes seconds. The limit decides the order of
# the data, so it is no setting.
COUNTED_BYTES = 64 * MIB
# Where the size is known only after reading, as on a server: of more units than this, none is read to find out.
COUNTED_UNITS = 256

_SAMPLED_UNITS, _SAMPLED_CHARS = 256, 1 << 15
_REPORTED_BYTES = 8 * MIB


def count_tokens(
    source: Source, tokenizer: Tokenizer, held_out: HeldOut, patience: Patience, skips_files: bool
) -> dict[int, list[tuple[int, int]]] | None:
    """{unit: [(ordinal, tokens), ...]} of all documents to train on, end of text counted; None for a large corpus."""
    size = source.text_bytes
    if source.num_units > COUNTED_UNITS if size is None else size > COUNTED_BYTES:
        return None
    if size is not None and size > _REPORTED_BYTES:
        logger.info("data: counting the tokens of %.0f MB of text, to divide them evenly", size / 1e6)
    if size is None:
        logger.info("data: reading up to %.0f MB of text, to divide them evenly if that is all", COUNTED_BYTES / 1e6)
    texts: list[tuple[int, Document]] = []
    chars = 0
    for unit, document in documents_by_unit(source, patience, [] if skips_files else None):
        if document.is_empty or document in held_out:
            continue
        chars += len(document.text)
        if chars > COUNTED_BYTES:  # larger than it said, as what is compressed may be; nothing was tokenized in vain
            return None
        texts.append((unit, document))
    counted: dict[int, list[tuple[int, int]]] = {}
    # The tokenizer runs beside other threads: it works outside of Python's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        lengths = threads.map(lambda entry: len(tokenizer.encode_array(entry[1].text)) + 1, texts)
        for (unit, document), length in zip(texts, lengths):
            counted.setdefault(unit, []).append((document.ordinal, length))
    return counted


def estimated_sizes(source: Source, tokenizer: Tokenizer, patience: Patience) -> list[float]:
    """About how many tokens each unit has, up to a common factor.

    A unit's size in bytes counts by the tokens in a byte of text, as seen at the start of the nearest of some hundred
    units: code, prose and other languages differ by up to a factor of two.
    """
    sizes = [float(max(1, size)) for size in source.unit_sizes]
    if source.text_bytes is None:
        return sizes  # one unit is as large as another, for all that is known
    step = max(1, len(sizes) // _SAMPLED_UNITS)
    rates: list[float] = []
    damaged: set[str] = set()  # files, of which no further part is looked at: each may take as long to be found so
    for unit in range(0, len(sizes), step):
        rate = 0.0
        if source.file_of(unit) not in damaged:
            try:
                rate = _tokens_per_byte(read_on(source, unit, None, 1, 0, patience), tokenizer)
            except DataFault:  # told of when the streams come to it
                damaged.add(source.file_of(unit))
        rates.append(rate)
    known = [rate for rate in rates if rate]
    mean = sum(known) / len(known) if known else 1.0
    return [size * (rates[min(len(rates) - 1, round(unit / step))] or mean) for unit, size in enumerate(sizes)]


def _tokens_per_byte(documents: Iterable[Document], tokenizer: Tokenizer) -> float:
    """As seen at the beginning of a unit; 0 if there is nothing."""
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
