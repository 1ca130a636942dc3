"""The shape of a model: everything that its mathematics depends on, and nothing else. FLAVORS has shapes by name."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from swamla_titan.conditions import Condition, decided_by, when_on
from swamla_titan.fields import HUGE, Factor, Limits, Rule, Setting, Share, brief, problems, sections, settings
from swamla_titan.model.annex_config import AnnexConfig, EngramConfig

VOCAB_MULTIPLE = 128  # matrix units want the output head's width to be a multiple of this
FFN_MULTIPLE = 256

# Upper bounds beyond any real use.
MOST_LAYERS = 1024
LONGEST_SEQUENCE = 1 << 24
_WIDEST = 1 << 17
_LEAST_THETA = 1e-6  # below it angles overflow, with positions of a long sequence

# Every block kind has a key for its layers in a cycle, named KIND_..., and may have one for a rotary base of its own.
_LAYERS, _THETA = "_layers_per_cycle", "_rope_theta"


def _shares_theta(config: Any) -> bool:
    """Whether a block kind that could have its own rotary base uses rope_theta."""
    return not all(getattr(config.model, f"{kind}{_THETA}", True) for kind in config.model.block_kinds)


# What a key of a block kind measures. The tensor-parallel degree must divide "heads"; "qk_width" and "v_width" are a
# head's widths (several keys: of its parts, side by side; none: dim / num_heads); a query sees the keys in its "window"
# and the first "sink" ones; "selects": attention is selective. The kind's class declares the same for the dispatcher.
Quantity = Literal["heads", "qk_width", "v_width", "latent_width", "window", "sink", "selects"]


@dataclass(frozen=True)
class HasLayers(Condition):
    """The condition of a block kind's keys: the model has layers of this kind."""

    kind: str = ""


def has_layers(kind: str, *others: str) -> HasLayers:
    """The condition of a block kind's keys; `others`: keys that, beside its own, can leave it without layers."""
    keys = f"model.{kind}{_LAYERS}", *others
    remedy = f"{keys[0]} to 1 or more" + (", within the layers" if others else "")
    there = decided_by(keys, lambda config: kind in config.model.block_kinds, remedy)
    return HasLayers(there.missing, kind=kind)


def divides(other: str) -> Rule:
    """The rule that a value, unless it is 0, divides the value of the key `other`."""

    def rule(value: int, values: Mapping[str, Any]) -> str | None:
        return f"{value} does not divide {other} = {values[other]}" if value and values[other] % value else None

    return rule


def _heads_fit(heads: int, values: Mapping[str, Any]) -> str | None:
    width = values["dim"] // heads
    odd = f"dim / num_heads = {width} must be even to be rotated" if width % 2 else None
    return divides("dim")(heads, values) or odd


def _is_head(head: int, values: Mapping[str, Any]) -> str | None:
    heads = values["num_heads"]
    return None if head < heads else f"{head} is none of num_heads = {heads} heads, which are 0 ... {heads - 1}"


def _is_even(value: int, _: Mapping[str, Any]) -> str | None:
    return f"{value} must be even to be rotated" if value % 2 else None


def _is_theta(value: float, _: Mapping[str, Any]) -> str | None:
    return f"{value}: expected 0, or a number >= {_LEAST_THETA}" if 0 < value < _LEAST_THETA else None


# When keys have an effect (conditions.py): `config` is the run's configuration, and `config.model` a ModelConfig.
_CYCLE = ("model.swa_layers_per_cycle", "model.mla_layers_per_cycle", "model.num_layers")
_HAS_SWA, _HAS_MLA = has_layers("swa"), has_layers("mla", "model.num_layers")
_ROOM_FOR_MLA = decided_by(
    (_CYCLE[0], _CYCLE[2]),
    lambda config: config.model.mla_layers_per_cycle == 0 or "mla" in config.model.block_kinds,
    f"{_CYCLE[2]} to more than {_CYCLE[0]}",
)
_SELECTS = when_on("model.mla_selective", "model.mla_selective = true")
_SHARES_THETA = decided_by(
    ("model.swa_rope_theta", "model.mla_rope_theta"), _shares_theta, "one of the others to 0, which means this one"
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a SWA-MLA language model.

    Raises ValueError with all problems if values are of a wrong type, out of range or do not fit together.
    """

    num_layers: Annotated[int, Limits(1, MOST_LAYERS)] = 12
    """Number of blocks."""
    dim: Annotated[int, Limits(2, _WIDEST)] = 1024
    """Width of the residual stream."""
    num_heads: Annotated[int, Limits(1, _WIDEST, rule=_heads_fit, quantity="heads")] = 16
    """Query heads, in both kinds of block."""
    num_kv_heads: Annotated[int, Limits(0, _WIDEST, needs=_HAS_SWA, rule=divides("num_heads"), quantity="heads")] = 0
    """Key/value heads of SWA blocks (grouped-query attention); 0: num_heads."""
    vocab_size: Annotated[int, Limits(0, 1 << 24)] = 50257
    """Real token ids; in a TOML file 0 means the tokenizer's."""
    max_seq_len: Annotated[int, Limits(1, LONGEST_SEQUENCE)] = 2048
    """Longest sequence the model accepts, in tokens."""
    ffn_hidden_dim: Annotated[int, Limits(0, 1 << 20)] = 0
    """Hidden width of SwiGLU; 0: 8/3 of dim rounded up to a multiple of 256."""
    norm: Literal["rmsnorm", "dynamic_tanh"] = "rmsnorm"
    """Normalization before attention, feed-forward and head."""
    tie_embeddings: bool = True
    """The output head uses the embedding's weight."""
    swa_layers_per_cycle: Annotated[int, Limits(0, MOST_LAYERS)] = 2
    """Sliding-window blocks at the start of each cycle of layers."""
    mla_layers_per_cycle: Annotated[int, Limits(0, MOST_LAYERS, needs=_ROOM_FOR_MLA)] = 1
    """Latent-attention blocks at the end of each cycle of layers."""
    swa_window: Annotated[int, Limits(1, LONGEST_SEQUENCE, needs=_HAS_SWA, quantity="window")] = 256
    """Keys a query sees in SWA blocks, itself counted."""
    swa_sink_size: Annotated[int, Limits(0, LONGEST_SEQUENCE, needs=_HAS_SWA, quantity="sink")] = 4
    """First tokens of the document that every later query of it sees in SWA blocks."""
    qk_norm: Annotated[bool, Limits(needs=_HAS_SWA)] = False
    """RMSNorm over each query and key head of SWA blocks, before the rotation."""
    q_lora_rank: Annotated[int, Limits(0, _WIDEST, needs=_HAS_MLA, quantity="latent_width")] = 0
    """MLA: rank of the query projection; 0: one full matrix."""
    kv_lora_rank: Annotated[int, Limits(1, _WIDEST, needs=_HAS_MLA, quantity="latent_width")] = 256
    """MLA: width of the latent that keys and values are made from."""
    qk_nope_head_dim: Annotated[int, Limits(1, _WIDEST, needs=_HAS_MLA, quantity="qk_width")] = 128
    """MLA: width of a head's query/key part without position."""
    qk_rope_head_dim: Annotated[int, Limits(2, _WIDEST, needs=_HAS_MLA, rule=_is_even, quantity="qk_width")] = 64
    """MLA: width of the rotary part; its key is shared by all heads."""
    v_head_dim: Annotated[int, Limits(1, _WIDEST, needs=_HAS_MLA, quantity="v_width")] = 128
    """MLA: width of a head's value."""
    mla_selective: Annotated[bool, Limits(needs=_HAS_MLA, quantity="selects")] = False
    """MLA: selective attention. What one head looks at is masked for all heads of later queries."""
    selection_head: Annotated[int, Limits(0, _WIDEST, needs=_SELECTS, rule=_is_head)] = 0
    """MLA: the head, counted from 0, that selects for mla_selective."""
    rope_theta: Annotated[float, Limits(_LEAST_THETA, HUGE, needs=_SHARES_THETA)] = 10000.0
    """Base of the rotary frequencies, in both kinds of block."""
    swa_rope_theta: Annotated[float, Limits(0, HUGE, needs=_HAS_SWA, rule=_is_theta)] = 0.0
    """Base for SWA blocks alone; 0: rope_theta."""
    mla_rope_theta: Annotated[float, Limits(0, HUGE, needs=_HAS_MLA, rule=_is_theta)] = 0.0
    """Base for MLA blocks alone; 0: rope_theta."""
    rope_scaling: Annotated[float, Limits(1e-6, 1e6)] = 1.0
    """Linear position scaling: positions are divided by this factor."""
    dropout: Share = 0.0
    """Dropout on the output of attention and feed-forward, in training."""
    z_loss: Factor = 0.0
    """Weight of the squared log-partition in the training loss."""
    label_smoothing: Share = 0.0
    """Share of the target spread evenly over the vocabulary."""
    engram: EngramConfig = dataclasses.field(default=EngramConfig())

    def __post_init__(self) -> None:
        for name, kind in sections(type(self)).items():
            if isinstance(given := getattr(self, name), Mapping):
                object.__setattr__(self, name, kind(**given))
            elif not isinstance(given, kind):
                raise ValueError(f"{name}: {brief(given)}: expected {kind.__name__} or a dict of its fields")
        if found := self.problems(dataclasses.asdict(self)):
            raise ValueError("; ".join(f"{name}: {text}" for name, text in found))

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[tuple[str, str]]:
        """(field, what is wrong) for each value that is of a wrong type, out of range or does not fit another.

        The value of a section is a dict; its fields are named section.field.
        """
        annexes, found = cls.annex_configs().items(), problems(cls, values)
        for name, kind in annexes:
            found += [(f"{name}.{key}", problem) for key, problem in problems(kind, values[name])]
        if found:
            return found
        found += _conflicts(settings(cls), values)
        for name, kind in annexes:
            found += [(f"{name}.{key}", problem) for key, problem in kind.conflicts(values[name], values)]
        return found

    @classmethod
    def annex_configs(cls) -> dict[str, type[AnnexConfig]]:
        """The class of each annex's settings, by the annex's name, which is that of the field."""
        return {name: kind for name, kind in sections(cls).items() if issubclass(kind, AnnexConfig)}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: vocab_size rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        """Width of a SWA head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of SWA blocks."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of SwiGLU."""
        return self.ffn_hidden_dim or -(-8 * self.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE

    @property
    def ffn_group(self) -> int:
        """Hidden units of SwiGLU in a group of `gate_up`, gates before up projections: at most 128, at least 8 groups
        where the width allows it, so that up to 8 tensor-parallel ranks can share them."""
        eighth, rest = divmod(self.ffn_width, 8)
        return math.gcd(self.ffn_width if rest else eighth, 128)

    @classmethod
    def kinds(cls) -> list[str]:
        """The kinds of block, in the order of a cycle of layers, which is that of their keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        return [name.removesuffix(_LAYERS) for name in names if name.endswith(_LAYERS)]

    def quantities(self, quantity: Quantity, kind: str | None = None) -> dict[str, int]:
        """The values, by key, of the keys that are such a quantity, of all block kinds or of `kind`."""
        return {
            name: getattr(self, name)
            for name, setting in settings(type(self)).items()
            if setting.quantity == quantity and (kind is None or getattr(setting.needs, "kind", None) == kind)
        }

    @property
    def block_kinds(self) -> list[str]:
        """Kind of each layer, first to last."""
        cycle = [kind for kind in self.kinds() for _ in range(getattr(self, f"{kind}{_LAYERS}"))]
        return [cycle[i % len(cycle)] for i in range(self.num_layers)]


def _conflicts(fields: Mapping[str, Setting], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for values that are each in range but do not fit together."""
    for name, field in fields.items():
        if field.rule and (problem := field.rule(values[name], values)):
            yield name, problem
    layers = [name for name in fields if name.endswith(_LAYERS)]
    if not any(values[name] for name in layers):
        yield layers[0], "a cycle needs at least one layer of either kind"


# `small`, `base`, `large` and `xl` are given shapes. The names that are numbers say the size, embeddings included,
# within 3%: shaped for speed (heads of 128, widths divisible by 256, as wide as a sensible depth allows).
_400M = ModelConfig(num_layers=12, dim=1536, num_heads=12)

FLAVORS: dict[str, ModelConfig] = {
    # For a CPU: every part of the mathematics, small; a window and a sink that matter at 512 tokens.
    "debug": ModelConfig(
        num_layers=6,
        dim=128,
        num_heads=4,
        vocab_size=257,
        max_seq_len=512,
        swa_window=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "small": ModelConfig(num_layers=12, dim=1024, num_heads=16),
    "base": ModelConfig(num_layers=24, dim=1536, num_heads=16),
    "large": ModelConfig(num_layers=28, dim=2048, num_heads=16),
    "xl": ModelConfig(num_layers=32, dim=4096, num_heads=32),
    "150m": ModelConfig(num_layers=12, dim=768, num_heads=6, ffn_hidden_dim=3072),
    "400m": _400M,
    "medium": _400M,
    "800m": ModelConfig(num_layers=15, dim=2048, num_heads=16, ffn_hidden_dim=5120),
    "2b": ModelConfig(num_layers=24, dim=2560, num_heads=20),
}
