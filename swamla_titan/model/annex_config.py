"""What the settings of every annex (model/annex.py) have in common: the layers that it stands on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from swamla_titan.fields import settings


@dataclass(frozen=True)
class AnnexConfig:
    """A section within [model]; `layers` empty: the annex is off. Lists become tuples."""

    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(key, what is wrong) for each value that is of a wrong type or out of range."""
        found = ((name, setting.problem(values[name])) for name, setting in settings(cls).items())
        return [(name, f"{values[name]!r:.100}: {problem}") for name, problem in found if problem]

    @classmethod
    def conflicts(cls, values: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) where values, each within its range, do not fit each other or the model's `model`."""
        layers, number = values["layers"], model["num_layers"]
        if list(layers) != sorted(set(layers)):
            yield "layers", f"{list(layers)}: expected different numbers, the smallest first"
        for layer in layers:
            if layer >= number:
                yield "layers", f"{list(layers)}: there is no layer {layer}: the {number} layers are 0 to {number - 1}"
