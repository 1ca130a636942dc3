"""The choice between the implementations of softmax attention, and why each other one was not taken.

Each is one entry, a subclass of Implementation; those that rotate queries and keys too, of FusedImplementation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from swamla_titan.kernels.attention.causal import chunked_causal_attention, why_not_cudnn, why_not_cudnn_heads
from swamla_titan.kernels.attention.document import TIMED_WIDTHS, document_attention, why_not_document_kernel
from swamla_titan.kernels.attention.hopper import LAST, hopper_attention, longest_sequence, why_not_hopper_kernel
from swamla_titan.kernels.attention.hopper import TIMED_WIDTHS as HOPPER_TIMED_WIDTHS
from swamla_titan.kernels.attention.hopper_window import why_not_hopper_window
from swamla_titan.kernels.attention.latent import latent_attention
from swamla_titan.kernels.attention.latent_hopper import latent_hopper_attention
from swamla_titan.kernels.attention.masks import (
    Chunks,
    DocumentRule,
    Mask,
    MaskForm,
    MaskSpec,
    Selection,
    SelectionRule,
    WindowRule,
)
from swamla_titan.kernels.attention.rotary_window import rotary_window_attention
from swamla_titan.kernels.attention.selective import (
    reference_selected_sums,
    reference_selective_attention,
    selected_sums,
    selective_attention,
)
from swamla_titan.kernels.attention.window import why_not_window_kernel, window_attention
from swamla_titan.kernels.device import Limit, dtype_name, is_tuned_for
from swamla_titan.kernels.limits import AttentionBackend

ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)

# cuDNN first: on an H100 it takes queries and keys of 192 beside values of 128, 3.5 times as fast as flex.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CHUNK_KERNEL = "cudnn"  # a name in KERNELS, causal.py
_ALIGNED = 8  # elements of 16 bits: cuDNN reads values where they lie, behind the heads' part of the keys
_NO_LIMIT = 2**31


class Heads(NamedTuple):
    """Numbers of query heads and of key/value heads, and the widths of queries and keys, and of values."""

    queries: int
    keys: int
    qk_width: int
    v_width: int


Layout = Literal["qkv", "latent"]


class Projections(NamedTuple):
    """What the linear layers before attention give, for implementations that rotate queries and keys too.

    `layout`: "qkv", queries, keys and values by groups of heads; "latent", queries, the latent's expansion and the
    rotary key. `rotary_width`: how much of a head is rotated. `why_apart`: the configuration's section or key because
    of which the rotation stays apart from attention, whatever implements it; None: nothing keeps it apart.
    """

    layout: Layout
    rotary_width: int
    why_apart: str | None = None


def fact(refusal: str, default: object = None) -> Any:
    """A field of Request; one that is not the default is refused, in these words, by entries that do not know it."""
    return field(default=default, metadata={"refusal": refusal})


@dataclass(frozen=True)
class Request:
    """What a kind of block asks of attention: everything that the choice depends on.

    `projections` None: implementations with the rotation are not asked for. `selects`: a head masks keys for all heads
    (selective.py). `chunk`: under context parallelism a device has two chunks of each sequence of this length; None:
    full sequences.

    To add what a request may say: a `fact` here, which Attention.request (model/branch.py) fills in, and its name
    in `knows` of the entries that take it.
    """

    device: torch.device
    dtype: torch.dtype
    heads: Heads
    mask: MaskSpec
    seq_len: int
    has_documents: bool
    projections: Projections | None = None
    selects: bool = fact("model.mla_selective", default=False)
    chunk: int | None = fact("parallel.context")

    @cached_property
    def facts(self) -> dict[str, str]:
        """The names of facts that are not the default, with the words of their refusal."""
        found = [
            each for each in fields(self) if "refusal" in each.metadata and getattr(self, each.name) != each.default
        ]
        return {each.name: each.metadata["refusal"] for each in found}

    @property
    def is_plainly_causal(self) -> bool:
        """Whether no mask is needed beside the order of the tokens.

        A sequence of one token never needs one: it sees itself, which is a shape less for the kernels with masks.
        """
        if self.facts:
            return False
        window = self.mask.window
        return self.seq_len == 1 or (not self.has_documents and (window is None or window >= self.seq_len))


Need = Callable[[Request], str | None]


class Entry(ABC):
    """What the choice reads of an implementation.

    `label` is what summaries call it; `asked_by` are the values of kernels.attention that allow it; `knows` are the
    facts of a request that it takes into account: `needs` and `is_timed` are asked of requests without others. Each of
    its `needs` says why a request does not meet it, or None.
    """

    name: str
    label: str
    asked_by: tuple[AttentionBackend, ...]
    knows: frozenset[str] = frozenset()
    needs: tuple[Need, ...] = ()

    def why_not(self, request: Request) -> str | None:
        """What keeps it from the request, or None."""
        return next((why for need in self.needs if (why := need(request))), None)

    def is_timed(self, request: Request) -> bool:
        """Whether it was timed on such a device and found faster than what follows, else "auto" skips it."""
        return True


class Implementation(Entry):
    """One way to compute softmax(scale * query key^T + mask) value.

    `form` is the mask that it wants (mask_of_sequences in masks.py). `operators` give its results, which activation
    checkpointing by operators keeps: they are quadratic in the sequence's length, and their results as narrow as the
    residual stream.
    """

    form: MaskForm
    operators: tuple[Any, ...]

    @abstractmethod
    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        """[B, T, H, D], [B, S, G, D], [B, S, G, E] -> [B, T, H, E] in query's dtype; each query must see a key.

        H is a multiple of G: the query heads h*H/G ... share the key head h.
        """


class SelectiveImplementation(Implementation):
    """One way to compute selective attention; its mask is a Selection."""

    knows = frozenset({"selects", "chunk"})
    form: MaskForm = "selection"

    @abstractmethod
    def sums(self, query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
        """What each chunk of queries selects of each key, as selected_sums (selective.py) gives it."""


class FusedImplementation(Entry):
    """An implementation that also does what lies between the linear layers and attention.

    It takes the place of those named in `over`, pass by pass, in blocks whose projections have its `layout`.
    """

    layout: Layout
    over: frozenset[str]

    @abstractmethod
    def call(self, *projections: Tensor, cos: Tensor, sin: Tensor, mask: Mask, scale: float) -> Tensor:
        """What the linear layers give, not rotated -> [B, T, H, E]; cos and sin are model/layers.py's."""


class Choice(NamedTuple):
    """The implementation that is taken, the form of mask that it wants, and the reason against each other, by name.

    `fused` is one that also rotates, or None; it serves the passes whose attention is by one of `fused.over`.
    """

    implementation: Implementation
    form: MaskForm
    fused: FusedImplementation | None
    why_not: dict[str, str]

    @property
    def refusals(self) -> list[str]:
        """A line for each implementation that is faster than the one that is taken."""
        faster = takewhile(lambda each: each is not self.implementation, IMPLEMENTATIONS)
        return [f"{each.name}: {self.why_not[each.name]}" for each in faster]

    @property
    def why_not_fused(self) -> str | None:
        """Why queries and keys are rotated apart from attention; None: they are not."""
        if self.fused is None:
            return next((self.why_not[each.name] for each in FUSED if each.name in self.why_not), "no kernel")
        return None if self.implementation.name in self.fused.over else f"attention by {self.implementation.label}"


def choose(request: Request, asked: AttentionBackend) -> Choice:
    """The first implementation that nothing keeps from the request.

    Raises ValueError if `asked` is not one of ATTENTION_BACKENDS.
    """
    if asked not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend {asked!r}: expected one of {', '.join(ATTENTION_BACKENDS)}")
    reasons: dict[str, str] = {}
    taken = _first(IMPLEMENTATIONS, request, asked, reasons)
    assert taken is not None, f"no implementation knows {' and '.join(request.facts)}"
    form: MaskForm = "none" if request.is_plainly_causal else taken.form
    layout = request.projections and request.projections.layout
    fused = _first([each for each in reversed(FUSED) if each.layout == layout], request, asked, reasons)
    return Choice(taken, form, fused, reasons)


_E = TypeVar("_E", bound=Entry)


def _first(entries: Sequence[_E], request: Request, asked: AttentionBackend, reasons: dict[str, str]) -> _E | None:
    taken = None
    for each in entries:
        why = _why_not(each, request, asked)
        if why is None and taken is not None:
            why = f"comes after {taken.name}"
        if why is None:
            taken = each
        else:
            reasons[each.name] = why
    return taken


def _why_not(entry: Entry, request: Request, asked: AttentionBackend) -> str | None:
    if unknown := [refusal for name, refusal in request.facts.items() if name not in entry.knows]:
        return unknown[0]
    if asked not in entry.asked_by:
        return f"attention by {asked}"
    if why := entry.why_not(request):
        return why
    return None if asked != "auto" or entry.is_timed(request) else "not timed on such a device"


def _need(is_met: Callable[[Request], bool], reason: str) -> Need:
    """`reason`, a format of the request, where it is not met."""
    return lambda request: None if is_met(request) else reason.format(request)


_ONE_DOCUMENT = _need(lambda request: not request.has_documents, "data.document_mask")
_DOCUMENTS = _need(lambda request: request.has_documents, "no documents")
_WINDOW = _need(lambda request: request.mask.window is not None, "no window")
_NO_WINDOW = _need(lambda request: request.mask.window is None, "a window of {0.mask.window} tokens")
_CHUNKS = _need(lambda request: request.chunk is not None, "full sequences")
_SELECTS = _need(lambda request: request.selects, "no head that selects")
_ONE_WIDTH = _need(lambda request: request.heads.qk_width == request.heads.v_width, "values of another width than keys")


def _plain_causality(request: Request) -> str | None:
    return None if request.is_plainly_causal else _ONE_DOCUMENT(request) or _NO_WINDOW(request)


def _as_many_key_heads(request: Request) -> str | None:
    """For kernels that give each query head a key head of its own."""
    queries, keys = request.heads.queries, request.heads.keys
    return None if queries == keys else Limit(f"takes as many key heads as query heads, not {keys} for {queries}")


def _cudnn(request: Request) -> str | None:
    sizes = request.seq_len, request.chunk or request.seq_len, request.heads.qk_width, request.heads.v_width
    return why_not_cudnn_heads(request.device, request.dtype, *sizes)


def _window_kernel(request: Request) -> str | None:
    return why_not_window_kernel(request.device, request.dtype, request.heads.qk_width, request.mask.sink)


def _hopper_window(request: Request) -> str | None:
    width = request.heads.qk_width
    return why_not_hopper_window(request.device, request.dtype, width, request.mask.sink, request.has_documents)


def _document_kernel(request: Request) -> str | None:
    """Selective attention's takes the same heads."""
    return why_not_document_kernel(request.device, request.dtype, request.heads.qk_width, request.heads.v_width)


def _hopper_kernel(request: Request) -> str | None:
    about = request.heads.qk_width, request.heads.v_width, request.has_documents
    if why := why_not_hopper_kernel(request.device, request.dtype, *about):
        return why
    longest = longest_sequence()
    return Limit(f"takes no sequences longer than {longest:,} tokens") if request.seq_len > longest else None


def _flex_kernel(request: Request) -> str | None:
    """In float32 heads wider than 128 (MLA's of 192) want more shared memory than a GPU has."""
    if request.device.type != "cuda":
        return Limit("needs a GPU")
    dtype, widths = request.dtype, (request.heads.qk_width, request.heads.v_width)
    fits = dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and max(widths) <= 128)
    return None if fits and min(widths) >= 16 else Limit(f"takes no heads as wide as these in {dtype_name(dtype)}")


def _not_apart(request: Request) -> str | None:
    """For those that rotate too."""
    assert request.projections is not None
    return request.projections.why_apart


def _aligned_values(request: Request) -> str | None:
    assert request.projections is not None
    width = request.heads.qk_width - request.projections.rotary_width
    fits = width % _ALIGNED == 0
    return None if fits else Limit(f"takes unrotated parts of heads of multiples of {_ALIGNED}, not of {width}")


def _rotary_width(request: Request) -> str | None:
    assert request.projections is not None
    width = request.projections.rotary_width
    return None if width == LAST else Limit(f"takes rotated parts of heads of {LAST}, not of {width}")


_OURS: tuple[AttentionBackend, ...] = ("auto", "triton")
_MASKED: tuple[AttentionBackend, ...] = (*_OURS, "flex")
_ALL_FAST: tuple[AttentionBackend, ...] = (*_MASKED, "sdpa")


class _SDPA(Implementation):
    """Any mask, as booleans."""

    name, label, asked_by = "sdpa, masked", "sdpa", _ALL_FAST
    knows = frozenset({"chunk"})
    form: MaskForm = "boolean"
    # Its plain path, for shapes that no kernel takes, is no operator of its own: its results include T x T scores.
    operators = (
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_attention_math_for_mps.default,
        torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    )

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert mask is None or isinstance(mask, Tensor)
        return _sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale).transpose(1, 2)


class _Hopper(Implementation):
    """Causal, also inside documents, by our CUDA C++ kernels for Hopper."""

    name, label, asked_by, form = "cuda, causal", "cuda", _OURS, "documents"
    needs = (_NO_WINDOW, _as_many_key_heads, _hopper_kernel)
    operators = (torch.ops.swamla_titan.hopper_attention.default,)

    def is_timed(self, request: Request) -> bool:
        widths = request.heads.qk_width, request.heads.v_width
        return widths == HOPPER_TIMED_WIDTHS and is_tuned_for(request.device, request.dtype)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        documents = (mask.starts, mask.ends) if isinstance(mask, DocumentRule) else ()
        return hopper_attention(query, key, value, scale, *documents)


class _Causal(_SDPA):
    """Causal, one document a sequence, by SDPA's causal kernels; cuDNN first on CUDA."""

    name, label, asked_by, form = "sdpa, causal", "sdpa, causal", _ALL_FAST, "none"
    knows = frozenset()
    needs = (_plain_causality,)


class _Chunked(Implementation):
    """Causal, one document a sequence, for chunks of it: by cuDNN, chunk by chunk (CUDA)."""

    name, label, asked_by, form = "cudnn, causal by chunks", "cudnn, causal by chunks", _MASKED, "chunks"
    knows = frozenset({"chunk"})
    needs = (_CHUNKS, _NO_WINDOW, _ONE_DOCUMENT, _as_many_key_heads, _cudnn)
    operators = (torch.ops.swamla_titan.chunked_causal_attention.default,)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, Chunks)
        return chunked_causal_attention(query, key, value, mask.starts, scale, _CHUNK_KERNEL)


class _Window(Implementation):
    """Window and sink, also in documents, by our Triton kernel (CUDA)."""

    name, label, asked_by, form = "triton, windows", "triton", _OURS, "window"
    needs = (_WINDOW, _ONE_WIDTH, _window_kernel)
    operators = (torch.ops.swamla_titan.window_attention.default,)
    kernel = "triton"

    def is_timed(self, request: Request) -> bool:
        return is_tuned_for(request.device, request.dtype)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, WindowRule)
        return window_attention(query, key, value, mask.starts, mask.window, mask.sink, scale, self.kernel)


class _HopperWindow(_Window):
    """The same by our CUDA C++ kernels for Hopper."""

    name, label, kernel = "cuda, windows", "cuda", "cuda"
    needs = (_WINDOW, _ONE_WIDTH, _hopper_window)


class _Document(Implementation):
    """Causal inside documents, by our Triton kernel (CUDA)."""

    name, label, asked_by, form = "triton, documents", "triton", _OURS, "documents"
    needs = (_NO_WINDOW, _document_kernel, _as_many_key_heads)
    operators = (torch.ops.swamla_titan.document_attention.default,)

    def is_timed(self, request: Request) -> bool:
        widths = request.heads.qk_width, request.heads.v_width
        return widths == TIMED_WIDTHS and is_tuned_for(request.device, request.dtype)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, DocumentRule)
        return document_attention(query, key, value, mask.starts, mask.ends, scale)


class _Flex(Implementation):
    """Any mask, as tiles of 128 tokens, by FlexAttention, always compiled (CUDA).

    Its kernels have no float64 and no heads narrower than 16.
    """

    name, label, asked_by, form = "flex", "flex", _MASKED, "block"
    knows = frozenset({"chunk"})
    needs = (_flex_kernel,)
    operators = (torch.ops.higher_order.flex_attention,)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, BlockMask)
        return _flex(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale).transpose(1, 2)


class _Reference(Implementation):
    """Any mask, as booleans: scores, softmax, average, written down."""

    name, label, asked_by, form = "reference", "reference", ("reference",), "boolean"
    knows = frozenset({"chunk"})
    operators = ()

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert mask is None or isinstance(mask, Tensor)
        heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return reference_attention(*heads, mask, scale).transpose(1, 2)


class _Selective(SelectiveImplementation):
    """Selective attention, also in documents and of chunks, by our Triton kernels (CUDA).

    Taken wherever it runs unless the reference is asked for: that holds scores of all heads, and FlexAttention and SDPA
    do not take selective attention.
    """

    name, label, asked_by = "triton, selective", "triton", _ALL_FAST
    needs = (_SELECTS, _NO_WINDOW, _document_kernel, _as_many_key_heads)
    operators = (torch.ops.swamla_titan.selective_attention.default,)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, Selection)
        return selective_attention(query, key, value, mask, scale)

    def sums(self, query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
        return selected_sums(query, key, rule, scale)


class _SelectiveReference(SelectiveImplementation):
    """The same written down, on any device."""

    name, label, asked_by, operators = "reference, selective", "reference", ATTENTION_BACKENDS, ()
    needs = (_SELECTS, _NO_WINDOW)

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        assert isinstance(mask, Selection)
        return reference_selective_attention(query, key, value, mask, scale)

    def sums(self, query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
        return reference_selected_sums(query, key, rule, scale)


HOPPER, CAUSAL, CHUNKED, DOCUMENT = _Hopper(), _Causal(), _Chunked(), _Document()
HOPPER_WINDOW, WINDOW = _HopperWindow(), _Window()
FLEX, SDPA, REFERENCE = _Flex(), _SDPA(), _Reference()
SELECTIVE, SELECTIVE_REFERENCE = _Selective(), _SelectiveReference()
IMPLEMENTATIONS: list[Implementation] = [  # the fastest first
    HOPPER,
    CAUSAL,
    CHUNKED,
    HOPPER_WINDOW,
    WINDOW,
    DOCUMENT,
    FLEX,
    SDPA,
    REFERENCE,
    SELECTIVE,
    SELECTIVE_REFERENCE,
]


class _RotaryWindow(FusedImplementation):
    """Window and sink with the rotation before, by our Triton kernels (CUDA)."""

    name, label, asked_by = "triton, windows with their rotation", "triton", ATTENTION_BACKENDS
    layout, over = "qkv", frozenset({WINDOW.name})
    knows = frozenset({"chunk"})  # WINDOW does not, so chunks never come here
    needs: tuple[Need, ...] = (_not_apart,)
    kernel = "triton"

    def call(self, *projections: Tensor, cos: Tensor, sin: Tensor, mask: Mask, scale: float) -> Tensor:
        """Queries of a group of heads, then its key and its value, [B, T, G, H/G + 2, D] -> [B, T, H, D]."""
        (qkv,) = projections
        assert isinstance(mask, WindowRule)
        rule = mask.starts, mask.window, mask.sink, scale, self.kernel
        return rotary_window_attention(qkv.contiguous(), cos, sin, *rule)


class _RotaryHopperWindow(_RotaryWindow):
    """The same, with attention by our CUDA C++ kernels for Hopper."""

    name, label, asked_by = "cuda, windows with their rotation", "cuda", _OURS
    knows = frozenset()
    kernel, over = "cuda", frozenset({HOPPER_WINDOW.name})
    needs = (_not_apart, HOPPER_WINDOW.why_not)


class _Latent(FusedImplementation):
    """Causal attention with the rotation and the keys' expansion before, by cuDNN (CUDA)."""

    name, label, asked_by = "cudnn, causal with its rotation", "cudnn with its rotation", _MASKED
    layout, over = "latent", frozenset({HOPPER.name, CAUSAL.name, DOCUMENT.name})
    needs: tuple[Need, ...] = (_not_apart, _aligned_values, _ONE_DOCUMENT, _cudnn)

    def call(self, *projections: Tensor, cos: Tensor, sin: Tensor, mask: Mask, scale: float) -> Tensor:
        """[B, T, H, nope + rope], [B, T, H, nope + v] and [B, T, rope] -> [B, T, H, v]."""
        query, keys_values, rope_key = projections
        documents = (mask.starts, mask.ends) if isinstance(mask, DocumentRule) else ()
        return latent_attention(query.contiguous(), keys_values.contiguous(), rope_key, cos, sin, scale, *documents)


class _LatentDocuments(_Latent):
    """The same inside documents, by our Triton kernels (CUDA)."""

    name, label, asked_by = "triton, documents with their rotation", "triton with its rotation", _OURS
    needs = (_not_apart, _aligned_values, _DOCUMENTS, DOCUMENT.why_not)

    def is_timed(self, request: Request) -> bool:
        return DOCUMENT.is_timed(request)


class _LatentHopper(_Latent):
    """The same, also inside documents, by our CUDA C++ kernels for Hopper."""

    name, label, asked_by = "cuda, causal with its rotation", "cuda with its rotation", _OURS
    needs = (_not_apart, _rotary_width, HOPPER.why_not)

    def is_timed(self, request: Request) -> bool:
        return HOPPER.is_timed(request)

    def call(self, *projections: Tensor, cos: Tensor, sin: Tensor, mask: Mask, scale: float) -> Tensor:
        """As in _Latent."""
        query, keys_values, rope_key = projections
        documents = (mask.starts, mask.ends) if isinstance(mask, DocumentRule) else ()
        heads = query.contiguous(), keys_values.contiguous()
        return latent_hopper_attention(*heads, rope_key, cos, sin, scale, *documents)


ROTARY_WINDOW, ROTARY_HOPPER_WINDOW = _RotaryWindow(), _RotaryHopperWindow()
LATENT, LATENT_DOCUMENTS, LATENT_HOPPER = _Latent(), _LatentDocuments(), _LatentHopper()
# The fastest last, because the reason against the first one tells most where none is taken.
FUSED: list[FusedImplementation] = [
    ROTARY_WINDOW,
    ROTARY_HOPPER_WINDOW,
    LATENT,
    LATENT_DOCUMENTS,
    LATENT_HOPPER,
]


def choose_for_prompts(request: Request, asked: AttentionBackend) -> Choice:
    """`choose` without FlexAttention, which would compile for each prompt's length."""
    choice = choose(request, asked)
    return choose(request, "sdpa") if choice.implementation is FLEX else choice


def for_decoding(asked: AttentionBackend) -> Implementation:
    """What attends to a cache's slots, which boolean masks name, in a model that trains by `asked`."""
    return REFERENCE if asked == "reference" else SDPA


def sdpa_backends(queries: int, keys: int, is_masked: bool) -> list[SDPBackend]:
    """What SDPA may take on a GPU, best first; the last takes everything."""
    return _CUDA_BACKENDS if why_not_cudnn(queries, keys, is_masked) is None else _CUDA_BACKENDS[1:]


def reference_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention written down: scores, softmax, average; the softmax in float32 (float64 for float64 inputs).

    query [B, H, T, D], key [B, G, S, D], value [B, G, S, E], mask boolean or None (causal) -> [B, H, T, E].
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-2, -1) * scale  # [B, H, T, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where heads do not begin at multiples of 16 bytes, as SDPA's kernels read values unasked."""
    fits = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x if fits else x.contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": mask is None,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, **options)
    query, key, value = (_aligned(each) for each in (query, key, value))
    backends = sdpa_backends(query.shape[2], key.shape[2], mask is not None)
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, **options)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    out: Tensor
    if torch.compiler.is_compiling():  # inside a compiled block, whose graph it becomes part of
        out = flex_attention(query, key, value, **options)
        return out
    # Bare, it would make the T x T scores in eager mode. Each length compiles again, as often as there are lengths.
    with torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT):
        out = _compiled_flex()(query, key, value, **options)
    return out


@lru_cache(maxsize=1)
def _compiled_flex(backend: str = "inductor") -> Any:
    # fullgraph: what cannot be compiled is an error and not a silent fall back to eager.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False, backend=backend)
