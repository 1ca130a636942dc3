"""The table of docs/export.md: how far the exported code's float32 logits are from the model's.

PYTHONPATH=. python -m tests.remote_code.parity [DEVICE]
"""

import sys

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

from swamla_titan.model import SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.remote_code.modeling_swamla import SwamlaForCausalLM
from tests.remote_code import models
from tests.remote_code.models import SHAPES

PROMPT, STEPS = 90, 40  # tokens
DEVICE = "".join(sys.argv[1:]) or "cpu"


def of_shape(shape: str) -> tuple[SWAMLAModel, SwamlaForCausalLM]:
    ours, theirs = models.of_shape(shape, torch.float32)
    return ours.to(DEVICE), theirs.to(DEVICE)


def random_tokens(shape: str, *size: int) -> Tensor:
    return models.random_tokens(shape, *size).to(DEVICE)


def apart(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def prefill(shape: str) -> float:
    """Logits of all tokens of two sequences."""
    ours, theirs = of_shape(shape)
    tokens = random_tokens(shape, 2, length(shape))
    return apart(theirs(tokens).logits, ours(tokens))


def decoding(shape: str) -> float:
    """A prompt, then one token after another from the cache; beside our own cached decoding."""
    ours, theirs = of_shape(shape)
    tokens, start = random_tokens(shape, 2, length(shape)), length(shape) - STEPS
    own, cache = DecodeCache(ours, 2, length(shape)), DynamicCache()
    worst = apart(theirs(tokens[:, :start], cache=cache).logits[:, -1], ours.prefill(tokens[:, :start], own))
    for at in range(start, length(shape)):
        new = tokens[:, at : at + 1]
        worst = max(worst, apart(theirs(new, cache=cache).logits[:, 0], ours.decode(new, own)))
    return worst


def padded(shape: str) -> float:
    """The same with prompts of different length, padded on the left, in a static cache."""
    ours, theirs = of_shape(shape)
    total = length(shape)
    start, tokens = total - STEPS, random_tokens(shape, 3, total)
    lengths = torch.tensor([3, start // 2, start], device=DEVICE)
    mask = (torch.arange(total, device=DEVICE) >= start - lengths[:, None]).long()
    own, cache = DecodeCache(ours, 3, total), StaticCache(theirs.config, max_cache_len=total)
    expected = ours.prefill(tokens[:, :start], own, lengths)
    worst = apart(theirs(tokens[:, :start], attention_mask=mask[:, :start], cache=cache).logits[:, -1], expected)
    for at in range(start, total):
        expected = ours.decode(tokens[:, at : at + 1], own)
        found = theirs(tokens[:, at : at + 1], attention_mask=mask[:, : at + 1], cache=cache)
        worst = max(worst, apart(found.logits[:, 0], expected))
    return worst


def documents(shape: str) -> float:
    """Three documents packed into a sequence."""
    ours, theirs = of_shape(shape)
    lengths = (1, length(shape) // 3, length(shape) - 1 - length(shape) // 3)
    tokens = random_tokens(shape, 1, length(shape))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(DEVICE)
    positions = torch.cat([torch.arange(each) for each in lengths])[None].to(DEVICE)
    return apart(theirs(tokens, position_ids=positions).logits, ours(tokens, document_ids=ids))


def length(shape: str) -> int:
    return min(PROMPT + STEPS, SHAPES[shape].max_seq_len)


@torch.no_grad()
def main() -> None:
    columns = {"prompt": prefill, "cached": decoding, "left-padded, static": padded, "documents": documents}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print(f"| shape | largest logit | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for shape in SHAPES:
        largest = of_shape(shape)[0](random_tokens(shape, 2, length(shape))).abs().max().item()
        print(
            f"| {shape} | {largest:.1f} | {' | '.join(f'{each(shape):.0e}' for each in columns.values())} |", flush=True
        )


if __name__ == "__main__":
    main()
