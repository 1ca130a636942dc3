"""Sampling text from a model: the decode loop and the choice of the next token."""

import torch
from torch import Tensor

from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.model import SWAMLAModel

# A temperature as good as 0: dividing by one much smaller would overflow float32, or be a division by 0.
GREEDY_BELOW = 1e-6


@torch.no_grad()
def generate(
    model: SWAMLAModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> list[list[int]]:
    """Continue each prompt: the new tokens alone, without the stop token that ended them.

    `temperature` 0 (below 1e-6) takes the likeliest token. `top_k` > 0 keeps the k likeliest, then `top_p` < 1 the
    fewest of those whose probabilities (after top_k) add up to top_p. A sequence ends at `stop_token` or after
    `max_new_tokens`. `memory_budget`: tokens of a sequence that layers with selective attention keep (DecodeCache).
    `generator` must live on the model's device. The model is in evaluation mode meanwhile.

    Raises ValueError for empty prompts, ids outside the vocabulary, options out of range, and prompts that leave no
    room within max_seq_len for the new tokens but the last, which the model never reads.
    """
    check_options(max_new_tokens, temperature, top_k, top_p)
    _check_prompts(model, prompts, max_new_tokens, stop_token)
    longest = max(map(len, prompts))
    # The last new token is returned but never read.
    cache = DecodeCache(model, len(prompts), longest + max_new_tokens - 1, memory_budget)
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    new: list[Tensor] = []  # [B] each

    training = model.training
    model.eval()
    try:
        logits = model.prefill(torch.tensor(padded, device=model.device), cache, lengths)
        while True:
            token = sample(logits, temperature, top_k, top_p, generator)  # [B]
            new.append(token)
            if stop_token is not None:
                finished |= token == stop_token
                if bool(finished.all()):
                    break
            if len(new) == max_new_tokens:
                break
            logits = model.decode(token[:, None], cache)
    finally:
        model.train(training)
    continuations: list[list[int]] = torch.stack(new, dim=1).tolist()
    if stop_token is None:
        return continuations
    return [each[: each.index(stop_token)] if stop_token in each else each for each in continuations]


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """One token id per sequence, [B] int64, from logits [B, V]; the options as in `generate`."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    probabilities = restrict(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with the tokens that top_k and top_p leave out set to -inf. The likeliest always stays.

    Of equally likely tokens at the edge some stay, as many as there is room for.
    """
    if 0 < top_k < logits.shape[-1]:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~kept, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # probability of all likelier tokens
        left_out = before >= top_p
        left_out[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(left_out).scatter(1, order, left_out), float("-inf"))
    return logits


def check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for an option of `generate` that is out of range whatever the model."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: expected >= 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: expected >= 0")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: expected >= 0 (0: off)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: expected > 0 and <= 1 (1: off)")


def _check_prompts(model: SWAMLAModel, prompts: list[list[int]], max_new_tokens: int, stop_token: int | None) -> None:
    vocab_size, max_seq_len = model.config.vocab_size, model.config.max_seq_len
    if not prompts:
        raise ValueError("prompts: expected at least one")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"prompt {number} has token {wrong[0]}: the vocabulary is 0 ... {vocab_size - 1}")
        if len(prompt) + max_new_tokens - 1 > max_seq_len:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with max_new_tokens = {max_new_tokens} "
                f"exceeds max_seq_len = {max_seq_len}: shorten either"
            )
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token = {stop_token}: the vocabulary is 0 ... {vocab_size - 1}")
