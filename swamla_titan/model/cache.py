"""What decoding remembers, and for whom: caches of fixed size, allocated once.

Rows of a batch share one clock. Prompts of different length are padded on the left, so the newest token of every row
sits at the same index; row b's prompt begins at index starts[b], and its position there is 0.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swamla_titan.kernels.attention.dispatch import REFERENCE, SDPA
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import AttentionContext, SequenceContext, rotation_at

if TYPE_CHECKING:
    from swamla_titan.model.model import SWAMLAModel


@dataclass
class Clock:
    """Where in time the rows of a batch are; one object, shared by the caches of all layers."""

    starts: Tensor  # [B] int64, index of each row's first real token
    length: int = 0  # tokens stored per row, padding included: the index of the next one


class MLACache:
    """The latent and the rotary key of every token: kv_lora_rank + rope numbers each, for all heads together."""

    def __init__(self, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> None:
        self.clock = clock
        batch, device = clock.starts.shape[0], clock.starts.device
        self.latents = torch.zeros(batch, max_tokens, config.kv_lora_rank, dtype=dtype, device=device)
        self.rope_keys = torch.zeros(batch, max_tokens, config.qk_rope_head_dim, dtype=dtype, device=device)

    def fill(self, latents: Tensor, rope_keys: Tensor) -> None:
        """Store the prompts' latents [B, T, R] and rotated keys [B, T, rope]."""
        self.latents[:, : latents.shape[1]] = latents
        self.rope_keys[:, : rope_keys.shape[1]] = rope_keys

    def append(self, latents: Tensor, rope_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token a row, [B, 1, R] and [B, 1, rope]; all stored so far: [B, S, R] and [B, S, rope]."""
        end = self.clock.length + 1
        self.latents[:, end - 1] = latents[:, 0]
        self.rope_keys[:, end - 1] = rope_keys[:, 0]
        return self.latents[:, :end], self.rope_keys[:, :end]

    def next_mask(self) -> Tensor:
        """Which tokens the next one of each sequence sees: boolean [B, 1, 1, clock.length + 1]."""
        starts = self.clock.starts[:, None]  # [B, 1]
        return (torch.arange(self.clock.length + 1, device=starts.device) >= starts)[:, None, None]


class SWACache:
    """Rotated keys and values of a document's first `sink` tokens and of the newest `window` ones.

    keys and values are [B, sink + window, G, D]. The token at index t goes to slot sink + t % window; a token at
    position p < sink goes to slot p as well. A key that is in both is seen through the window only (`next_mask`).
    """

    def __init__(self, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> None:
        self.clock = clock
        # Never more slots than there are tokens.
        self.sink, self.window = min(config.swa_sink_size, max_tokens), min(config.swa_window, max_tokens)
        # Zeros and not empty: a slot that is masked still meets a weight of 0, and 0 * NaN is NaN.
        shape = (clock.starts.shape[0], self.sink + self.window, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=clock.starts.device)
        self.values = torch.zeros(shape, dtype=dtype, device=clock.starts.device)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the prompts' keys and values [B, T, G, D]."""
        length = keys.shape[1]
        times = torch.arange(max(0, length - self.window), length, device=keys.device)
        ring = self.sink + times % self.window
        # Past a short prompt's end this stores a key that is not the position's own; it is masked until `append`
        # writes that position.
        sinks = torch.arange(self.sink, device=keys.device)
        at = (self.clock.starts[:, None] + sinks).clamp(max=length - 1)[:, :, None, None]  # [B, sink, 1, 1]
        at = at.expand(-1, -1, *keys.shape[2:])
        for slots, new in ((self.keys, keys), (self.values, values)):
            slots[:, ring] = new[:, times]
            slots[:, : self.sink] = new.gather(1, at)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store one token a row: keys and values [B, 1, G, D] at positions [B, 1]."""
        ring = self.sink + self.clock.length % self.window
        own = (positions == torch.arange(self.sink, device=keys.device))[:, :, None, None]  # [B, sink, 1, 1]
        for slots, new in ((self.keys, keys), (self.values, values)):
            slots[:, ring] = new[:, 0]
            slots[:, : self.sink] = torch.where(own, new, slots[:, : self.sink])

    def next_mask(self) -> Tensor:
        """Which slots the next token of each sequence sees, at index clock.length: boolean [B, 1, 1, sink + window]."""
        time, starts = self.clock.length, self.clock.starts[:, None]  # starts: [B, 1]
        slots = torch.arange(self.window, device=starts.device)
        times = time - (time - slots) % self.window  # the newest index that each slot can hold; negative: none yet
        in_window = times >= starts  # [B, window]
        # Only once a sink key has left the window, else its weight would count twice.
        in_sink = time - starts - torch.arange(self.sink, device=starts.device) >= self.window  # [B, sink]
        return torch.cat([in_sink, in_window], dim=1)[:, None, None]


class DecodeCache:
    """Everything that decoding a batch needs beside the model: the clock and one cache per layer, by layer number."""

    def __init__(self, model: "SWAMLAModel", batch: int, max_tokens: int) -> None:
        """Memory for `batch` rows of up to `max_tokens` tokens, padding on the left included.

        Raises ValueError if the model cannot go that far.
        """
        config = model.config
        if not 1 <= max_tokens <= config.max_seq_len:
            raise ValueError(f"max_tokens = {max_tokens}: expected 1 ... max_seq_len = {config.max_seq_len}")
        self.config = config
        self.blocks: dict[str, Any] = dict(model.blocks.items())
        self.max_tokens = max_tokens
        self.dtype = model.activation_dtype
        self.clock = Clock(torch.zeros(batch, dtype=torch.int64, device=model.device))
        self.layers: dict[str, SWACache | MLACache] = {
            str(i): (SWACache if kind == "swa" else MLACache)(config, self.clock, max_tokens, self.dtype)
            for i, kind in enumerate(config.block_kinds)
        }

    def start(self, tokens: Tensor, lengths: Tensor | None) -> None:
        """Empty the cache for left-padded prompts tokens [B, T], of which the last lengths[b] are row b's."""
        batch, seq_len = tokens.shape
        rows = self.clock.starts.shape[0]
        if batch != rows or not 1 <= seq_len <= self.max_tokens:
            raise ValueError(f"prompts {tuple(tokens.shape)} do not fit a cache of {rows} x 1 ... {self.max_tokens}")
        if lengths is None:
            self.clock.starts.zero_()
        else:
            if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > seq_len)).any()):
                raise ValueError(f"lengths {lengths.tolist()}: expected {batch} numbers in 1 ... {seq_len}")
            self.clock.starts.copy_(seq_len - lengths)
        self.clock.length = seq_len

    def next_context(self, reference: bool) -> SequenceContext:
        """The context of the next token of each sequence, under masks over the caches' slots.

        Raises ValueError when the cache is full.
        """
        time, starts = self.clock.length, self.clock.starts[:, None]  # starts: [B, 1]
        if time == 0:
            raise ValueError("the cache is empty: call prefill before decode")
        if time >= self.max_tokens:
            raise ValueError(f"the cache is full: {self.max_tokens} tokens a row; make it with a larger max_tokens")
        positions, implementation = time - starts, REFERENCE if reference else SDPA  # positions: [B, 1]

        def of_layer(layer: str) -> AttentionContext:
            rotation = rotation_at(positions, self.blocks[layer].attention.rotary(self.config), self.config, self.dtype)
            return AttentionContext(positions, rotation, self.layers[layer].next_mask(), implementation)

        one_of_each = {block.kind: layer for layer, block in self.blocks.items()}
        return SequenceContext({kind: of_layer(layer) for kind, layer in one_of_each.items()})
