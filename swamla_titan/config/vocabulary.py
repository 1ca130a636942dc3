"""The one property of a model that the tokenizer decides."""

import dataclasses

from swamla_titan.config.parallel_rules import parallel_contradictions
from swamla_titan.config.sections import Config
from swamla_titan.errors import UserError


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The configuration with the tokenizer's vocabulary in the model, unless a larger one was asked for.

    Raises UserError if the model's vocabulary is too small for the tokenizer, or if the ranks of parallel.tensor cannot
    share it.
    """
    given = config.model.vocab_size
    if 0 < given < vocab_size:
        raise UserError(
            f"model.vocab_size = {given} is smaller than the {vocab_size} tokens of "
            f'data.tokenizer = "{config.data.tokenizer}"; leave it out to use the tokenizer\'s'
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=given or vocab_size))
    for (section_key, *_), problem, _ in parallel_contradictions(config):
        raise UserError(f"{section_key}: {problem}")
    return config
