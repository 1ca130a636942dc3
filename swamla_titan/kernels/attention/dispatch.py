"""The choice between the implementations of softmax attention, and why each other one was not taken.

| implementation | mask         | meaning                            | computed by                                |
|----------------|--------------|------------------------------------|--------------------------------------------|
| CAUSAL         | None         | causal, one document a sequence    | SDPA's causal kernels; cuDNN first on CUDA |
| CHUNKED        | Chunks       | the same, for chunks of a sequence | cuDNN, chunk by chunk (CUDA)               |
| WINDOW         | WindowRule   | window and sink, also in documents | our Triton kernel (CUDA)                   |
| DOCUMENT       | DocumentRule | causal inside documents            | our Triton kernel (CUDA)                   |
| FLEX           | BlockMask    | window and sink, or documents      | FlexAttention, always compiled (CUDA)      |
| SDPA           | Tensor       | the same, as booleans              | SDPA with a mask                           |
| REFERENCE      | Tensor, None | any                                | scores, softmax, average, written down     |

Two more rotate queries and keys too, over one of these: ROTARY_WINDOW over WINDOW, LATENT over CAUSAL or DOCUMENT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from swamla_titan.kernels.attention.causal import why_not_cudnn, why_not_cudnn_heads
from swamla_titan.kernels.attention.chunked import chunked_causal_attention
from swamla_titan.kernels.attention.document import TIMED_WIDTHS, document_attention, why_not_document_kernel
from swamla_titan.kernels.attention.masks import Chunks, DocumentRule, Mask, MaskSpec, WindowRule
from swamla_titan.kernels.attention.window import why_not_window_kernel, window_attention
from swamla_titan.kernels.device import is_tuned_for, named

# "auto": the fastest that device, dtype and shape allow; "triton": our kernels wherever they run, else as auto;
# "flex": FlexAttention for what is not plainly causal; "sdpa": boolean masks, for any length without compiling again;
# "reference": boolean masks and explicit scores.
ATTENTION_BACKENDS = ("auto", "triton", "flex", "sdpa", "reference")

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


@dataclass(frozen=True)
class Request:
    """What a kind of block asks of attention: everything that the choice depends on.

    `chunk`: under context parallelism a device has two chunks of each sequence of this length; None: full sequences.
    `projections`: what its linear layers give, "qkv" (queries, keys and values, by groups of heads) or "latent"; None:
    implementations with the rotation are not asked for. `rotary_width`: how much of a head is rotated.
    """

    device: torch.device
    dtype: torch.dtype
    qk_width: int
    v_width: int
    mask: MaskSpec
    seq_len: int
    has_documents: bool
    chunk: int | None = None
    projections: str | None = None
    rotary_width: int = 0
    has_qk_norm: bool = False
    keeps_operators: bool = False  # by activation checkpointing

    @property
    def is_plainly_causal(self) -> bool:
        """Whether no mask is needed beside the order of the tokens.

        A sequence of one token never needs one: it sees itself, which is a shape less for the kernels with masks.
        """
        window = self.mask.window
        return self.seq_len == 1 or (not self.has_documents and (window is None or window >= self.seq_len))


Call = Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]


def _always(request: Request) -> bool:
    return True


def _never(request: Request) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute softmax(scale * query key^T + mask) value.

    `label` is what summaries call it; `asked_by` are the values of kernels.attention that allow it; `form` is the mask
    that it wants (mask_of_sequences in masks.py); `why_not` says what keeps it from a request, or None; `is_timed`
    whether it was timed on such a device and found faster than what follows, without which "auto" passes it by.

    `call(query, key, value, mask, scale)`: query [B, T, H, D], key [B, S, G, D], value [B, S, G, E] with H a multiple
    of G (query heads h*H/G ... share the key head h) -> [B, T, H, E] in query's dtype. Each query must see a key.
    """

    name: str
    label: str
    asked_by: tuple[str, ...]
    form: str
    why_not: Callable[[Request], str | None]
    call: Call
    is_timed: Callable[[Request], bool] = _always


@dataclass(frozen=True, eq=False)
class FusedImplementation:
    """An implementation that also does what lies between the linear layers and attention; fields as above.

    It takes the place of those in `over`, pass by pass, where a block's `projections` are as it wants them.
    """

    name: str
    label: str
    asked_by: tuple[str, ...]
    projections: str
    over: tuple[Implementation, ...]
    why_not: Callable[[Request], str | None]
    is_timed: Callable[[Request], bool] = _always


class Choice(NamedTuple):
    """The implementation that is taken, one that also rotates or None, and the reason against each other, by name.

    `fused` serves the passes whose attention is by one of `fused.over`.
    """

    implementation: Implementation
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
        return None if self.implementation in self.fused.over else f"attention by {self.implementation.label}"


def choose(request: Request, asked: str) -> Choice:
    """The first implementation that nothing keeps from the request; `asked` is one of ATTENTION_BACKENDS.

    Raises ValueError for another value.
    """
    if asked not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend {asked!r}: expected one of {', '.join(ATTENTION_BACKENDS)}")
    reasons: dict[str, str] = {}
    taken = _first(IMPLEMENTATIONS, request, asked, reasons)
    assert isinstance(taken, Implementation), "SDPA takes everything"
    fusable = [each for each in FUSED if each.projections == request.projections]
    fused = _first(fusable, request, asked, reasons)
    assert fused is None or isinstance(fused, FusedImplementation)
    return Choice(taken, fused, reasons)


def _first(
    entries: "list[Implementation] | list[FusedImplementation]", request: Request, asked: str, reasons: dict[str, str]
) -> Implementation | FusedImplementation | None:
    taken = None
    for each in entries:
        why = _why_not(each, request, asked)
        if why is None and taken is None:
            taken = each
        else:
            reasons[each.name] = why or f"comes after {taken.name}"  # type: ignore[union-attr]
    return taken


def _why_not(entry: Implementation | FusedImplementation, request: Request, asked: str) -> str | None:
    if asked not in entry.asked_by:
        return f"attention by {asked}"
    if why := entry.why_not(request):
        return why
    return None if asked != "auto" or entry.is_timed(request) else "not timed on such a device"


def _why_not_causal(request: Request) -> str | None:
    if request.chunk is not None:
        return "parallel.context"
    if request.is_plainly_causal:
        return None
    return "data.document_mask" if request.has_documents else f"a window of {request.mask.window} tokens"


def _why_not_chunked(request: Request) -> str | None:
    if request.chunk is None:
        return "full sequences"
    if request.mask.window is not None:
        return f"a window of {request.mask.window} tokens"
    if request.has_documents:
        return "data.document_mask"
    return why_not_cudnn_heads(
        request.device, request.dtype, request.seq_len, request.chunk, request.qk_width, request.v_width
    )


def _why_not_window(request: Request) -> str | None:
    if request.mask.window is None:
        return "no window"
    if request.qk_width != request.v_width:
        return "values of another width than keys"
    why = why_not_window_kernel(request.device, request.dtype, request.qk_width, request.mask.sink)
    return why or ("parallel.context" if request.chunk is not None else None)


def _why_not_document(request: Request) -> str | None:
    if request.mask.window is not None:
        return f"a window of {request.mask.window} tokens"
    why = why_not_document_kernel(request.device, request.dtype, request.qk_width, request.v_width)
    return why or ("parallel.context" if request.chunk is not None else None)


def _why_not_flex(request: Request) -> str | None:
    """FlexAttention's CUDA kernels have no float64 and no heads narrower than 16.

    In float32 heads wider than 128 (MLA's of 192) want more shared memory than a GPU has.
    """
    if request.device.type != "cuda":
        return "needs a GPU"
    widths = request.qk_width, request.v_width
    fits = request.dtype in (torch.bfloat16, torch.float16) or (request.dtype == torch.float32 and max(widths) <= 128)
    return None if fits and min(widths) >= 16 else f"takes no heads as wide as these in {named(request.dtype)}"


def _why_not_rotary_window(request: Request) -> str | None:
    if request.keeps_operators:
        return "activation_checkpoint"  # which would keep rotated queries and keys beside those of the projection
    return "model.qk_norm" if request.has_qk_norm else None  # which lies between projection and rotation


def _why_not_latent_heads(request: Request) -> str | None:
    if request.keeps_operators:
        return "activation_checkpoint"
    if request.chunk is not None:
        return "parallel.context"
    unaligned = (request.qk_width - request.rotary_width) % _ALIGNED
    return f"model.qk_nope_head_dim is no multiple of {_ALIGNED}" if unaligned else None


def _why_not_latent(request: Request) -> str | None:
    if why := _why_not_latent_heads(request):
        return why
    if request.has_documents:
        return "data.document_mask"
    length = request.seq_len
    return why_not_cudnn_heads(request.device, request.dtype, length, length, request.qk_width, request.v_width)


def _why_not_latent_documents(request: Request) -> str | None:
    if why := _why_not_latent_heads(request):
        return why
    return _why_not_document(request) if request.has_documents else "no documents"


def _is_window_timed(request: Request) -> bool:
    return is_tuned_for(request.device, request.dtype)


def _are_documents_timed(request: Request) -> bool:
    return (request.qk_width, request.v_width) == TIMED_WIDTHS and is_tuned_for(request.device, request.dtype)


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert mask is None or isinstance(mask, Tensor)
    return _sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale).transpose(1, 2)


def _by_chunks(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert isinstance(mask, Chunks)
    return chunked_causal_attention(query, key, value, mask.starts, scale, _CHUNK_KERNEL)


def _by_window_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert isinstance(mask, WindowRule)
    return window_attention(query, key, value, mask.starts, mask.window, mask.sink, scale)


def _by_document_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert isinstance(mask, DocumentRule)
    return document_attention(query, key, value, mask.starts, mask.ends, scale)


def _by_flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert isinstance(mask, BlockMask)
    return _flex(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale).transpose(1, 2)


def _by_reference(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    assert mask is None or isinstance(mask, Tensor)
    heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return reference_attention(*heads, mask, scale).transpose(1, 2)


_OURS, _MASKED = ("auto", "triton"), ("auto", "triton", "flex")
_ALL_FAST = (*_MASKED, "sdpa")
CAUSAL = Implementation("sdpa, causal", "sdpa, causal", _ALL_FAST, "none", _why_not_causal, _by_sdpa)
CHUNKED = Implementation(
    "cudnn, causal by chunks", "cudnn, causal by chunks", _MASKED, "chunks", _why_not_chunked, _by_chunks
)
WINDOW = Implementation(
    "triton, windows", "triton", _OURS, "window", _why_not_window, _by_window_kernel, _is_window_timed
)
DOCUMENT = Implementation(
    "triton, documents", "triton", _OURS, "documents", _why_not_document, _by_document_kernel, _are_documents_timed
)
FLEX = Implementation("flex", "flex", _MASKED, "block", _why_not_flex, _by_flex)
SDPA = Implementation("sdpa, masked", "sdpa", _ALL_FAST, "boolean", _never, _by_sdpa)
REFERENCE = Implementation("reference", "reference", ("reference",), "boolean", _never, _by_reference)
IMPLEMENTATIONS = [CAUSAL, CHUNKED, WINDOW, DOCUMENT, FLEX, SDPA, REFERENCE]  # the fastest first

ROTARY_WINDOW = FusedImplementation(
    "triton, windows with their rotation", "triton", ATTENTION_BACKENDS, "qkv", (WINDOW,), _why_not_rotary_window
)
LATENT = FusedImplementation(
    "cudnn, causal with its rotation", "cudnn with its rotation", _MASKED, "latent", (CAUSAL, DOCUMENT), _why_not_latent
)
LATENT_DOCUMENTS = FusedImplementation(
    "triton, documents with their rotation",
    "triton with its rotation",
    _OURS,
    "latent",
    (CAUSAL, DOCUMENT),
    _why_not_latent_documents,
    _are_documents_timed,
)
FUSED = [ROTARY_WINDOW, LATENT, LATENT_DOCUMENTS]


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


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": mask is None,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, **options)
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
