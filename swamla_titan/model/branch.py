"""The residual branches of a block: their context, their parts, and what they declare for the rest of the program.

Initialization, tensor parallelism, activation checkpointing, float8, Muon, FLOPs, `plan`, pipeline balance and `check`
iterate over these declarations and over the roles of linear layers (model/layers.py). So a new kind of block is a
subclass of Mixer in a file of its own and a line of BLOCKS (model/blocks.py).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from swamla_titan.kernels.attention.dispatch import FusedImplementation, Heads, Implementation, Projections, Request
from swamla_titan.kernels.attention.masks import Mask, MaskSpec, Selection, SelectionRule, causal_pairs, window_pairs
from swamla_titan.kernels.attention.selective import saved_sums
from swamla_titan.kernels.decode import Stream
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.layers import Rotary, Rotation, rotation, spec_of

KeyExchange = Literal["halo", "gather"]
Step = Callable[[Stream], Stream]  # of decoding


@dataclass(frozen=True)
class TokenContext:
    """What the blocks of one kind are given beside the residual stream."""

    positions: Tensor  # [B or 1, T] int64, tokens since the start of the document


@dataclass(frozen=True)
class AttentionContext(TokenContext):
    """The context of a kind with attention; `mask` has the form that `implementation` takes."""

    rotation: Rotation
    mask: Mask
    implementation: Implementation

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, selection: Selection | None = None
    ) -> Tensor:
        """softmax(scale * query key^T + mask) value: [B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E].

        `selection`: the mask where the context's one is a SelectionRule.
        """
        mask = self.mask if selection is None else selection
        return self.implementation.call(query, key, value, mask, scale)


@dataclass(frozen=True)
class SequenceContext:
    """The context of each block kind of a model; not a dict, because hooks would flatten that."""

    by_kind: Mapping[str, TokenContext]

    def __getitem__(self, kind: str) -> TokenContext:
        return self.by_kind[kind]


class Saved(NamedTuple):
    """Elements per token that a branch saves for its backward pass, without the residual stream and the normed one."""

    local: float  # for each token of this rank
    sequence: float = 0.0  # for each token of the sequence, also where the ranks of context parallelism shard that
    saves_result: bool = False  # an operator such as attention saves the input of the residual output itself


class Gathered(NamedTuple):
    """What a rank of context parallelism gives to the others of each layer, in elements of a sequence."""

    local: int  # for each token of its chunks
    sums: int = 0  # for each of its chunks and each token of the sequence, in float32 at least


@dataclass
class Clock:
    """Where in time the sequences of a batch are; one object, shared by the caches of all layers.

    Both are written in place: a CUDA graph of a step reads them where they are.
    """

    starts: Tensor  # [B] int64, index of each sequence's first real token
    length: Tensor  # [1] int64, tokens stored for each sequence, padding included: the index of the next one


class AttentionCache(Protocol):
    """What a layer of attention remembers while decoding: memory of a fixed size for a batch, allocated once."""

    def next_mask(self) -> Tensor:
        """Which slots the next token of each sequence sees, boolean [B, 1, 1, slots]."""


class Regions:
    """Runs the regions of a block's forward pass, each by its name.

    "block" is all of it, "attention" and "feed_forward" are the residual branches, "residual" is the sum between them.
    Activation checkpointing gives blocks an object that recomputes some regions in the backward pass.
    """

    def run(self, name: str, forward: Callable[..., Any], *inputs: Any) -> Any:
        """forward(*inputs)."""
        return forward(*inputs)


class Branch(nn.Module):
    """What a block adds to the residual stream [B, T, dim], computed from the normed stream.

    Defining a subclass that leaves a declaration out raises TypeError.

    `linear_input`: only its linear layers read its input, which may then be a float8 operand instead of a tensor.
    """

    linear_input: ClassVar[bool] = False

    def __init_subclass__(cls, is_abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        missing = [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
        if missing and not is_abstract:
            raise TypeError(f"{cls.__name__} must define {', '.join(missing)}: see {__name__}")

    @classmethod
    @abstractmethod
    def saved(cls, config: ModelConfig, tensor: int) -> Saved:
        """What each of `tensor` tensor-parallel ranks saves when the branch is compiled."""

    @classmethod
    def saved_by_kernels(
        cls, config: ModelConfig, batch: int, seq_len: int, chunk: int | None, dtype: torch.dtype
    ) -> int:
        """Bytes for each token of the sequence that its kernels save beside their inputs and result.

        Of a micro-batch of `batch` sequences; `chunk` is as in Request. They are in memory wherever the result is.
        """
        return 0

    def input_readers(self) -> dict[str, nn.Linear]:
        """The linear layers that read the branch's input, by their names in it; none if something else reads it too.

        To these the norm before may give float8.
        """
        if not self.linear_input:
            return {}
        linears = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return {name: each for name, each in linears.items() if spec_of(name, each).role.reads_residual_stream}


class Mixer(Branch, is_abstract=True):
    """The branch that mixes tokens; its subclasses make the kinds of block.

    `forward(x, context)`: [B, T, dim] -> [B, T, dim], with the context of its kind.
    """

    @classmethod
    @abstractmethod
    def pairs(cls, config: ModelConfig, seq_len: int) -> int:
        """Pairs of a query and a key that it sees, in a document of `seq_len` tokens; those of documents add up."""

    @classmethod
    @abstractmethod
    def flops(cls, config: ModelConfig, pairs: int) -> int:
        """Floating-point operations of a forward pass, without those of linear layers."""

    @classmethod
    @abstractmethod
    def new_cache(cls, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> Any:
        """The memory of a layer for as many sequences as the clock has, of up to `max_tokens` tokens.

        Its tensors are written in place, because a CUDA graph of a step reads them where they are.
        """

    @abstractmethod
    def prefill(self, x: Tensor, context: Any, cache: Any) -> Tensor:
        """`forward` that also fills the cache of its kind."""

    @abstractmethod
    def decode(self, x: Tensor, context: Any, cache: Any) -> Tensor:
        """The next token of each sequence, [B, 1, dim] -> [B, 1, dim]."""

    def fused_decode(self, norm: Any, cache: Any, rotation: Rotation) -> Step | None:
        """What adds `decode` of the normed stream to the stream by kernels (kernels/decode.py); None: there are none.

        `norm` is an RMSNorm, linear layers are plain, and `rotation` is that of every position.
        """
        return None


class InnerAttention(nn.Module):
    """softmax(scale * query key^T + mask) value, by the context's implementation.

    Under context parallelism a subclass takes its place, and gets queries, keys and values of this rank's slice.
    """

    def gather(self, latent: Tensor, rope_key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Latents [B, T, R] and rotated keys [B, T, 1, rope] of every token of the sequences, from those of the slice.

        They are gathered before they are expanded to keys and values. Here the slice is the sequence.
        """
        return latent, rope_key

    def sums_before(self, sums: Callable[[], Tensor], context: AttentionContext) -> Tensor | None:
        """The sums [B, chunks, S] over the queries before each chunk of the slice; `sums()` are those over its own.

        Here the slice is the sequence, and None stands for zeros.
        """
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """[B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E]; `selection` is by these queries."""
        return context.attend(query, key, value, scale, selection)


class SelectingHead(nn.Module):
    """The head that selects in selective attention; a submodule that tensor parallelism replaces."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head

    def forward(self, query: Tensor, key: Tensor, rule: SelectionRule) -> Selection:
        """[B, T, H, D] and [B, S, H, D] -> what the rule selects."""
        return Selection(rule, self.head)


class FusedAttention(nn.Module):
    """Everything between the linear layers, rotation included, as one operator."""

    def __init__(self, implementation: FusedImplementation) -> None:
        super().__init__()
        self.implementation = implementation

    def serves(self, context: AttentionContext) -> bool:
        """Whether it replaces the separate steps under this context."""
        return context.implementation.name in self.implementation.over

    def forward(self, context: AttentionContext, scale: float, *projections: Tensor) -> Tensor:
        """Outputs of linear layers, as FusedImplementation.call takes them -> [B, T, H, E]."""
        cos, sin = context.rotation
        return self.implementation.call(*projections, cos=cos, sin=sin, mask=context.mask, scale=scale)


class Attention(Mixer, is_abstract=True):
    """Softmax attention: what kernels/attention/dispatch.py can compute.

    Three submodules may be replaced: `inner_attention`; `fused_attention`, which computes the rotation as well where it
    `serves`; and `selecting_head`, which is None unless attention is selective.

    `key_exchange`: how the ranks of context parallelism get each other's keys (parallel/context.py). "halo":
    `inner_attention` gets keys and values of a rank's own tokens, and exchanges those that windows and sinks reach.
    "gather": the forward pass calls `inner_attention.gather` for what keys and values are made of, as `gathered` has
    it. None: the kind does not support context parallelism.
    """

    key_exchange: ClassVar[KeyExchange | None] = None
    wo: nn.Linear  # heads -> residual stream

    def __init__(self) -> None:
        super().__init__()
        self.inner_attention = InnerAttention()
        self.fused_attention: FusedAttention | None = None
        self.selecting_head: SelectingHead | None = None

    @classmethod
    @abstractmethod
    def mask(cls, config: ModelConfig) -> MaskSpec:
        """Which keys a query sees."""

    @classmethod
    @abstractmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        """The rotation of queries and keys; its width is 0 if attention does not depend on positions."""

    @classmethod
    @abstractmethod
    def heads(cls, config: ModelConfig) -> Heads:
        """The heads that attention computes with."""

    @classmethod
    def selection_head(cls, config: ModelConfig) -> int | None:
        """The head that selects; None: attention is not selective."""
        return None

    @classmethod
    def gathered(cls, config: ModelConfig) -> Gathered:
        """What "gather" exchanges."""
        raise NotImplementedError(f"{cls.__name__} declares no elements to gather: see {__name__}")

    @classmethod
    def saved_by_kernels(
        cls, config: ModelConfig, batch: int, seq_len: int, chunk: int | None, dtype: torch.dtype
    ) -> int:
        """As in Branch: sums of what is selected, which our kernels of 16 bits save."""
        if cls.selection_head(config) is None or dtype.itemsize > 2:
            return 0
        lengths = [seq_len] if chunk is None else [chunk, chunk]
        return sum(saved_sums(batch, seq_len, length) for length in lengths) * torch.float32.itemsize

    @classmethod
    def projections(cls, config: ModelConfig) -> Projections | None:
        """What a fused implementation would take; None: there is none for this kind."""
        return None

    @classmethod
    @abstractmethod
    def new_cache(cls, config: ModelConfig, clock: Clock, max_tokens: int, dtype: torch.dtype) -> AttentionCache:
        """As in Mixer."""

    @classmethod
    def pairs(cls, config: ModelConfig, seq_len: int) -> int:
        """As in Mixer."""
        mask = cls.mask(config)
        return causal_pairs(seq_len) if mask.window is None else window_pairs(seq_len, mask.window, mask.sink)

    @classmethod
    def flops(cls, config: ModelConfig, pairs: int) -> int:
        """As in Mixer: scores, and the weighted mean of the values."""
        heads = cls.heads(config)
        return 2 * heads.queries * pairs * (heads.qk_width + heads.v_width)

    def _output(self, attended: Tensor) -> Tensor:
        """[B, T, H, E] -> [B, T, dim]."""
        out: Tensor = self.wo(attended.flatten(2))
        return out

    @classmethod
    def rotation(cls, config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of queries and keys at `positions` [B or 1, T], in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return rotation(positions, *cls.rotary(config), config.rope_scaling, wide)

    @classmethod
    def request(
        cls,
        config: ModelConfig,
        seq_len: int,
        has_documents: bool,
        device: torch.device,
        dtype: torch.dtype,
        chunk: int | None = None,
        projections: Projections | None = None,
    ) -> Request:
        """What is asked of the kernels over sequences of `seq_len` tokens; the fields of Request."""
        heads, mask, selects = cls.heads(config), cls.mask(config), cls.selection_head(config) is not None
        return Request(device, dtype, heads, mask, seq_len, has_documents, projections, selects, chunk)
