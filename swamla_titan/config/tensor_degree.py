"""What a model's shape must divide by for tensor parallelism."""

import math

from swamla_titan.model.config import VOCAB_MULTIPLE, ModelConfig

FFN_GROUP = 128  # hidden units that stay together, model.feed_forward.GROUP; that module imports torch


def tensor_parallel_problems(model: ModelConfig, tensor: int, seq_len: int | None = None) -> list[str]:
    """What of `model` cannot be shared by `tensor` ranks, with its numbers and a way out; empty if all can.

    `seq_len` are the tokens of a row that a tensor-parallel group computes (training.seq_len, less what context
    parallel ranks take of it), None: unknown. A vocab_size of 0 (the tokenizer's, not known yet) is not looked at.
    """
    group = math.gcd(model.ffn_width, FFN_GROUP)
    counts = {f"model.num_heads = {model.num_heads}": model.num_heads}
    if model.kv_heads != model.num_heads and "swa" in model.block_kinds:
        counts[f"model.num_kv_heads = {model.kv_heads}"] = model.kv_heads
    counts[f"the {model.ffn_width // group} groups of {group} in a feed-forward width of {model.ffn_width}"] = (
        model.ffn_width // group
    )
    if seq_len is not None:
        counts[f"{seq_len} tokens of a row"] = seq_len
    if model.vocab_size:
        counts[f"the vocabulary, padded to {model.padded_vocab_size}"] = model.padded_vocab_size
    common = math.gcd(*counts.values())
    fitting = max(degree for degree in range(1, tensor + 1) if common % degree == 0)
    found = []
    for what, count in counts.items():
        if count % tensor:
            way_out = f"parallel.tensor = {fitting} divides all"
            if count == model.padded_vocab_size and "vocabulary" in what:
                multiple = math.lcm(VOCAB_MULTIPLE, tensor)
                way_out += f", or set model.vocab_size = {-(-count // multiple) * multiple}"
            found.append(f"parallel.tensor = {tensor} does not divide {what}: {way_out}")
    return found
