"""The data of a run, opened before anything else is built: much of what can be wrong is wrong here."""

import dataclasses
from typing import Any

from swamla_titan.checkpoint.manifest import DATA
from swamla_titan.config import Config, with_vocabulary
from swamla_titan.config.rules import retry_seconds
from swamla_titan.data import Corpus, ValidationSet, build_validation_set, load_tokenizer, open_corpus
from swamla_titan.errors import Damaged


def open_data(config: Config, recorded: dict[str, Any] | None = None) -> tuple[Config, Corpus, ValidationSet | None]:
    """The training data and what validation reads, and the configuration with the tokenizer's vocabulary in it.

    `recorded` is what the checkpoint to resume from says of the data, see read_data_record. Raises Damaged where that
    is not what this program writes.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer.vocab_size)
    data = dataclasses.replace(config.data, retry_seconds=retry_seconds(config))
    try:
        corpus = open_corpus(data, config.validation, config.job.seed, tokenizer, recorded)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if recorded is None:
            raise
        # JSON within bounds, but of another shape than what reads it wrote.
        raise Damaged(f"{DATA}: not a data record of this program's checkpoints ({error!r})") from error
    if not config.validation.interval:
        return config, corpus, None
    return config, corpus, build_validation_set(corpus, config.validation, config.training.seq_len)
