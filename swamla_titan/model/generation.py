"""Sampling text from a model: the decode loop and the choice of the next token."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.distributed.dtensor import local
from swamla_titan.kernels import decode as kernels
from swamla_titan.kernels.device import why_no_kernels
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.model import SWAMLAModel

# A temperature as good as 0: dividing by one much smaller would overflow float32, or be a division by 0.
GREEDY_BELOW = 1e-6
_AHEAD = 8  # tokens that a GPU may be ahead of what the host has seen of them


class Decoder:
    """A model with the cache of a batch, which reads prompts, and then token after token.

    On a GPU the step of a token is one CUDA graph, captured at the second token: a step has some hundred small kernels,
    which the host launches slower than the GPU runs them. May be used for one batch of prompts after another, until the
    weights change, of which it may hold copies.
    """

    def __init__(self, model: SWAMLAModel, batch: int, max_tokens: int, memory_budget: int | None = None) -> None:
        """Arguments as of DecodeCache, which raises ValueError."""
        self.model = model
        self.cache = DecodeCache(model, batch, max_tokens, memory_budget)
        self.batch, self.max_tokens = batch, max_tokens
        # Weights that are gathered for each pass would be those of the pass that was captured.
        is_plain = all(local(each) is each for each in model.parameters()) and len(self.cache.devices) == 1
        self._captures = is_plain and model.device.type == "cuda"
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)  # which may be given to `decode`
        self._logits = self.tokens

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Empty the cache and read prompts -> logits of the next token, [B, vocab_size]."""
        longest, device = max(map(len, prompts)), self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        return self.model.prefill(padded, self.cache, None if min(map(len, prompts)) == longest else lengths)

    def decode(self, tokens: Tensor) -> Tensor:
        """Read the next token of each sequence [B] -> logits of the one after, [B, vocab_size], until the next call."""
        if not self._captures or not self._is_warm:
            self._is_warm = True
            return self.model.decode(tokens[:, None], self.cache)
        self.cache.require_room()
        if tokens is not self.tokens:
            self.tokens.copy_(tokens)
        if self._graph is None:
            graph, device = torch.cuda.CUDAGraph(), self.model.device
            # On a stream of this device, because torch's own belongs to the device of the process's first capture.
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
            ):
                self._logits = self.model.decode_step(self.tokens[:, None], self.cache)
            self._graph = graph
        self._graph.replay()
        self.cache.length += 1
        return self._logits


class _Copied(NamedTuple):
    """A tensor of the host, and the event at which it has its values; None: it has them."""

    values: Tensor
    ready: Any

    @classmethod
    def of(cls, tensor: Tensor) -> "_Copied":
        """A copy, without waiting for the device."""
        if not tensor.is_cuda:
            return cls(tensor, None)
        values = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tensor.device))
        return cls(values, ready)

    def wait(self) -> list[int]:
        """The values."""
        if self.ready is not None:
            self.ready.synchronize()
        found: list[int] = self.values.tolist()
        return found


@dataclass(frozen=True)
class Options:
    """How prompts are continued.

    `temperature` 0 (below 1e-6) takes the likeliest token. `top_k` > 0 keeps the k likeliest, then `top_p` < 1 the
    fewest of those whose probabilities (after top_k) add up to top_p. A sequence ends at `stop_token`, after
    `max_new_tokens`, or behind the first token for which `ends(number of the sequence, token)` is true.
    `memory_budget`: tokens of a sequence that layers with selective attention keep (DecodeCache). `generator` must live
    on the model's device. `decoder`: one of the model for so many prompts, to be used again; None: a new one, with the
    budget.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token: int | None = None
    generator: torch.Generator | None = None
    memory_budget: int | None = None
    ends: Callable[[int, int], bool] | None = None
    decoder: Decoder | None = None

    def validate(self) -> None:
        """Raise ValueError for an option that is out of range whatever the model."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: expected >= 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: expected >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected >= 0 (0: off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected > 0 and <= 1 (1: off)")


def generate(model: SWAMLAModel, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """Continue each prompt: the new tokens alone, without the stop token that ended them.

    `options` are fields of Options; errors as of `stream`.
    """
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, Options(max_new_tokens, **options)):
        for continuation, token in zip(new, tokens):
            if token is not None:
                continuation.append(token)
    return new


@torch.no_grad()
def stream(model: SWAMLAModel, prompts: list[list[int]], options: Options) -> Iterator[list[int | None]]:
    """The next token of each prompt, step after step; None for a sequence that has ended, as with its stop token.

    The model is in evaluation mode meanwhile. A GPU is some tokens ahead of those that are given.

    Raises ValueError for empty prompts, ids outside the vocabulary, options out of range, and prompts that leave no
    room within max_seq_len for the new tokens but the last, which the model never reads.
    """
    options.validate()
    max_new_tokens, stop_token, ends = options.max_new_tokens, options.stop_token, options.ends
    check_prompts(model, prompts, max_new_tokens, stop_token)
    room = max(map(len, prompts)) + max_new_tokens - 1
    decoder = options.decoder or Decoder(model, len(prompts), room, options.memory_budget)
    ended = [False] * len(prompts)

    def seen(tokens: list[int]) -> list[int | None]:
        given: list[int | None] = []
        for number, token in enumerate(tokens):
            ended[number] = ended[number] or token == stop_token
            given.append(None if ended[number] else token)
            ended[number] = ended[number] or (ends is not None and ends(number, token))
        return given

    copies: deque[_Copied] = deque()
    ahead = _AHEAD if model.device.type == "cuda" else 0
    training = model.training
    model.eval()
    try:
        logits = decoder.prefill(prompts)
        for step in range(max_new_tokens):
            choice = options.temperature, options.top_k, options.top_p, options.generator
            tokens = sample(logits, *choice, out=decoder.tokens)  # [B]
            copies.append(_Copied.of(tokens))
            while len(copies) > (ahead if step < max_new_tokens - 1 else 0):
                yield seen(copies.popleft().wait())
                if all(ended):
                    return
            if step < max_new_tokens - 1:
                logits = decoder.decode(tokens)
    finally:
        model.train(training)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token id per sequence, [B] int64, from logits [B, V], written to `out` if there is one.

    The options are as in Options.
    """
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    temperature = 0 if temperature < GREEDY_BELOW else temperature
    if not why_no_kernels(logits.device) and logits.shape[1] <= kernels.MOST_TOKENS_TO_SAMPLE:
        with torch.cuda.device_of(logits):  # Triton launches on the current one
            return kernels.sample(logits, out, temperature, top_k, top_p, generator)
    if not temperature:
        return out.copy_(logits.argmax(dim=-1))
    probabilities = restrict(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
    # As torch.multinomial draws one, which would wait for a GPU to see whether these are probabilities.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return out.copy_((probabilities / noise).argmax(dim=-1))


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


def check_prompts(model: SWAMLAModel, prompts: list[list[int]], max_new_tokens: int, stop_token: int | None) -> None:
    """Raises ValueError for prompts that `stream` does not take."""
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
