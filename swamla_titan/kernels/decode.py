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

MOST_TOKENS = 32  # of a linear layer by our kernels; of more cuBLAS reads the weights as fast
_LEAST = 16  # a side of a tensor core's tile
_PROGRAMS = 264  # two for each multiprocessor of an H100
_PARTS = 16  # of a sequence's latents, at most
_SLOTS = 64  # of a cache, in a tile


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

    `group` > 0: the weight is of gates and up projections in groups, as SwiGLU has them, and the result silu(gate) up,
    [B, N / 2].
    """
    (tokens, width), outputs = x.shape, weight.shape[0] // (2 if group else 1)
    if tokens > MOST_TOKENS:
        return _linear_of_many(x, weight, gain, eps, residual, group)
    out = x.new_empty(tokens, outputs)
    rule = {"K": width, "NORM": gain is not None, "RESIDUAL": residual is not None, "GROUP": group}
    given = x, gain, weight, residual, out, eps
    if tokens == 1:
        columns, options = _tile_of_one(outputs, width)
        kernels.linear_of_one[(-(-outputs // columns), 1)](*given, outputs, **rule, BN=columns, **options, **_pdl(x))
        return out
    columns, options = _tile_of_few(outputs, width)
    rows = max(_LEAST, power_of_two(tokens))
    grid = -(-outputs // columns), -(-tokens // rows)
    kernels.linear_of_few[grid](*given, tokens, outputs, **rule, BM=rows, BN=columns, **options, **_pdl(x))
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain of [B, K]."""
    out, width = torch.empty_like(x), x.shape[1]
    kernels.rms_norm_rows[(len(x),)](x, gain, out, eps, K=width, BK=power_of_two(width), **_pdl(x))
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
    out = qkv.new_empty(batch, groups * per_key * width)
    kernels.ring_attention[(groups, batch)](
        *(qkv, *rotation, *of_norms, *clock, keys, values, out, scale, eps, groups),
        PER_KEY=per_key,
        QUERIES=max(_LEAST, power_of_two(per_key)),
        HALF=width // 2,
        PADDED=max(_LEAST, power_of_two(width // 2)),
        WINDOW=keys.shape[1] - sink,
        SINK=sink,
        BN=_SLOTS,
        QK_NORM=gains is not None,
        **_pdl(qkv),
        num_warps=4,
        num_stages=3,
    )
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
    rows, warps = (1, 4) if batch < _LEAST else (_LEAST, 8)
    columns = min(power_of_two(value), 32 if rows == 1 else 64)
    kernels.latent_values[(heads, -(-value // columns), -(-batch // rows))](
        *(mixed, largest, denominator, up, out, batch, heads),
        PARTS=parts,
        NOPE=nope,
        VALUE=value,
        **of_rank,
        BM=rows,
        BV=max(columns, _LEAST),
        **_pdl(query),
        num_warps=warps,
    )
    return out


def _linear_of_many(
    x: Tensor, weight: Tensor, gain: Tensor | None, eps: float, residual: Tensor | None, group: int
) -> Tensor:
    x = x if gain is None else rms_norm(x, gain, eps)
    if group:
        return triton_swiglu(F.linear(x, weight), group)
    return F.linear(x, weight) if residual is None else torch.addmm(residual, x, weight.t())


def _parts(batch: int, heads: int, room: int) -> int:
    """Into how many parts a sequence's latents are cut, so that there are programs for all multiprocessors."""
    programs = batch * -(-heads // 32)
    return max(1, min(_PROGRAMS // programs, _PARTS, -(-room // _SLOTS)))


def _tile_of_one(outputs: int, width: int) -> tuple[int, dict[str, int]]:
    """Outputs of a program of linear_of_one, and its other options."""
    return 4, {"BK": min(power_of_two(width), 2048), "num_warps": 4}


def _tile_of_few(outputs: int, width: int) -> tuple[int, dict[str, int]]:
    """Outputs of a program of linear_of_few, and its other options."""
    return (16 if outputs < 3000 else 32), {"BK": 128, "num_warps": 4, "num_stages": 4}


def _pdl(x: Tensor) -> dict[str, Any]:
    """Launch options of kernels that begin while the one before them ends."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda else {"PDL": False}
