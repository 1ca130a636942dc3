"""Softmax attention under a mask: one entry, its fast paths, and the plain reference they are tested against.

The form of the mask picks the path, and whoever builds the mask (model/context.py) picks its form:

| mask         | meaning                           | path                                               |
|--------------|-----------------------------------|----------------------------------------------------|
| None         | causal, one document per row      | SDPA's causal kernels; cuDNN first on CUDA         |
| WindowRule   | window + sink, also in documents  | our Triton kernel (CUDA)                           |
| DocumentRule | causal inside documents           | our Triton kernel (CUDA)                           |
| BlockMask    | window + sink, or documents       | FlexAttention, always compiled (CUDA)              |
| Tensor       | the same, as booleans             | SDPA with a mask (CPU, where flex has no backward) |
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from swamla_titan.kernels.attention.document import document_attention
from swamla_titan.kernels.attention.masks import DocumentRule, WindowRule
from swamla_titan.kernels.attention.window import window_attention

Mask = Tensor | BlockMask | WindowRule | DocumentRule | None

# cuDNN first: on an H100 it takes queries and keys of 192 beside values of 128, 3.5 times as fast as flex.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN's deterministic backward takes a workspace that outgrows the GPU's memory from about here on.
CUDNN_DETERMINISTIC_MAX_LEN = 16384
_NO_LIMIT = 2**31


def why_not_cudnn(queries: int, keys: int, is_masked: bool = False) -> str | None:
    """What keeps cuDNN's attention from these lengths, or None; what of widths and dtypes, torch tells by itself.

    Where torch would let it try and it fails, it ends the run with an error of its own instead of the next backend.
    """
    if is_masked:
        return "a mask"  # fails for some shapes ("no execution plans support the graph")
    if min(queries, keys) < 2:
        return "a sequence of one token"
    if queries >= CUDNN_DETERMINISTIC_MAX_LEN and torch.are_deterministic_algorithms_enabled():
        return f"deterministic algorithms at {CUDNN_DETERMINISTIC_MAX_LEN} tokens or more"
    return None


def sdpa_backends(queries: int, keys: int, is_masked: bool) -> list[SDPBackend]:
    """What SDPA may take on a GPU, best first; the last takes everything."""
    return _CUDA_BACKENDS if why_not_cudnn(queries, keys, is_masked) is None else _CUDA_BACKENDS[1:]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    *,
    reference: bool = False,
) -> Tensor:
    """softmax(scale * query key^T + mask) value.

    query [B, T, H, D], key [B, S, G, D], value [B, S, G, E] with H a multiple of G (query heads h*H/G ... share the
    key head h) -> [B, T, H, E] in query's dtype. `mask` is None (causal, S = T), a WindowRule (S = T), a DocumentRule
    (S = T, G = H), a BlockMask, or booleans that broadcast to [B, H, T, S], True where the key is seen; each query must
    see a key. `reference` takes the plain path, for None and boolean masks.
    """
    if isinstance(mask, WindowRule):
        assert not reference, "the reference path takes a boolean mask"
        return window_attention(query, key, value, mask.starts, mask.window, mask.sink, scale)
    if isinstance(mask, DocumentRule):
        assert not reference, "the reference path takes a boolean mask"
        return document_attention(query, key, value, mask.starts, mask.ends, scale)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, length, width]
    if reference:
        assert not isinstance(mask, BlockMask), "the reference path takes a boolean mask"
        out = reference_attention(query, key, value, mask, scale)
    elif isinstance(mask, BlockMask):
        out = _flex(query, key, value, mask, scale)
    else:
        out = _sdpa(query, key, value, mask, scale)
    return out.transpose(1, 2)


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
    # Bare, it would make the T x T scores in eager mode. Each length compiles anew, as often as there are lengths.
    with torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT):
        out = _compiled_flex()(query, key, value, **options)
    return out


@lru_cache(maxsize=1)
def _compiled_flex(backend: str = "inductor") -> Any:
    # fullgraph: what cannot be compiled is an error and not a silent fall back to eager.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False, backend=backend)
