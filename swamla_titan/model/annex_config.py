"""The settings of annexes (model/annex.py): what all have in common, and those of Engram (model/engram.py)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from swamla_titan.fields import Limits


@dataclass(frozen=True)
class AnnexConfig:
    """The settings of an annex, a section within [model]; `layers` empty: it is off. Lists become tuples."""

    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    @classmethod
    def conflicts(cls, values: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) where values, each in range, do not fit each other or those of `model`."""
        layers, number = values["layers"], model["num_layers"]
        if list(layers) != sorted(set(layers)):
            yield "layers", f"{list(layers)}: expected different numbers, the smallest first"
        for layer in layers:
            if layer >= number:
                yield "layers", f"{list(layers)}: there is no layer {layer}: the {number} layers are 0 to {number - 1}"


@dataclass(frozen=True)
class EngramConfig(AnnexConfig):
    """The layers with an Engram, and its sizes.

    A layer has a table of about `table_size` rows for each of `orders` and each of `heads`.
    """

    layers: Annotated[tuple[int, ...], Limits(0, 1023)] = ()
    """Layers, counted from 0 and of either kind, before whose attention an Engram stands; none: no Engram."""
    orders: Annotated[tuple[int, ...], Limits(2, 4)] = (2, 3)
    """Lengths of the n-grams that are looked up, in tokens."""
    heads: Annotated[int, Limits(1, 64)] = 4
    """Tables of each order; they differ in their hash."""
    d_mem: Annotated[int, Limits(1, 1 << 17)] = 512
    """Width of what a token looks up: of one row of each table, one after another."""
    table_size: Annotated[int, Limits(2, 1 << 32)] = 100_000
    """Rows of a table; each has as many as a prime of its own, from this on."""
    kernel: Annotated[int, Limits(1, 64)] = 4
    """Taps of the causal convolution; their distance is the largest order."""
    sharpen_gate: bool = False
    """Gate by sigmoid(sign(g) sqrt(|g|)), as the authors' demo does, instead of the paper's sigmoid(g)."""
    seed: Annotated[int, Limits(0, 2**62)] = 0
    """Seed of the hashes."""

    presets: ClassVar[dict[str, Any]]  # EngramConfigs by name

    @property
    def num_tables(self) -> int:
        """Tables of a layer."""
        return len(self.orders) * self.heads

    @property
    def row_width(self) -> int:
        """Elements of a row."""
        return self.d_mem // self.num_tables

    @classmethod
    def conflicts(cls, values: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """As in AnnexConfig."""
        yield from super().conflicts(values, model)
        if not values["layers"]:
            return
        orders, heads, d_mem = values["orders"], values["heads"], values["d_mem"]
        if not orders or list(orders) != sorted(set(orders)):
            yield "orders", f"{list(orders)}: expected one or more different numbers, the smallest first"
            return
        tables = heads * len(orders)
        if d_mem % tables:
            below, above = d_mem // tables * tables, -(-d_mem // tables) * tables
            yield (
                "d_mem",
                f"{d_mem} cannot be divided among heads x orders = {heads} x {len(orders)} = {tables} tables: use "
                + (f"{below} or {above}" if below else f"{above}"),
            )


# The public models' layouts are as published. Of the second the width of a row was not published: with 256, the
# other's, its tables have the published number of parameters.
EngramConfig.presets = {
    "design": EngramConfig(layers=(2, 6)),
    "deepseek-v4.1-flash": EngramConfig((1, 14), orders=(2, 3, 4), heads=8, d_mem=24 * 256, table_size=16_000_000),
    "qwen3.8-flash-next": EngramConfig((2,), orders=(2, 3), heads=8, d_mem=16 * 256, table_size=12_450_000),
}
