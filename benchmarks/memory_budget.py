"""What a model with selective attention loses when its caches forget: the loss of text read token by token.

    python benchmarks/memory_budget.py RUN_OR_CHECKPOINT --text held_out.txt --budgets 64 128 256 512

The text is cut into sequences of --seq-len tokens. From its first token on each is read as `generate --memory-budget`
reads what it has written: every token is decoded with what the caches of the layers still hold. (A prompt it reads at
once, and drops tokens of it only then.) Prints for each budget, and without one,
the mean loss of the tokens (of all, and of those behind the smallest budget) and the MiB of a sequence's caches.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.data import load_tokenizer
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.tools.generate import _loaded, find_checkpoint


def cache_bytes(cache: DecodeCache) -> int:
    """Of all tensors of its layers."""
    tensors = [each for layer in cache.layers.values() for each in vars(layer).values() if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)


@torch.no_grad()
def losses(model: SWAMLAModel, tokens: Tensor, budget: int | None) -> tuple[Tensor, int]:
    """Of each token of `tokens` [B, T] but the first, [B, T - 1], and the bytes of the caches of a sequence."""
    batch, length = tokens.shape
    cache = DecodeCache(model, batch, length, budget)
    logits, found = model.prefill(tokens[:, :1], cache), []
    for place in range(1, length):
        found.append(F.cross_entropy(logits.float(), tokens[:, place], reduction="none"))
        logits = model.decode(tokens[:, place : place + 1], cache)
    return torch.stack(found, dim=1), cache_bytes(cache) // batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder, or a checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--seq-len", type=int, default=0, help="default: training.seq_len")
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    config, tokenizer, model = _loaded(find_checkpoint(arguments.checkpoint), ema=False)
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    length = arguments.seq_len or config.training.seq_len
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.sequences * length]
    tokens = torch.tensor(ids[: len(ids) // length * length], device=model.device).view(-1, length)
    print(f"{tokens.shape[0]} sequences of {length} tokens")
    print("budget    loss    behind the smallest budget    MiB a sequence")
    for budget in [*sorted(arguments.budgets), None]:
        found, size = losses(model, tokens, budget)
        late = found[:, min(arguments.budgets) :]
        late_loss = late.mean().item() if late.numel() else math.nan
        print(f"{budget or 'none':>6}  {found.mean():.4f}  {late_loss:>28.4f}  {size / 2**20:>16.2f}", flush=True)


if __name__ == "__main__":
    main()
