"""What decoding remembers, and for whom: caches of a fixed size, allocated once.

Sequences of a batch share one clock. Prompts of different length are padded on the left, so the newest token of every
sequence has the same index; the prompt of sequence b begins at index starts[b], and its position there is 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import for_decoding
from swamla_titan.kernels.decode import Stream, why_no_decode_kernels
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.branch import (
    Attention,
    AttentionCache,
    AttentionContext,
    Clock,
    SequenceContext,
    Step,
    TokenContext,
)
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import Rotation

SMALLEST_BUDGET = 3  # tokens


def _drops_tokens(mixer: Any, config: ModelConfig) -> bool:
    """Whether a layer's cache may have less room than there are tokens."""
    return isinstance(mixer, Attention) and mixer.selection_head(config) is not None


class DecodeCache:
    """Everything that decoding a batch needs beside the model: the clock and one cache per layer, by layer number."""

    def __init__(self, model: Any, batch: int, max_tokens: int, memory_budget: int | None = None) -> None:
        """Memory for `batch` sequences of up to `max_tokens` tokens, padding on the left included.

        `memory_budget`: layers with selective attention keep so many tokens of a sequence, and drop others.
        `model` is a SWAMLAModel, which imports this module.

        Raises ValueError if the model cannot go that far, or not with that budget.
        """
        config = model.config
        if not 1 <= max_tokens <= config.max_seq_len:
            raise ValueError(f"max_tokens = {max_tokens}: expected 1 ... max_seq_len = {config.max_seq_len}")
        self.config = config
        self.blocks: dict[str, Any] = dict(model.blocks.items())
        self.max_tokens = max_tokens
        self.dtype = model.activation_dtype
        # Consecutive layers are on each device, which has a clock of its own.
        self.devices = model.devices or [model.device]
        share = -(-len(self.blocks) // len(self.devices))
        self.device_number = {name: number // share for number, name in enumerate(self.blocks)}
        zeros = [torch.zeros(batch, dtype=torch.int64, device=device) for device in self.devices]
        self.clocks = [Clock(starts, starts.new_zeros(1)) for starts in zeros]
        self.clock = self.clocks[0]
        self.length = 0  # of the clocks, known to the host
        dropping = {name for name, block in self.blocks.items() if _drops_tokens(block.attention, config)}
        if memory_budget is not None and not dropping:
            keys = " or ".join(f"model.{name}" for name in config.quantities("selects"))
            raise ValueError(f"memory_budget = {memory_budget}: no layer drops tokens without {keys}")
        if memory_budget is not None and memory_budget < SMALLEST_BUDGET:
            raise ValueError(
                f"memory_budget = {memory_budget}: expected >= {SMALLEST_BUDGET} (the first token, the newest two)"
            )
        budget = max_tokens if memory_budget is None else min(memory_budget, max_tokens)
        self.layers: dict[str, Any] = {
            name: block.attention.new_cache(
                config, self.clock_of(name), budget if name in dropping else max_tokens, self.dtype
            )
            for name, block in self.blocks.items()
        }
        # What computes a layer's next token by kernels, where these can; the other layers by Block.decode.
        self.steps: dict[str, Step] = {}
        self.head_step: Callable[[Stream], Tensor] | None = None
        if model.attention_backend != "reference" and not why_no_decode_kernels(model.device, self.dtype):
            self.steps = self._fused_steps()
            self.head_step = model.fused_head(self.dtype)
        # Of annexes (model/annexes.py), which look up by the newest tokens.
        self.annex_caches = {key: annex.new_cache(self.clock, self.dtype) for key, annex in model.annexes.each()}
        lookback = max((annex.lookback(config) for _, annex in model.annexes.each()), default=0)
        self.newest = zeros[0].new_zeros(batch, lookback + 1)  # tokens

    def clock_of(self, layer: str) -> Clock:
        """The clock on the layer's device."""
        return self.clocks[self.device_number[layer]]

    def _fused_steps(self) -> dict[str, Step]:
        """What computes layers by kernels, by their names; layers of a kind on a device share the rotation."""
        kinds = attention_kinds(self.config)
        rotations: dict[tuple[str, int], Rotation] = {}
        steps = {}
        for name, block in self.blocks.items():
            kind, number = block.kind, self.device_number[name]
            if kind not in kinds:
                continue
            if (kind, number) not in rotations:
                positions = torch.arange(self.max_tokens, device=self.devices[number])[None]
                cos, sin = kinds[kind].rotation(self.config, positions, self.dtype)
                rotations[kind, number] = Rotation(cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous())
            step = block.fused_decode(self.layers[name], rotations[kind, number], self.dtype)
            if step is not None:
                steps[name] = step
        return steps

    def start(self, tokens: Tensor, lengths: Tensor | None) -> None:
        """Empty the cache for left-padded prompts [B, T], where sequence b has the last lengths[b] tokens."""
        batch, seq_len = tokens.shape
        size = self.clock.starts.shape[0]
        if batch != size or not 1 <= seq_len <= self.max_tokens:
            raise ValueError(f"prompts {tuple(tokens.shape)} do not fit a cache of {size} x 1 ... {self.max_tokens}")
        if lengths is not None and (lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > seq_len)).any())):
            raise ValueError(f"lengths {lengths.tolist()}: expected {batch} numbers in 1 ... {seq_len}")
        for clock in self.clocks:
            clock.starts.zero_() if lengths is None else clock.starts.copy_(seq_len - lengths)
            clock.length.fill_(seq_len)
        self.length = seq_len
        newest = tokens[:, -self.newest.shape[1] :]
        self.newest[:, self.newest.shape[1] - newest.shape[1] :] = newest

    def remember(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next token of each sequence, [B, 1]; the newest tokens that annexes look back to, and positions.

        Positions are negative in the padding, and before the first token.
        """
        self.newest.copy_(torch.cat([self.newest[:, 1:], tokens], dim=1))
        ages = torch.arange(self.newest.shape[1] - 1, -1, -1, device=tokens.device)
        return self.newest, self.clock.length - ages - self.clock.starts[:, None]

    def require_room(self) -> None:
        """Raise ValueError if there is no prompt yet, or no room for another token."""
        if self.length == 0:
            raise ValueError("the cache is empty: call prefill before decode")
        if self.length >= self.max_tokens:
            raise ValueError(
                f"the cache is full: {self.max_tokens} tokens per sequence; make it with a larger max_tokens"
            )

    def next_context(self, asked: AttentionBackend, device_number: int = 0) -> SequenceContext:
        """The context of the next token of each sequence, under masks over the caches' slots, for Block.decode.

        `asked`: the model's attention_backend. It is for the layers on one device.
        """
        clock = self.clocks[device_number]
        implementation = for_decoding(asked)

        def of_layer(layer: str) -> TokenContext:
            mixer, positions = self.blocks[layer].attention, clock.length - clock.starts[:, None]  # [B, 1]
            if not isinstance(mixer, Attention):
                return TokenContext(positions)
            rotation = mixer.rotation(self.config, positions, self.dtype)
            cache: AttentionCache = self.layers[layer]
            return AttentionContext(positions, rotation, cache.next_mask(), implementation)

        one_of_each = {
            block.kind: layer
            for layer, block in self.blocks.items()
            if layer not in self.steps and self.device_number[layer] == device_number
        }
        return SequenceContext({kind: of_layer(layer) for kind, layer in one_of_each.items()})
