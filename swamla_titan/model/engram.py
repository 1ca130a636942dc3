"""Engram: conditional memory by hashed n-gram lookup (arXiv:2601.07372)."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.model.annex import Annex, StreamContext
from swamla_titan.model.branch import Clock, Saved
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.linear import Linear, Role
from swamla_titan.model.ngrams import NgramHash, ngram_hashes
from swamla_titan.model.norms import PerChannel, RMSNorm
from swamla_titan.model.row_table import RowTable

_LEAST_GATE = 1e-6  # of |g| under the root of the sharpened gate


class ShortConvolution(PerChannel):
    """Depthwise causal convolution behind RMSNorm, then SiLU; zero at first.

    y[t] = silu(sum over taps k of w[k] * norm(x)[t - k * dilation]), where a tap before the document's start is zero.
    It is a few shifted multiplications, and no operator of cuDNN: in float32 it is exact whatever the TF32 switch
    says, and compiled it is one kernel. `weight` [kernel * dim] has the newest tap first.
    """

    initial: ClassVar[dict[str, float]] = {"weight": 0.0}

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.norm = RMSNorm(dim)
        self.weight = torch.nn.Parameter(torch.zeros(kernel * dim))

    @property
    def halo(self) -> int:
        """Tokens before a token that its result depends on."""
        return (self.kernel - 1) * self.dilation

    def forward(self, x: Tensor, context: StreamContext) -> Tensor:
        """[B, t, dim] -> [B, t, dim]."""
        done, out = 0, []
        for section in context.with_halos(self.norm(x), self.halo):
            length = section.shape[1] - self.halo
            out.append(self.of_section(section, context.positions[:, done : done + length]))
            done += length
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def of_section(self, section: Tensor, positions: Tensor) -> Tensor:
        """Normed values of a halo and n tokens, [B, halo + n, dim], and the tokens' positions -> [B, n, dim]."""
        wide = torch.promote_types(section.dtype, torch.float32)
        taps = self.sharding.parameter(self.weight).to(wide).view(self.kernel, -1)
        total = section[:, self.halo :].to(wide) * taps[0]
        for k in range(1, self.kernel):
            lag = k * self.dilation
            earlier = section[:, self.halo - lag : section.shape[1] - lag].to(wide)
            total = total + torch.where(positions[..., None] >= lag, earlier, 0.0) * taps[k]
        return F.silu(total).to(section.dtype)


class EngramCache:
    """The convolution's normed inputs of the newest tokens, [B, halo, dim]."""

    def __init__(self, clock: Clock, halo: int, dim: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros(clock.starts.shape[0], halo, dim, dtype=dtype, device=clock.starts.device)

    def append(self, values: Tensor) -> Tensor:
        """Store those of further tokens, [B, n, dim]; returns them behind what was there, [B, halo + n, dim]."""
        section = torch.cat([self.values, values], dim=1)
        self.values.copy_(section[:, values.shape[1] :])
        return section


class Engram(Annex):
    """Rows of hashed n-grams, gated by the stream and mixed by a short convolution.

        e = rows of the token's n-grams, of each table one            [d_mem]
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
        """As in Branch: what was looked up, keys, values, and the convolution's input."""
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

    def look_up(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """As in Annex: [B, t, tables] -> [B, t, d_mem]."""
        rows: Tensor = self.table(indices, dtype)
        return rows.flatten(-2)

    def forward(self, x: Tensor, memory: Tensor, context: StreamContext) -> tuple[Tensor, ...]:
        """As in Annex: the stream, and the gate [B, t]."""
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
        section = cache.append(self.convolution.norm(value))
        return x + value + self.convolution.of_section(section, context.positions)

    def gated(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Stream [B, t, dim] and memory [B, t, d_mem] -> gated values [B, t, dim] and the gate [B, t]."""
        query, key = self.query_norm(x), self.key_norm(self.key(memory))
        wide = torch.promote_types(x.dtype, torch.float32)
        score = (query.to(wide) * key.to(wide)).sum(dim=-1) / math.sqrt(x.shape[-1])
        if self.sharpen_gate:
            score = score.sign() * score.abs().clamp(min=_LEAST_GATE).sqrt()
        gate = score.sigmoid()
        return (gate[..., None] * self.value(memory)).to(x.dtype), gate

    def _forward(self, x: Tensor, memory: Tensor, context: StreamContext) -> tuple[Tensor, Tensor]:
        value, gate = self.gated(x, memory)
        return x + value + self.convolution(value, context), gate


def hashes(config: ModelConfig) -> dict[int, NgramHash]:
    """The hash of each layer."""
    own = config.engram
    # Compressed ids are at most as many as ids, and one more stands for what lies before a document.
    return ngram_hashes(own.layers, own.orders, own.heads, own.table_size, own.seed, config.vocab_size)
