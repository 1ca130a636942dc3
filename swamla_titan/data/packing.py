"""Documents cut to fill sequences: no padding, no target lost, no target twice."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from swamla_titan.data.corpus import Corpus
from swamla_titan.data.document import Cursor
from swamla_titan.data.exclusions import Exclusion
from swamla_titan.data.retry import Retry
from swamla_titan.data.streams import DocumentStream, StreamDocument, data_changed
from swamla_titan.data.tokenizer import Tokenizer, with_eot


class TokenCache:
    """Tokens of documents; the last few long ones are kept for streams of the same process that read other parts.

    Without it, 64 streams over one book would tokenize it 64 times.
    """

    LONG_CHARS = 1 << 18
    MAX_TOKENS = 1 << 26  # kept in all, 4 bytes each

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def tokens(self, document: StreamDocument) -> np.ndarray:
        """int32 [n]: the tokens of the text and the end-of-text token behind them, as far as the document is read."""
        return document.cut(self._all_tokens(document))

    def _all_tokens(self, document: StreamDocument) -> np.ndarray:
        if len(document.text) < self.LONG_CHARS:
            return self._encode(document.text)
        tokens = self._kept.pop(document.key, None)
        if tokens is None:
            tokens = self._encode(document.text)
        self._kept[document.key] = tokens
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self.MAX_TOKENS:
            self._kept.popitem(last=False)
        return tokens

    def _encode(self, text: str) -> np.ndarray:
        return with_eot(self._tokenizer, text)


class Packed(NamedTuple):
    """A sequence of a stream, and where the stream stands after it."""

    tokens: np.ndarray  # int32 [T + 1]: [:-1] are inputs, [1:] their targets
    cursor: Cursor  # of the next sequence's first token
    replaced: int  # stretches of bytes that were no UTF-8, in documents that begin in this sequence
    excluded: list[Exclusion]  # what was found unreadable on the way


class PackedStream(Iterator[Packed]):
    """A stream's documents, one after the other, cut in sequences of T + 1 tokens that overlap by one.

    The last target of a sequence is the first input of the next, so every token but the very first is a target
    exactly once.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: int,
        seq_len: int,
        cache: TokenCache,
        cursor: Cursor | None = None,
        excluded: Iterable[Exclusion] = (),
        retry: Retry | None = None,
    ) -> None:
        """Continue at `cursor`, or begin; see DocumentStream."""
        if cursor is not None and cursor["sequences"] == 0:
            cursor = None  # of a stream that was never read: the same as none
        excluded = list(excluded)
        self._seq_len = seq_len
        self._cache = cache
        self._documents = DocumentStream(corpus, stream, cursor, excluded, retry)
        self._known = sum(each.stream == stream for each in excluded)  # exclusions that were given, or yielded
        self._tokens = np.empty(0, dtype=np.int32)
        self._offset = 0  # of the next sequence's first token, in the document's tokens that are read
        self._document = initial_cursor()  # the cursor of the document that is being read
        self._sequences = 0
        if cursor is not None:
            self._sequences = cursor["sequences"]
            if self._documents.lost_its_place:
                return
            # The document was begun, and its replacements counted, before the cursor was saved.
            self._begin_next_document()
            self._offset = cursor["token"]
            if self._offset >= len(self._tokens):
                raise data_changed()

    def __next__(self) -> Packed:
        sequence = np.empty(self._seq_len + 1, dtype=np.int32)
        filled = replaced = 0
        # Take from one document after the other. The last target is put back afterwards, because the next sequence
        # begins with it.
        while filled <= self._seq_len:
            while self._offset >= len(self._tokens):
                replaced += self._begin_next_document()
            part = self._tokens[self._offset : self._offset + self._seq_len + 1 - filled]
            sequence[filled : filled + len(part)] = part
            filled += len(part)
            self._offset += len(part)
        self._offset -= 1
        self._sequences += 1
        cursor = {**self._document, "token": self._offset, "sequences": self._sequences}
        excluded = self._documents.excluded[self._known :]
        self._known += len(excluded)
        return Packed(sequence, cursor, replaced, excluded)

    def _begin_next_document(self) -> int:
        """Returns how many stretches of its bytes were no UTF-8; of one that is continued they are counted already."""
        document, self._document = next(self._documents)
        self._tokens, self._offset = self._cache.tokens(document), 0
        return 0 if document.begin else document.replaced


def initial_cursor() -> Cursor:
    """The cursor of a stream that was not read yet."""
    return {"edition": 0, "epoch": 0, "item": 0, "position": None, "document": 0, "token": 0, "sequences": 0}


def is_cursor(value: Any) -> bool:
    """Whether a value from a checkpoint has the form of a cursor; reading shows whether it points to something."""
    if not isinstance(value, dict) or value.keys() != initial_cursor().keys():
        return False
    numbers = {**value, "position": 0}.values()
    position = value["position"]
    return all(map(_is_count, numbers)) and (
        position is None or (isinstance(position, dict) and _is_position(position))
    )


def _is_position(position: dict[str, Any]) -> bool:
    """The number of a document, and what the source adds: numbers of bytes, or a state as text."""
    return "ordinal" in position and all(
        type(value) is str if name == "state" else _is_count(value) for name, value in position.items()
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
