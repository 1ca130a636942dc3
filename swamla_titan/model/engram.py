"""Engram: conditional memory by hashed n-gram lookup (arXiv:2601.07372).

Which row of which table a token looks up: the n-gram that ends at a token of a document is its n last tokens, as ids of
the compressed vocabulary (data/tokenizer.py); before the document's first token lies the pad id. With an odd
multiplier for each of its positions, its hash is

    (id[t] * m[0]) XOR (id[t - 1] * m[1]) XOR ... XOR (id[t - n + 1] * m[n - 1])  modulo a prime.

The tables of a layer have different primes, so different n-grams collide in them; its orders share the multipliers.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.model.annex import Annex, StreamContext
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.model.branch import Clock, Saved
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import Linear, PerChannel, RMSNorm, Role, inverse_rms
from swamla_titan.model.row_table import RowTable

_LEAST_GATE = 1e-6  # of |g| under the root of the sharpened gate
# For numbers below 3.3e24 Miller and Rabin's test with these bases is exact (Sorenson and Webster, arXiv:1509.00864).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


@dataclass(frozen=True)
class NgramHash:
    """The hashes of a layer; `primes[i]` has the sizes of the tables of `orders[i]`.

    The tables lie one after another in one storage, the first order's heads first.
    """

    orders: tuple[int, ...]
    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(map(sum, self.primes))

    def indices(self, ids: Tensor, positions: Tensor, pad: int) -> Tensor:
        """Compressed ids [B, T] and positions in documents [B or 1, T] -> rows of the storage, [B, T, tables] int64.

        Ids and `pad` are at most the largest id that the multipliers were drawn for, so no multiple exceeds int64.
        The host does not wait for the device.
        """
        mixed, of_order = ids * self.multipliers[0], []
        for lag in range(1, self.orders[-1]):
            earlier = torch.where(positions >= lag, F.pad(ids, (lag, 0))[:, :-lag], pad)
            mixed = mixed ^ (earlier * self.multipliers[lag])
            if lag + 1 in self.orders:
                of_order.append(mixed)
        primes, offsets = _primes_and_offsets(self.primes, ids.device)
        return (torch.stack(of_order, dim=-1)[..., None] % primes + offsets).flatten(-2)


@functools.cache
def _primes_and_offsets(primes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each [orders, heads]; copied to a device once, because a copy may wait for the device."""
    rows = torch.tensor(primes)
    offsets = (rows.flatten().cumsum(0) - rows.flatten()).view_as(rows)
    return rows.to(device), offsets.to(device)


@functools.lru_cache
def ngram_hashes(engram: EngramConfig, largest_id: int) -> dict[int, NgramHash]:
    """The hash of each layer: a function of its arguments alone, the same on every rank and machine.

    `largest_id`: the largest compressed id, or the pad id.
    """
    primes = primes_from(engram.table_size)
    return {
        layer: NgramHash(
            engram.orders,
            tuple(_multiplier(engram.seed, layer, lag, largest_id) for lag in range(engram.orders[-1])),
            tuple(tuple(next(primes) for _ in range(engram.heads)) for _ in engram.orders),
        )
        for layer in engram.layers
    }


def _multiplier(seed: int, layer: int, lag: int, largest_id: int) -> int:
    """An odd number that times `largest_id` still is an int64."""
    digest = hashlib.sha256(f"n-gram/{seed}/{layer}/{lag}".encode()).digest()
    odd_numbers = (2**63 - 1) // max(largest_id, 1) // 2
    return 2 * (int.from_bytes(digest[:16], "little") % odd_numbers) + 1


def primes_from(smallest: int) -> Iterator[int]:
    """The primes from `smallest` on."""
    return (number for number in count(smallest) if _is_prime(number))


def _is_prime(number: int) -> bool:
    if number < 2 or any(number % base == 0 for base in _BASES):
        return number in _BASES
    halvings = ((number - 1) & -(number - 1)).bit_length() - 1
    return not any(_shows_composite(number, base, halvings) for base in _BASES)


def _shows_composite(number: int, base: int, halvings: int) -> bool:
    power = pow(base, (number - 1) >> halvings, number)
    squares = accumulate(range(halvings - 1), lambda square, _: square * square % number, initial=power)
    return power != 1 and number - 1 not in squares


class ShortConvolution(PerChannel):
    """Depthwise causal convolution behind RMSNorm, then SiLU; zero at first.

    y[t] = silu(sum over taps k of w[k] * norm(x)[t - k * dilation]), where a tap before the document's start is zero.
    It is a few shifted multiplications instead of cuDNN's operator, because these are exact in float32 whether or not
    TF32 is on, and compile to one kernel. `weight` [kernel * dim] has the newest tap first.
    """

    initial: ClassVar[dict[str, float]] = {"weight": 0.0}

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.norm = RMSNorm(dim)
        self.weight = torch.nn.Parameter(torch.zeros(kernel * dim))

    @property
    def halo(self) -> int:
        """How many tokens before a token its result depends on."""
        return (self.kernel - 1) * self.dilation

    def forward(self, x: Tensor, context: StreamContext) -> Tensor:
        """[B, t, dim] -> [B, t, dim]."""
        done, out = 0, []
        for section in context.with_halos(self.normed(x), self.halo):
            length = section.shape[1] - self.halo
            out.append(self.of_section(section, context.positions[:, done : done + length]))
            done += length
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def normed(self, x: Tensor) -> Tensor:
        """x / rms(x), [B, t, dim]; the norm's gain is applied to the taps, which are fewer."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * inverse_rms(wide)[..., None]).to(x.dtype)

    def of_section(self, section: Tensor, positions: Tensor) -> Tensor:
        """Normed values of a halo and n tokens, [B, halo + n, dim], and the tokens' positions -> [B, n, dim]."""
        wide = torch.promote_types(section.dtype, torch.float32)
        taps = self.sharding.parameter(self.weight).to(wide).view(self.kernel, -1) * self.norm.gain(wide)
        total = section[:, self.halo :].to(wide) * taps[0]
        for k in range(1, self.kernel):
            lag = k * self.dilation
            earlier = section[:, self.halo - lag : section.shape[1] - lag].to(wide)
            total = total + torch.where(positions[..., None] >= lag, earlier, 0.0) * taps[k]
        return F.silu(total).to(section.dtype)


class EngramCache:
    """The normed inputs of the convolution for the newest tokens, [B, halo, dim]."""

    def __init__(self, clock: Clock, halo: int, dim: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros(clock.starts.shape[0], halo, dim, dtype=dtype, device=clock.starts.device)

    def append(self, values: Tensor) -> Tensor:
        """Store those of the next tokens, [B, n, dim]; returns the stored ones and these, [B, halo + n, dim]."""
        section = torch.cat([self.values, values], dim=1)
        self.values.copy_(section[:, values.shape[1] :])
        return section


class Engram(Annex):
    """Rows of hashed n-grams, gated by the residual stream and mixed by a short convolution.

        e = the rows of the token's n-grams, one of each table        [d_mem]
        g = <RMSNorm(x), RMSNorm(W_k e)> / sqrt(dim)
        v = sigmoid(g) W_v e
        x + v + ShortConvolution(v)

    With `sharpen_gate` g is sign(g) sqrt(|g|) before the sigmoid.
    """

    observed: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        own = config.engram
        self.hash = hashes(config)[layer]
        self.sharpen_gate = own.sharpen_gate
        self.table = RowTable(self.hash.rows, own.row_width)
        self.key = Linear(own.d_mem, config.dim, Role.MEMORY)
        self.value = Linear(own.d_mem, config.dim, Role.MEMORY)
        self.query_norm = RMSNorm(config.dim)
        self.key_norm = RMSNorm(config.dim)
        self.convolution = ShortConvolution(config.dim, own.kernel, own.orders[-1])

    @classmethod
    def saved(cls, config: ModelConfig, tensor: int) -> Saved:
        """As in Branch: memory, keys, values and the convolution's input."""
        return Saved((config.engram.d_mem + 3 * config.dim) / tensor)

    @classmethod
    def flops(cls, config: ModelConfig, seq_len: int) -> int:
        """As in Annex: the gate's scores, and the convolution."""
        return 2 * seq_len * config.dim * (1 + config.engram.kernel)

    @classmethod
    def summary(cls, config: ModelConfig) -> str:
        """As in Annex."""
        own, number = config.engram, len(config.engram.layers) * config.engram.num_tables
        rows = sum(each.rows for each in hashes(config).values())
        layers, orders = (", ".join(map(str, each)) for each in (own.layers, own.orders))
        return (
            f"engram before layers {layers}: {number} tables of about {own.table_size:,} rows of {own.row_width} for "
            f"n-grams of {orders} tokens, {rows * own.row_width:,} parameters; a token looks up {number} rows"
        )

    @classmethod
    def record(cls, config: ModelConfig) -> dict[str, Any]:
        """As in Annex: multipliers and primes of each layer's hashes."""
        return {
            str(layer): {"multipliers": list(each.multipliers), "primes": [list(primes) for primes in each.primes]}
            for layer, each in hashes(config).items()
        }

    @classmethod
    def exported(cls, config: ModelConfig) -> dict[str, Any]:
        """As in Annex."""
        own = config.engram
        return {
            "orders": list(own.orders),
            "d_mem": own.d_mem,
            "kernel": own.kernel,
            "sharpen_gate": own.sharpen_gate,
        }

    @classmethod
    def looked_up(cls, config: ModelConfig) -> int:
        """As in Annex."""
        return config.engram.d_mem

    @classmethod
    def lookback(cls, config: ModelConfig) -> int:
        """As in Annex."""
        return config.engram.orders[-1] - 1

    @classmethod
    def halo(cls, config: ModelConfig) -> int:
        """As in Annex."""
        return (config.engram.kernel - 1) * config.engram.orders[-1]

    def indices(self, ids: Tensor, positions: Tensor, pad: int) -> Tensor:
        """As in Annex: [B, T, tables]."""
        return self.hash.indices(ids, positions, pad)

    def memory(self, rows: Tensor) -> Tensor:
        """As in Annex: [B, t, tables, width] -> [B, t, d_mem]."""
        return rows.flatten(-2)

    def forward(self, x: Tensor, memory: Tensor, context: StreamContext) -> tuple[Tensor, ...]:
        """As in Annex: the residual stream, and the gate [B, t]."""
        given: tuple[Tensor, ...] = self.regions.run("annex", self._forward, x, memory, context)
        return given

    def new_cache(self, clock: Clock, dtype: torch.dtype) -> EngramCache:
        """As in Annex."""
        return EngramCache(clock, self.convolution.halo, self.value.out_features, dtype)

    def prefill(self, x: Tensor, memory: Tensor, context: StreamContext, cache: EngramCache) -> Tensor:
        """As in Annex."""
        cache.values.zero_()
        return self.decode(x, memory, context, cache)

    def decode(self, x: Tensor, memory: Tensor, context: StreamContext, cache: EngramCache) -> Tensor:
        """As in Annex."""
        value, _ = self.gated(x, memory)
        section = cache.append(self.convolution.normed(value))
        return x + value + self.convolution.of_section(section, context.positions)

    def gated(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Stream [B, t, dim] and memory [B, t, d_mem] -> gated values [B, t, dim] and the gate [B, t]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        query, key = x.to(wide), self.key(memory).to(wide)
        # The norms scale the sum over dim: one kernel reads query and key, and the backward pass needs no further one.
        score = (query * key * (self.query_norm.gain(wide) * self.key_norm.gain(wide))).sum(dim=-1)
        score = score * inverse_rms(query) * inverse_rms(key) / math.sqrt(x.shape[-1])
        if self.sharpen_gate:
            score = score.sign() * score.abs().clamp(min=_LEAST_GATE).sqrt()
        gate = score.sigmoid()
        return (gate[..., None] * self.value(memory)).to(x.dtype), gate

    def _forward(self, x: Tensor, memory: Tensor, context: StreamContext) -> tuple[Tensor, Tensor]:
        value, gate = self.gated(x, memory)
        return x + value + self.convolution(value, context), gate


def hashes(config: ModelConfig) -> dict[int, NgramHash]:
    """The hash of each layer."""
    # There are at most as many compressed ids as ids, and the pad id is one more.
    return ngram_hashes(config.engram, config.vocab_size)
