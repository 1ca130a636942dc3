"""What a decoded token is made of, by Triton kernels (CUDA), whose inputs and outputs have one row a sequence.

Nothing here has a gradient. The plain form of each is what blocks compute in `decode`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla_titan.kernels import decode_triton as kernels
from swamla_titan.kernels.device import Limit, is_tuned_for, power_of_two, why_no_kernels
from swamla_titan.kernels.swiglu import triton_swiglu

# Elements of tiles of which several must fit in 227 KiB of shared memory.
WIDEST_HEAD, WIDEST_LATENT = 256, 512
MOST_TOKENS_TO_SAMPLE = 1 << 16  # of a vocabulary, whose logits lie in the registers of one program
_LEAST = 16  # a side of a tensor core's tile
_MULTIPROCESSORS = 132  # of an H100
_PARTS = 64  # of a sequence's latents, at most
_SLOTS = 64  # of latents, in a tile
_RING_SLOTS = 256  # of a ring, in a tile of a program that has a multiprocessor to itself
_RING_OF_MANY = {"BN": 64, "num_warps": 4, "num_stages": 3}


def why_no_decode_kernels(device: torch.device, dtype: torch.dtype) -> Limit | None:
    """Why these kernels are not taken on this device, or None."""
    if why := why_no_kernels(device):
        return why
    return None if is_tuned_for(device, dtype) else Limit("not timed on such a device")


def linear(
    x: Tensor, weight: Tensor, gain: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None,
    group: int = 0,
) -> Tensor:  # fmt: skip
    """x [B, K] and weight [N, K] -> residual + rms_norm(x, gain) weight^T, [B, N]; without what is None.

    The result is written over the residual. `group` > 0: the weight is of gates and up projections in groups, as SwiGLU
    has them, and the result silu(gate) up, [B, N / 2]. Of several tokens cuBLAS reads the weights as fast.
    """
    if len(x) > 1:
        x = x if gain is None else rms_norm(x, gain, eps)
        if group:
            return triton_swiglu(F.linear(x, weight), group)
        return F.linear(x, weight) if residual is None else residual.addmm_(x, weight.t())
    width, outputs = x.shape[1], weight.shape[0] // (2 if group else 1)
    out = x.new_empty(1, outputs) if residual is None else residual
    tile = _tile(width, outputs, group, gain is not None)
    kernels.linear_of_one[(-(-outputs // tile["BN"]),)](
        *(x, gain, weight, residual, out, eps, outputs),
        K=width,
        NORM=gain is not None,
        RESIDUAL=residual is not None,
        GROUP=group,
        **tile,
        **_pdl(x),
    )
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain of [B, K]."""
    width = x.shape[1]
    out = x.new_empty(x.shape)
    kernels.rms_norm_rows[(len(x),)](x, gain, out, eps, x.stride(0), K=width, BK=power_of_two(width), **_pdl(x))
    return out


def ring_attention(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    gains: tuple[Tensor, Tensor] | None,
    clock: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    sink: int,
    scale: float,
    eps: float,
) -> Tensor:
    """Attention of the next token to the slots of a sliding window's cache, which then holds the token: [B, H * D].

    qkv [B, G, H/G + 2, D] is not rotated; `rotation` is cosines and sines of every position [positions, D/2], float32;
    `gains` [D] each, of norms of queries and of keys; `clock` is starts [B] and length [1]; keys and values
    [B, sink + window, G, D] as SWACache has them.
    """
    batch, groups, members, width = qkv.shape
    per_key, of_norms = members - 2, gains or (None, None)
    out, half = qkv.new_empty(batch, groups * per_key * width), width // 2
    window = keys.shape[1] - sink
    given = qkv, *rotation, *of_norms, *clock, keys, values, out, scale, eps, groups
    sizes = {"PER_KEY": per_key, "HALF": half, "WINDOW": window, "SINK": sink, "QK_NORM": gains is not None}
    if groups * batch > _MULTIPROCESSORS:
        queries, padded = max(_LEAST, power_of_two(per_key)), max(_LEAST, power_of_two(half))
        tile = _RING_OF_MANY | {"QUERIES": queries, "PADDED": padded}
        kernels.ring_attention_of_many[(groups, batch)](*given, **sizes, **tile)
        return out
    padded, slots = power_of_two(half), min(power_of_two(window), _RING_SLOTS)
    warps = max(1, min(8, slots * padded // 2048))
    sizes |= {"PADDED": padded, "SINKS": power_of_two(max(sink, 1)), "BN": slots}
    kernels.ring_attention[(groups, batch)](*given, **sizes, **_pdl(qkv), num_warps=warps)
    return out


def latent_attention(
    query: Tensor,
    new: Tensor,
    up: Tensor,
    rotation: tuple[Tensor, Tensor],
    gain: Tensor,
    clock: tuple[Tensor, Tensor],
    latents: Tensor,
    rope_keys: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    """Absorbed latent attention of the next token to a cache, which then holds the token: [B, H * v].

    query [B, H, nope + rope] and new [B, R + rope], latent before its norm and key, are not rotated; tokens may be
    apart. up [H, nope + v, R]; `rotation` and `clock` as in ring_attention; latents [B, S, R], rope_keys [B, S, rope].
    """
    (batch, heads, width), (room, rank), rope = query.shape, latents.shape[1:], rope_keys.shape[2]
    nope, parts = width - rope, _parts(batch, heads, room)
    value = up.shape[1] - nope
    of_rank = {"RANK": rank, "PADDED_RANK": max(_LEAST, power_of_two(rank))}
    latent_query, out = query.new_empty(batch, heads, rank), query.new_empty(batch, heads * value)
    rows = max(_LEAST, min(power_of_two(batch), 64))
    kernels.latent_queries[(heads, -(-rank // 64), -(-batch // rows))](
        *(query, up, latent_query, batch, query.stride(0), heads),
        NOPE=nope,
        PADDED_NOPE=max(_LEAST, power_of_two(nope)),
        QUERY=width,
        UP=nope + value,
        RANK=rank,
        BM=rows,
        BR=64,
        **_pdl(query),
    )
    mixed = query.new_empty(batch, parts, heads, rank, dtype=torch.float32)
    largest, denominator = mixed.new_empty(2, batch, parts, heads)
    chunk = -(-room // (parts * _SLOTS)) * _SLOTS
    block = min(max(_LEAST, power_of_two(heads)), 32)
    kernels.latent_attention[(parts, -(-heads // block), batch)](
        *(query, latent_query, new, gain, *rotation, *clock, latents, rope_keys, mixed, largest, denominator),
        *(scale, eps, query.stride(0), new.stride(0), room, chunk),
        HEADS=heads,
        BH=block,
        NOPE=nope,
        HALF=rope // 2,
        PADDED=max(_LEAST, power_of_two(rope // 2)),
        **of_rank,
        BN=_SLOTS,
        **_pdl(query),
        num_warps=8,
        num_stages=2,
    )
    rows, warps = (1, 8 if parts > 32 else 4) if batch < _LEAST else (_LEAST, 8)
    columns = min(power_of_two(value), 32 if rows == 1 else 64)
    kernels.latent_values[(heads, -(-value // columns), -(-batch // rows))](
        *(mixed, largest, denominator, up, out, batch, parts, heads),
        PARTS=power_of_two(parts),
        NOPE=nope,
        VALUE=value,
        **of_rank,
        BM=rows,
        BV=max(columns, _LEAST),
        **_pdl(query),
        num_warps=warps,
    )
    return out


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """One token id per sequence, [B] int64, from logits [B, V]; V is at most MOST_TOKENS_TO_SAMPLE.

    As model/generation.py defines it, and of the same distribution, but other draws. `temperature` 0: the likeliest.
    """
    batch, size = logits.shape
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    seed = out
    if temperature:
        seed = torch.randint(1 << 62, (1,), device=logits.device, generator=generator)
    columns = power_of_two(size)
    kernels.sample_rows[(batch,)](
        *(logits, seed, out, size, logits.stride(0), 1 / temperature if temperature else 1.0, top_k, top_p),
        SIZE=columns,
        GREEDY=not temperature,
        TOP_K=0 < top_k < size,
        TOP_P=top_p < 1,
        num_warps=max(1, min(32, columns // 1024)),
    )
    return out


def _parts(batch: int, heads: int, room: int) -> int:
    """Into how many parts a sequence's latents are cut, so that there are programs for all multiprocessors."""
    programs = batch * -(-heads // 32)
    return max(1, min(-(-_MULTIPROCESSORS // programs), _PARTS, -(-room // _SLOTS)))


def _tile(width: int, outputs: int, group: int, is_normed: bool) -> dict[str, int]:
    """Outputs and inputs of a program of linear_of_one at a time, and its warps: the fastest on an H200."""
    if not is_normed:
        return {"BN": 8 if width <= 2048 else 2, "BK": min(power_of_two(width), 2048), "num_warps": 8}
    if group:
        return {"BN": 8, "BK": 512, "num_warps": 2}
    return {"BN": 8, "BK": 512, "num_warps": 4} if outputs > 8192 else {"BN": 4, "BK": 512, "num_warps": 2}


def _pdl(x: Tensor) -> dict[str, Any]:
    """Launch options of kernels that begin while the one before them ends: of one token, because cuBLAS has no such."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and len(x) == 1 else {"PDL": False}
