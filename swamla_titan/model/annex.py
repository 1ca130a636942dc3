"""Annexes: residual branches before the blocks of chosen layers, which know the tokens, not only the stream.

    x = x + annex(x, what it looks up for the tokens);  x = block(x)

What an annex looks up depends on tokens alone. So it is looked up for all layers before the first block runs, outside
of what is compiled or recomputed; and its rows can be known earlier still, see ModelAnnexes.prepare. Ranks that share
tables exchange the rows there (parallel/row_tables.py).

An annex is a subclass of Annex in a file of its own and a line of ANNEXES (model/annexes.py), with its settings as a
section of ModelConfig. Initialization, parallel plans, activation checkpointing, compilation, optimizers, FLOPs,
`plan`, metrics, checkpoints and decoding iterate over what it declares.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.model.branch import Branch, Clock, Regions
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.row_table import RowTable


@dataclass(frozen=True)
class StreamContext:
    """What annexes know of the tokens [B, t] of the residual stream on this process; here those of full sequences."""

    positions: Tensor  # [B or 1, t] int64, tokens since the start of the document

    def with_halos(self, x: Tensor, halo: int) -> Iterator[Tensor]:
        """Each section of consecutive tokens of x [B, t, N] with the `halo` tokens before it, [B, halo + n, N].

        Tokens before the sequence are zeros.
        """
        yield F.pad(x, (0, 0, halo, 0))


class StreamLayout:
    """Which tokens of each sequence the residual stream holds on this process: all of them."""

    def local(self, x: Tensor) -> Tensor:
        """The part [B, t, ...] for these tokens of a tensor [B, T, ...] for full sequences."""
        return x

    def context(self, positions: Tensor) -> StreamContext:
        """The context of sequences with tokens at `positions` [B or 1, T]."""
        return StreamContext(positions)


class Annex(Branch, is_abstract=True):
    """A branch before a block, which looks up rows of its `table`. Its constructor takes (config, layer).

    `observed` names the tensors [B, t] that `forward` gives beside the stream; their means are metrics. `regions` may
    be replaced, see branch.Regions; its region is "annex".
    """

    observed: ClassVar[tuple[str, ...]] = ()
    table: RowTable
    regions = Regions()
    _observed: Tensor | None = None  # since `take_observed`: a sum for each name, and the number of tokens

    @torch.no_grad()
    def observe(self, seen: Sequence[Tensor], counted: Tensor | None) -> None:
        """Add what a forward pass `observed` to the sums, for the sequences `counted`, bool [B]; None: for all.

        The host does not wait for the device.
        """
        sums = [each.sum(dim=1, dtype=torch.float64) for each in seen]
        of_sequences = torch.stack([*sums, torch.full_like(sums[0], seen[0].shape[1])])  # [names + 1, B]
        found = (of_sequences if counted is None else of_sequences * counted).sum(dim=1)
        self._observed = found if self._observed is None else self._observed + found

    def take_observed(self) -> dict[str, tuple[float, float]]:
        """The sum over all tokens since the last call, and their number, by name; the host waits for the device.

        Empty without a forward pass.
        """
        found = [] if self._observed is None else self._observed.tolist()
        self._observed = None
        return {name: (total, found[-1]) for name, total in zip(self.observed, found)}

    @classmethod
    @abstractmethod
    def flops(cls, config: ModelConfig, seq_len: int) -> int:
        """Floating-point operations of a sequence's forward pass, without those of linear layers."""

    @classmethod
    @abstractmethod
    def summary(cls, config: ModelConfig) -> str:
        """A line for the log: layers and sizes."""

    @classmethod
    @abstractmethod
    def record(cls, config: ModelConfig) -> dict[str, Any]:
        """What its parameters mean beside the config, such as hashes, as JSON: checkpoints hold it, runs compare it."""

    @classmethod
    def exported(cls, config: ModelConfig) -> dict[str, Any] | None:
        """Its settings for the exported code, as JSON, beside layers and record; None: that code does not have it."""
        return None

    @classmethod
    @abstractmethod
    def looked_up(cls, config: ModelConfig) -> int:
        """Elements of tables that a layer looks up for each token."""

    @classmethod
    @abstractmethod
    def lookback(cls, config: ModelConfig) -> int:
        """How many tokens before a token its `indices` depend on."""

    @classmethod
    @abstractmethod
    def halo(cls, config: ModelConfig) -> int:
        """How many tokens before a token its `forward` depends on."""

    @abstractmethod
    def indices(self, ids: Tensor, positions: Tensor, pad: int) -> Tensor:
        """The rows to look up, int64 [B, T, ...], for compressed ids [B, T] at `positions` [B or 1, T] of documents.

        `pad` is the id before a document's first token.
        """

    @abstractmethod
    def memory(self, rows: Tensor) -> Tensor:
        """The input that `forward` gets of the rows that were looked up, [B, t, ..., width]."""

    @abstractmethod
    def forward(self, x: Tensor, memory: Tensor, context: StreamContext) -> tuple[Tensor, ...]:
        """The stream [B, t, dim] with this branch added, and what is `observed`."""

    @abstractmethod
    def new_cache(self, clock: Clock, dtype: torch.dtype) -> Any:
        """The memory of a layer while decoding as many sequences as the clock has."""

    @abstractmethod
    def prefill(self, x: Tensor, memory: Tensor, context: StreamContext, cache: Any) -> Tensor:
        """`forward` that also fills the cache; gives the stream alone."""

    @abstractmethod
    def decode(self, x: Tensor, memory: Tensor, context: StreamContext, cache: Any) -> Tensor:
        """The next token of each sequence, [B, 1, dim] -> [B, 1, dim]."""
