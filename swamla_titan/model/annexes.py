"""The registry of annexes, and the annexes of a model: what they look up for its tokens, and where they run."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from swamla_titan.kernels.attention.masks import document_starts
from swamla_titan.kernels.cross_entropy import IGNORE
from swamla_titan.model.annex import Annex, StreamContext, StreamLayout
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.engram import Engram
from swamla_titan.model.row_table import LocalRows, RowRequest, RowTable, look_up, request_rows


def registered(annexes: dict[str, type[Annex]]) -> dict[str, type[Annex]]:
    """`annexes`; raises TypeError unless exactly these have a section of settings in ModelConfig."""
    if set(annexes) != set(ModelConfig.annex_configs()):
        known = list(ModelConfig.annex_configs())
        raise TypeError(f"each of {list(annexes)} needs a field of ModelConfig that is an AnnexConfig, as {known} have")
    return annexes


ANNEXES = registered({"engram": Engram})


def annexes_of(config: ModelConfig, layer: int | None = None) -> dict[str, type[Annex]]:
    """The annexes before a layer (None: before any), in their order there."""
    layers = {name: getattr(config, name).layers for name in ANNEXES}
    return {name: annex for name, annex in ANNEXES.items() if layers[name] and layer in (None, *layers[name])}


class CompressedIds:
    """The ids that stand for tokens in n-grams: `ids` [vocabulary] int64, and `pad` for positions before a document.

    The tensor is copied to a device once.
    """

    def __init__(self, ids: Tensor, pad: int) -> None:
        self.pad = pad
        self._ids_on = functools.cache(ids.to)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T] int64."""
        return self._ids_on(tokens.device)[tokens]


@dataclass(frozen=True)
class PreparedLookUp:
    """Which rows the annexes look up for `tokens` [B, T], and their context; made by ModelAnnexes.prepare."""

    tokens: Tensor
    document_ids: Tensor | None
    versions: tuple[int | None, ...]
    request: RowRequest
    context: StreamContext

    def require(self, tokens: Tensor, document_ids: Tensor | None) -> None:
        """Raise ValueError unless it was prepared for these very tensors, and they were not written to since.

        Their values are not compared, because they may not be computed yet.
        """
        same = _is_same(self.tokens, tokens) and _is_same(self.document_ids, document_ids)
        if not same or self.versions != _versions(tokens, document_ids):
            raise ValueError(
                "a look-up was prepared for other tokens than this forward pass is given: give it the tensors of which "
                "it was prepared"
            )


class _Joined(torch.autograd.Function):
    """Passes the stream and what was looked up through one node of the graph, unchanged.

    Where a pipeline splits its backward pass, torch computes the gradients of a weight from the first nodes behind it
    that the stage's input reaches too. So those behind what was looked up must be the linear layers: if keys met the
    stream first in the gate, values would meet it behind the gate, and the gate would be computed backward twice.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """The number of writes to each tensor, which its views share; None where torch does not count them."""
    return tuple(None if each is None or each.is_inference() else each._version for each in tensors)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


class Memories(NamedTuple):
    """What was looked up for the tokens of a forward pass, by layer and annex, and the annexes' context.

    `counted`: which sequences metrics count, bool [B]; None: all.
    """

    rows: dict[tuple[str, str], Tensor]
    context: StreamContext
    counted: Tensor | None = None


class ModelAnnexes(nn.ModuleDict):
    """The annexes of a model, by layer number and name.

    Every token has an id of its own until `use` is called. `layout` may be replaced: which tokens of the residual
    stream this process holds.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            {
                str(layer): nn.ModuleDict({name: annex(config, layer) for name, annex in found.items()})
                for layer in range(config.num_layers)
                if (found := annexes_of(config, layer))
            }
        )
        self._rows = config.padded_vocab_size
        self.use(np.arange(config.vocab_size), config.vocab_size)
        self.layout = StreamLayout()

    def use(self, ids: np.ndarray, size: int) -> None:
        """Look up by a compressed vocabulary (data/tokenizer.py): the id of each token, below `size`.

        `size` is the pad id, which only tokens of the padded vocabulary have.
        """
        padded = torch.full((self._rows,), size, device="cpu")
        padded[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        self.compressed_ids = CompressedIds(padded, size)

    def each(self) -> Iterator[tuple[tuple[str, str], Annex]]:
        """(layer, name) and the annex, in the order of the forward pass."""
        for layer in self:
            for name, annex in self._of_layer(layer):
                yield (layer, name), annex

    @property
    def tables(self) -> list[RowTable]:
        """The table of each annex."""
        return [annex.table for _, annex in self.each()]

    @property
    def placement(self) -> LocalRows:
        """Where the rows of all tables are."""
        return self.tables[0].placement if len(self) else LocalRows()

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> PreparedLookUp | None:
        """Which rows the annexes look up for this process' tokens, of full sequences [B, T]; None without annexes.

        It reads no row, so it may precede the optimizer step before its forward pass. Where ranks share tables, all of
        them call this equally often, and in the same order.
        """
        if not len(self):
            return None
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if document_ids is not None:
            positions = positions - document_starts(document_ids)
        return PreparedLookUp(
            tokens, document_ids, _versions(tokens, document_ids), *self._request(tokens, positions, 0)
        )

    def look_up(
        self,
        tokens: Tensor,
        document_ids: Tensor | None,
        dtype: torch.dtype,
        targets: Tensor | None = None,
        prepared: PreparedLookUp | None = None,
    ) -> Memories | None:
        """What the annexes look up for this process' tokens, of full sequences [B, T]; None if there are no annexes.

        Metrics do not count sequences that only fill up a micro-batch, which have none of the `targets` [B, T].
        Raises ValueError if `prepared` was made for other tokens; None: it is prepared now.
        """
        prepared = prepared or self.prepare(tokens, document_ids)
        if prepared is None:
            return None
        prepared.require(tokens, document_ids)
        counted = None if targets is None else (targets != IGNORE).any(dim=1)
        return self._memories(prepared.request, prepared.context, dtype)._replace(counted=counted)

    def look_up_next(self, tokens: Tensor, cache: DecodeCache, dtype: torch.dtype) -> Memories | None:
        """What they look up for the next token of each sequence [B, 1] while decoding; the cache stores the token."""
        if not len(self):
            return None
        newest, positions = cache.remember(tokens)
        return self._memories(*self._request(newest, positions, newest.shape[1] - 1), dtype)

    def _request(self, tokens: Tensor, positions: Tensor, first: int) -> tuple[RowRequest, StreamContext]:
        """The look-up for the tokens from index `first` on, and their context."""
        ids, pad, local = self.compressed_ids(tokens), self.compressed_ids.pad, self.layout.local
        indices = [local(annex.indices(ids, positions, pad)[:, first:]) for _, annex in self.each()]
        return request_rows(self.tables, indices), self.layout.context(positions[:, first:])

    def _memories(self, request: RowRequest, context: StreamContext, dtype: torch.dtype) -> Memories:
        found = look_up(self.tables, request, dtype)
        return Memories({key: annex.memory(rows) for (key, annex), rows in zip(self.each(), found)}, context)

    def before(self, layer: str, x: Tensor, memories: Memories | None) -> Tensor:
        """The residual stream [B, t, dim] with the layer's annexes added, which is the input of its block."""
        if layer not in self:
            return x
        assert memories is not None
        for name, annex in self._of_layer(layer):
            x, rows = _Joined.apply(x, memories.rows[layer, name])
            x, *seen = annex(x, rows, memories.context)
            if self.training and seen:
                annex.observe(seen, memories.counted)
        return x

    def prefill(self, layer: str, x: Tensor, memories: Memories | None, cache: DecodeCache) -> Tensor:
        """`before` that also fills the cache."""
        return self._cached("prefill", layer, x, memories, cache)

    def decode(self, layer: str, x: Tensor, memories: Memories | None, cache: DecodeCache) -> Tensor:
        """`before` for the next token of each sequence, [B, 1, dim] -> [B, 1, dim]."""
        return self._cached("decode", layer, x, memories, cache)

    def _cached(self, way: str, layer: str, x: Tensor, memories: Memories | None, cache: DecodeCache) -> Tensor:
        if layer not in self:
            return x
        assert memories is not None
        for name, annex in self._of_layer(layer):
            key = layer, name
            x = x.to(cache.devices[0])
            x = getattr(annex, way)(x, memories.rows[key], memories.context, cache.annex_caches[key])
        return x

    def _of_layer(self, layer: str) -> Iterator[tuple[str, Annex]]:
        of_layer = self[layer]
        assert isinstance(of_layer, nn.ModuleDict)
        for name, annex in of_layer.items():
            assert isinstance(annex, Annex)
            yield name, annex
