"""Documents cut to fill sequences: no padding, no target lost, no target twice."""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from swamla_titan.data.corpus import Corpus
from swamla_titan.data.patience import Patience
from swamla_titan.data.skips import Skip, is_skip, skips_of, with_skips
from swamla_titan.data.streams import DocumentStream, StreamDocument, data_changed
from swamla_titan.data.tokenizer import Tokenizer, with_eot


class TokenCache:
    """Tokens of documents; the last few long ones are kept, for streams of one process that read parts of the same one.

    64 streams over one book would tokenize it 64 times.
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


class PackedStream:
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
        cursor: dict[str, Any] | None = None,
        patience: Patience | None = None,
    ) -> None:
        skips = skips_of(stream, cursor)
        if cursor is not None and cursor["sequences"] == 0:
            cursor = None  # of a stream that was never read: the same as none
        self._seq_len = seq_len
        self._cache = cache
        self._documents = DocumentStream(corpus, stream, cursor, patience, skips)
        self._tokens = np.empty(0, dtype=np.int32)
        self._offset = 0  # of the next sequence's first token, in the document's tokens that are read
        self.replaced = 0  # stretches of bytes that were no UTF-8, in documents begun so far by this object
        self._sequences = 0
        if cursor is not None:
            self._sequences = cursor["sequences"]
            if self._documents.lost_its_place:
                return
            # The document was begun, and its replacements counted, before the cursor was saved.
            self._tokens = cache.tokens(self._documents.next_document())
            self._offset = cursor["token"]
            if self._offset >= len(self._tokens):
                raise data_changed()

    def next_sequence(self) -> np.ndarray:
        """int32 [T + 1]: tokens [:-1] are inputs, [1:] their targets."""
        sequence = np.empty(self._seq_len + 1, dtype=np.int32)
        filled = 0
        while filled < self._seq_len:
            self._begin_next_document_at_end()
            part = self._tokens[self._offset : self._offset + self._seq_len - filled]
            sequence[filled : filled + len(part)] = part
            filled += len(part)
            self._offset += len(part)
        # The last target is looked at, not taken: the next sequence begins with it.
        self._begin_next_document_at_end()
        sequence[filled] = self._tokens[self._offset]
        self._sequences += 1
        return sequence

    def cursor(self) -> dict[str, Any]:
        """The place of the next sequence's first token (JSON types), and how many sequences there were before it."""
        place = initial_cursor()
        if self._sequences > 0:
            place = {**self._documents.cursor(), "token": self._offset, "sequences": self._sequences}
        return with_skips(place, self._documents.skips)

    def new_skips(self) -> list[Skip]:
        """What is passed over since the last call, because it could not be read."""
        return self._documents.new_skips()

    def _begin_next_document_at_end(self) -> None:
        while self._offset >= len(self._tokens):
            document = self._documents.next_document()
            self._tokens = self._cache.tokens(document)
            self.replaced += document.replaced if not document.begin else 0
            self._offset = 0


def initial_cursor() -> dict[str, Any]:
    """The cursor of a stream that was not read yet."""
    return {"edition": 0, "epoch": 0, "item": 0, "position": None, "document": 0, "token": 0, "sequences": 0}


def is_cursor(value: Any) -> bool:
    """Whether a value from a checkpoint is made as a cursor is; where it points to is seen when it is read."""
    if not isinstance(value, dict) or not value.keys() >= (names := initial_cursor()).keys():
        return False
    numbers = [value[name] for name in names if name != "position"]
    position, skips = value["position"], value.get("skipped", [])
    return (
        all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and (position is None or (isinstance(position, dict) and _is_position(position)))
        and isinstance(skips, list)
        and all(map(is_skip, skips))
    )


def _is_position(position: dict[str, Any]) -> bool:
    """The number of a document, and what the source adds: numbers of bytes, or a state as text."""
    return "ordinal" in position and all(
        type(value) is str if name == "state" else type(value) is int and 0 <= value < 2**63
        for name, value in position.items()
    )


def document_ids(tokens: torch.Tensor, eot_id: int) -> torch.Tensor:
    """Number of each token's document within its row, from 0: [N, T] -> [N, T] int64.

    End of text belongs to the document it ends: ids[t] = number of eot in tokens[:t].
    """
    ends = tokens.numpy() == eot_id  # by NumPy, as the loader copies: torch would wake all its threads
    return torch.from_numpy(ends.cumsum(axis=-1, dtype=np.int64) - ends)
