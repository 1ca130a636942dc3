"""Held-out text, packed once, and read by every rank in equal numbers of micro-batches."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from swamla_titan.config.sections import Validation
from swamla_titan.data.batches import IGNORED, MicroBatch, micro_batch
from swamla_titan.data.corpus import Corpus, path_documents, up_to
from swamla_titan.data.faults import Fault
from swamla_titan.data.packing import document_ids
from swamla_titan.data.retry import all_documents
from swamla_titan.data.tokenizer import Tokenizer
from swamla_titan.errors import UserError


@dataclass(frozen=True)
class ValidationSet:
    """N packed sequences, equal on all ranks. Bits per byte = sum of losses / ln 2 / sum of `target_bytes`."""

    tokens: torch.Tensor  # [N, T] int64
    targets: torch.Tensor  # [N, T] int64, -100 behind the last document
    document_ids: torch.Tensor | None  # [N, T] int64, with data.document_mask
    target_bytes: torch.Tensor  # [N, T] int64: bytes of text behind each target, 0 for end of text and where ignored

    @property
    def fingerprint(self) -> str:
        """How many targets there are, and a digest of them."""
        digest = hashlib.blake2b(self.targets.numpy().tobytes(), digest_size=8).hexdigest()
        return f"{int((self.targets != IGNORED).sum())} targets, {digest}"

    def micro_batches(self, rank: int, world_size: int, local_batch_size: int) -> Iterator[MicroBatch]:
        """Sequences rank, rank + world_size, ... in micro-batches; every rank gets equally many, filled up if short."""
        most = -(-len(self.tokens) // world_size)
        for start in range(0, most, local_batch_size):
            own = slice(rank + start * world_size, rank + (start + local_batch_size) * world_size, world_size)
            yield micro_batch(self.tokens, self.targets, self.document_ids, own, local_batch_size)


def build_validation_set(corpus: Corpus, validation: Validation, seq_len: int) -> ValidationSet | None:
    """The documents of `validation.path`, or those held out of the training data, up to `validation.max_tokens`.

    None if there is no path and nothing is held out (validation.fraction = 0). The order is that of the source,
    without shuffling, so it is the same in every run. UserError if there is no text.
    """
    if validation.path:
        documents = path_documents(corpus.data, validation, corpus.tokenizer)
        missing = f"validation.path: {validation.path} holds no text, only empty documents."
    elif validation.fraction > 0:
        # What cannot be read was reported already, or is when training finds it.
        faults: list[Fault] | None = [] if corpus.skips_files else None
        readable = all_documents(corpus.source, corpus.new_retry(), faults)
        held_out = (document for document in readable if document in corpus.read_by_validation)
        documents = up_to(validation.max_tokens + 1, held_out, corpus.tokenizer)
        missing = (
            f"validation.fraction = {validation.fraction} holds out no document of the training data. "
            "Raise it, or give validation.path, or set it to 0 to train without validation."
        )
    else:
        return None
    text = np.concatenate([np.empty(0, dtype=np.int32), *(tokens for _, tokens in documents)])
    text = text[: validation.max_tokens + 1]
    if len(text) < 2:
        raise UserError(missing)
    return pack(text, seq_len, corpus.tokenizer, corpus.data.document_mask)


def pack(text: np.ndarray, seq_len: int, tokenizer: Tokenizer, document_mask: bool) -> ValidationSet:
    """Tokens as sequences of `seq_len`: every token but the first is a target once, the rest is padded."""
    count = -(-(len(text) - 1) // seq_len)
    tokens = np.full(count * seq_len, tokenizer.eot_id, dtype=np.int64)
    targets = np.full(count * seq_len, IGNORED, dtype=np.int64)
    tokens[: len(text) - 1] = text[:-1]
    targets[: len(text) - 1] = text[1:]
    lengths = np.where(targets == IGNORED, 0, tokenizer.byte_lengths[np.maximum(targets, 0)])
    packed = torch.from_numpy(tokens).view(count, seq_len)
    return ValidationSet(
        packed,
        torch.from_numpy(targets).view(count, seq_len),
        document_ids(packed, tokenizer.eot_id) if document_mask else None,
        torch.from_numpy(lengths.astype(np.int64)).view(count, seq_len),
    )
