"""The shape of a model: everything its mathematics depends on, and nothing else."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from swamla_titan.conditions import One
from swamla_titan.fields import HUGE, field_types, key, value_problem

VOCAB_MULTIPLE = 128  # matrix units want the output head's width to be a multiple of this
FFN_MULTIPLE = 256

# Upper bounds that nobody meets who means it.
MOST_LAYERS = 1024
LONGEST_SEQUENCE = 1 << 24
_WIDEST = 1 << 17
_LEAST_THETA = 1e-6  # below it angles overflow, with positions of a long sequence


# Every kind of block has a key of its layers in a cycle, named KIND_..., and may have a rotary base of its own.
_LAYERS, _THETA = "_layers_per_cycle", "_rope_theta"


def _shares_theta(config: Any) -> bool:
    """Whether blocks of a kind that has a rotary base take the common one."""
    return not all(getattr(config.model, f"{kind}{_THETA}", True) for kind in config.model.block_kinds)


# When keys have an effect, see conditions.py: `config` is the whole configuration, of which this one is `model`.
_CYCLE = ("model.swa_layers_per_cycle", "model.mla_layers_per_cycle", "model.num_layers")
_HAS_SWA = One(_CYCLE[:1], lambda config: "swa" in config.model.block_kinds, f"{_CYCLE[0]} to 1 or more")
_HAS_MLA = One(
    _CYCLE[1:], lambda config: "mla" in config.model.block_kinds, f"{_CYCLE[1]} to 1 or more, within the layers"
)
_ROOM_FOR_MLA = One(
    (_CYCLE[0], _CYCLE[2]),
    lambda config: config.model.mla_layers_per_cycle == 0 or "mla" in config.model.block_kinds,
    f"{_CYCLE[2]} to more than {_CYCLE[0]}",
)
_SHARES_THETA = One(
    ("model.swa_rope_theta", "model.mla_rope_theta"), _shares_theta, "one of the others to 0, which means this one"
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a SWA-MLA language model.

    Raises ValueError that lists every problem when the numbers do not fit together.
    """

    num_layers: int = key(12, "Number of blocks.", minimum=1, maximum=MOST_LAYERS)
    dim: int = key(1024, "Width of the residual stream.", minimum=2, maximum=_WIDEST)
    num_heads: int = key(16, "Query heads, in both kinds of block.", minimum=1, maximum=_WIDEST)
    num_kv_heads: int = key(
        0,
        "Key/value heads of SWA blocks (grouped-query attention); 0: num_heads.",
        minimum=0,
        maximum=_WIDEST,
        needs=_HAS_SWA,
    )
    vocab_size: int = key(50257, "Real token ids; in a TOML file 0 means the tokenizer's.", minimum=0, maximum=1 << 24)
    max_seq_len: int = key(2048, "Longest sequence the model accepts, in tokens.", minimum=1, maximum=LONGEST_SEQUENCE)
    ffn_hidden_dim: int = key(
        0, "Hidden width of SwiGLU; 0: 8/3 of dim rounded up to a multiple of 256.", minimum=0, maximum=1 << 20
    )
    norm: str = key(
        "rmsnorm", "Normalisation before attention, feed-forward and head.", choices=("rmsnorm", "dynamic_tanh")
    )
    tie_embeddings: bool = key(True, "The output head uses the embedding's weight.")
    swa_layers_per_cycle: int = key(
        2, "Sliding-window blocks at the start of each cycle of layers.", minimum=0, maximum=MOST_LAYERS
    )
    mla_layers_per_cycle: int = key(
        1,
        "Latent-attention blocks at the end of each cycle of layers.",
        minimum=0,
        maximum=MOST_LAYERS,
        needs=_ROOM_FOR_MLA,
    )
    swa_window: int = key(
        256, "Keys a query sees in SWA blocks, itself counted.", minimum=1, maximum=LONGEST_SEQUENCE, needs=_HAS_SWA
    )
    swa_sink_size: int = key(
        4,
        "First tokens of the document that every later query of it sees in SWA blocks.",
        minimum=0,
        maximum=LONGEST_SEQUENCE,
        needs=_HAS_SWA,
    )
    qk_norm: bool = key(
        False, "RMSNorm over each query and key head of SWA blocks, before the rotation.", needs=_HAS_SWA
    )
    q_lora_rank: int = key(
        0, "MLA: rank of the query projection; 0: one full matrix.", minimum=0, maximum=_WIDEST, needs=_HAS_MLA
    )
    kv_lora_rank: int = key(
        256, "MLA: width of the latent that keys and values are made from.", minimum=1, maximum=_WIDEST, needs=_HAS_MLA
    )
    qk_nope_head_dim: int = key(
        128, "MLA: width of a head's query/key part without position.", minimum=1, maximum=_WIDEST, needs=_HAS_MLA
    )
    qk_rope_head_dim: int = key(
        64, "MLA: width of the rotary part; its key is shared by all heads.", minimum=2, maximum=_WIDEST, needs=_HAS_MLA
    )
    v_head_dim: int = key(128, "MLA: width of a head's value.", minimum=1, maximum=_WIDEST, needs=_HAS_MLA)
    rope_theta: float = key(
        10000.0,
        "Base of the rotary frequencies, in both kinds of block.",
        minimum=_LEAST_THETA,
        maximum=HUGE,
        needs=_SHARES_THETA,
    )
    swa_rope_theta: float = key(
        0.0, "Base for SWA blocks alone; 0: rope_theta.", minimum=0, maximum=HUGE, needs=_HAS_SWA
    )
    mla_rope_theta: float = key(
        0.0, "Base for MLA blocks alone; 0: rope_theta.", minimum=0, maximum=HUGE, needs=_HAS_MLA
    )
    rope_scaling: float = key(
        1.0, "Linear position scaling: positions are divided by this factor.", minimum=1e-6, maximum=1e6
    )
    dropout: float = key(0.0, "Dropout on the output of attention and feed-forward, in training.", minimum=0, below=1)
    z_loss: float = key(0.0, "Weight of the squared log-partition in the training loss.", minimum=0, maximum=HUGE)
    label_smoothing: float = key(0.0, "Share of the target spread evenly over the vocabulary.", minimum=0, below=1)

    def __post_init__(self) -> None:
        problems = self.problems(dataclasses.asdict(self))
        if problems:
            raise ValueError("; ".join(f"{name}: {text}" for name, text in problems))

    @classmethod
    def problems(cls, values: dict[str, object]) -> list[tuple[str, str]]:
        """(field, what is wrong) for each value that is of a wrong type, out of range or contradicts another."""
        types = field_types(cls)
        found = []
        for field in dataclasses.fields(cls):
            problem = value_problem(field, types[field.name], values[field.name])
            if problem:
                found.append((field.name, f"{_brief(values[field.name])}: {problem}"))
        return found or _contradictions(values)

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
        """Hidden units of SwiGLU whose gates and ups lie together in `gate_up`: at most 128, and 8 groups at least
        where the width allows it, so that up to 8 tensor-parallel ranks can share them."""
        eighth, rest = divmod(self.ffn_width, 8)
        return math.gcd(self.ffn_width if rest else eighth, 128)

    @classmethod
    def kinds(cls) -> list[str]:
        """The kinds of block, in the order of a cycle of layers, which is that of their keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        return [name.removesuffix(_LAYERS) for name in names if name.endswith(_LAYERS)]

    @property
    def block_kinds(self) -> list[str]:
        """Kind of each layer, first to last."""
        cycle = [kind for kind in self.kinds() for _ in range(getattr(self, f"{kind}{_LAYERS}"))]
        return [cycle[i % len(cycle)] for i in range(self.num_layers)]


def _brief(value: object) -> str:
    try:
        return repr(value)[:100]
    except (RecursionError, ValueError):  # nested too deeply, or of too many digits
        return f"a value of type {type(value).__name__}"


def _contradictions(values: dict[str, object]) -> list[tuple[str, str]]:
    number = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    found = [
        (name, f"{number[name]}: expected 0, or a number >= {_LEAST_THETA}")
        for name in number
        if name.endswith(_THETA) and 0 < number[name] < _LEAST_THETA
    ]
    if number["dim"] % number["num_heads"]:
        found.append(("num_heads", f"{number['num_heads']} does not divide dim = {number['dim']}"))
    elif (number["dim"] // number["num_heads"]) % 2:
        found.append(
            ("num_heads", f"dim / num_heads = {number['dim'] // number['num_heads']} must be even to be rotated")
        )
    if number["num_kv_heads"] and number["num_heads"] % number["num_kv_heads"]:
        found.append(("num_kv_heads", f"{number['num_kv_heads']} does not divide num_heads = {number['num_heads']}"))
    if number["qk_rope_head_dim"] % 2:
        found.append(("qk_rope_head_dim", f"{number['qk_rope_head_dim']} must be even to be rotated"))
    layers = [name for name in number if name.endswith(_LAYERS)]
    if not any(number[name] for name in layers):
        found.append((layers[0], "a cycle needs at least one layer of either kind"))
    return found
