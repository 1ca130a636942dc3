"""What a model with selective attention loses when its caches forget: losses of held-out text under budgets of memory.

    python benchmarks/memory_budget.py RUN_OR_CHECKPOINT --text held_out/*.txt --budgets 256 512 1024 1536

Each file is cut into sequences of --seq-len tokens. They are read as `generate --memory-budget` reads what it has
written: each token with what the cache of each MLA layer still holds when it comes. (A prompt it reads at once, and
drops tokens of it only then.) All tokens of a sequence are computed together, because a layer's scores say which tokens
its cache has dropped by when; tests/model/test_selective.py compares that with real caches.

Three ways to choose the token that leaves a full cache: the one of which most was `selected`, as `generate` does, and
for comparison the `oldest` one, and a `random` one. None drops a sequence's first token or its newest, and what was
selected of the tokens that stay is subtracted from their scores, as in training.

Prints the mean loss without a budget, of the tokens behind the largest budget, where all budgets are at work; how much
higher it is under each budget, with the standard error over sequences; and the MiB of a sequence's caches.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.data import Tokenizer, load_tokenizer
from swamla_titan.kernels.attention.masks import Selection
from swamla_titan.kernels.attention.selective import reference_selected_before
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.branch import AttentionContext, InnerAttention
from swamla_titan.model.cache import DecodeCache
from swamla_titan.tools.generate import load_model
from swamla_titan.train.step import GROUPS

Leaves = Literal["selected", "oldest", "random"]


def held_tokens(rank: Tensor, budget: int) -> Tensor:
    """Which tokens a cache with room for `budget` holds when each token has come, boolean [B, T, T].

    Of a full one the token s with the largest rank[:, t, s] leaves for the token t, but not the first or the newest.
    """
    tokens = rank.shape[1]
    held = torch.zeros_like(rank, dtype=torch.bool)
    for t in range(tokens):
        if t:
            held[:, t] = held[:, t - 1]
        if t >= budget:
            rank_now = rank[:, t].masked_fill(~held[:, t], float("-inf"))
            rank_now[:, 0] = rank_now[:, t - 1] = float("-inf")
            held[:, t].scatter_(1, rank_now.argmax(dim=1, keepdim=True), False)
        held[:, t, t] = True
    return held


class ForgetfulAttention(InnerAttention):
    """Selective attention of each token to those that a cache with room for `budget` holds, scores written down."""

    def __init__(self, budget: int, leaves: Leaves) -> None:
        super().__init__()
        self.budget, self.leaves = budget, leaves

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """As in InnerAttention, of sequences of one document."""
        assert selection is not None
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        selected = reference_selected_before(query[:, selection.head], key[:, selection.head], selection.rule, scale)
        held = held_tokens(self.rank(selected), self.budget)
        scores = (query @ key.transpose(-2, -1) * scale).to(selected.dtype) - selected[:, None]
        weights = scores.masked_fill(~held[:, None], float("-inf")).softmax(dim=-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2)

    def rank(self, selected: Tensor) -> Tensor:
        """By which tokens leave, [B, T, T]."""
        if self.leaves == "selected":
            return selected
        if self.leaves == "oldest":
            return -torch.arange(selected.shape[2], dtype=selected.dtype, device=selected.device).expand_as(selected)
        return torch.rand_like(selected[:, :1]).expand_as(selected)


@torch.no_grad()
def losses(model: SWAMLAModel, tokens: Tensor, budget: int, leaves: Leaves = "selected") -> Tensor:
    """Of each token of `tokens` [B, T] but the first, [B, T - 1]."""
    for block in model.blocks.values():
        if block.attention.selecting_head is not None:
            block.attention.inner_attention = ForgetfulAttention(budget, leaves)
    each = zip(model(tokens[:, :-1]), tokens[:, 1:])  # a sequence at a time, because logits in float32 are large
    return torch.stack([F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in each])


def cache_bytes(model: SWAMLAModel, tokens: int, budget: int) -> int:
    """Of all layers, for one sequence."""
    layers = DecodeCache(model, 1, tokens, budget).layers.values()
    return sum(each.nbytes for layer in layers for each in vars(layer).values() if isinstance(each, Tensor))


def sequences(texts: list[Path], tokenizer: Tokenizer, length: int, most: int) -> Iterator[list[int]]:
    """The first `most` sequences of the texts."""
    for text in texts:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
        for start in range(0, len(ids) - length + 1, length):
            if most == 0:
                return
            most -= 1
            yield ids[start : start + length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder, or a checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 1536])
    parser.add_argument("--seq-len", type=int, default=0, help="default: training.seq_len")
    parser.add_argument("--sequences", type=int, default=64, help="at most")
    parser.add_argument("--together", type=int, default=8, help="sequences whose scores of all heads exist at a time")
    arguments = parser.parse_args()
    config, tokenizer, model = load_model(find_checkpoint(arguments.checkpoint, GROUPS), ema=False)
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    length = arguments.seq_len or config.training.seq_len
    found = list(sequences(arguments.text, tokenizer, length, arguments.sequences))
    late = length - max(arguments.budgets)
    if len(found) < 2 or late < 1:
        parser.error(f"{len(found)} sequences of {length} tokens: give more text, or --seq-len beyond all budgets")
    batches = torch.tensor(found, device=model.device).split(arguments.together)

    def of_late_tokens(budget: int, leaves: Leaves = "selected") -> Tensor:
        """The mean loss of each sequence, [sequences] float64."""
        torch.manual_seed(0)
        return torch.cat([losses(model, each, budget, leaves)[:, -late:].double().mean(dim=1) for each in batches])

    whole = of_late_tokens(length)
    print(f"{len(found)} sequences of {length} tokens: loss of the last {late}, and what a budget adds to it")
    print("budget  MiB a sequence" + "".join(f"{leaves:>20}" for leaves in get_args(Leaves)))
    print(f"  none  {cache_bytes(model, length, length) / 2**20:>14.3f}{whole.mean():>20.4f}", flush=True)
    for budget in sorted(arguments.budgets, reverse=True):
        print(f"{budget:>6}  {cache_bytes(model, length, budget) / 2**20:>14.3f}", end="")
        for leaves in get_args(Leaves):
            more = of_late_tokens(budget, leaves) - whole
            print(f"{more.mean():>+10.4f} ± {more.std() / len(more) ** 0.5:.4f}", end=" ", flush=True)
        print()


if __name__ == "__main__":
    main()
