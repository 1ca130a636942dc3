"""The first sequence that a run would train on, read and decoded: what goes in is text, and looks like it."""

import json
from dataclasses import dataclass

from swamla_titan.data import BatchLoader, Corpus
from swamla_titan.data.tokenizer import Tokenizer
from swamla_titan.escaping import one_line

SHOWN = 200  # characters


@dataclass(frozen=True)
class FirstSequence:
    """`text` is its beginning; `lost`: a piece of it that decoding and encoding once more did not give back."""

    tokens: int
    documents: int
    text: str
    lost: str | None
    skipped_files: int  # that could not be read on the way

    def __str__(self) -> str:
        documents = f"{self.documents} document" + ("" if self.documents == 1 else "s")
        found = f"{self.tokens} tokens of {documents}"
        if self.lost is not None:
            return f"{found}; decoded and encoded once more they are others: {_quoted(self.lost)}"
        return f"{found}, decoded and encoded once more without loss; it begins: {_quoted(self.text)}"


def first_sequence(corpus: Corpus, seq_len: int) -> FirstSequence:
    """Reads it in this process. Raises the UserError or RunFailed of data that cannot be read."""
    with BatchLoader(corpus, seq_len=seq_len, global_batch_size=1, num_workers=0) as loader:
        batch = next(loader)
    tokenizer = corpus.tokenizer
    pieces: list[list[int]] = [[]]
    for token in batch.tokens[0].tolist():
        if token == tokenizer.eot_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    # Whole are those between two ends of text; a document that the sequence cuts may be cut inside of a word.
    whole = pieces[1:-1]
    lost = [piece for piece in whole if tokenizer.encode(tokenizer.decode(piece)) != piece]
    lost += [piece for piece in pieces if not _text_returns(tokenizer, piece)]
    return FirstSequence(
        tokens=batch.tokens.shape[1],
        documents=sum(map(bool, pieces)),
        text=" ".join(tokenizer.decode(piece).strip("\ufffd") for piece in pieces if piece),  # halves of cut characters
        lost=tokenizer.decode(lost[0]) if lost else None,
        skipped_files=len({each.file for each in batch.excluded}),
    )


def _text_returns(tokenizer: Tokenizer, tokens: list[int]) -> bool:
    text = tokenizer.decode(tokens)
    return tokenizer.decode(tokenizer.encode(text)) == text


def _quoted(text: str) -> str:
    """The beginning of a text on one line."""
    shown = one_line(json.dumps(text[:SHOWN], ensure_ascii=False))
    return shown + ("..." if len(text) > SHOWN else "")
