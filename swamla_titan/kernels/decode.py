"""What a decoded token is made of, by Triton kernels (CUDA), whose inputs and outputs have one row a sequence.

Nothing here has a gradient. The plain form of each is what blocks compute in `decode`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.kernels import decode_triton as kernels
from swamla_titan.kernels.device import Limit, is_tuned_for, power_of_two, why_no_kernels

# Elements of tiles of which several must fit in 227 KiB of shared memory.
WIDEST_HEAD, WIDEST_LATENT = 256, 512
MOST_TOKENS_TO_SAMPLE = 1 << 16  # of a vocabulary, whose logits lie in the registers of one program
_LOGITS = 4096  # of which a program finds the largest
_ALIGNED = 16  # bytes
_LEAST = 16  # a side of a tensor core's tile
_MULTIPROCESSORS = 132  # of an H100
_PARTS = 64  # of a sequence's latents, at most
_SLOTS = 64  # of latents, in a tile
_RING_SLOTS = 256, 16  # of a ring, in a tile of a program that has a multiprocessor to itself, and of one of many


def why_no_decode_kernels(device: torch.device, dtype: torch.dtype) -> Limit | None:
    """Why these kernels are not taken on this device, or None."""
    if why := why_no_kernels(device):
        return why
    return None if is_tuned_for(device, dtype) else Limit("not timed on such a device")


class Stream(NamedTuple):
    """The residual stream [B, dim] of a step, and what is still to be added to it [parts, B, dim] float32, if anything.

    Functions that are given one may write over it.
    """

    x: Tensor
    added: Tensor | None = None

    def sum(self) -> Tensor:
        """[B, dim]."""
        return self.x if self.added is None else (self.x + self.added.sum(dim=0)).to(self.x.dtype)


def fits(*weights: Tensor, group: int = 0) -> bool:
    """Whether linear layers of several sequences take such weights [N, K]; `group` as in normed_linear."""
    has_tiles = not group or group >= _LEAST
    return has_tiles and not any(each.shape[1] * each.element_size() % _ALIGNED for each in weights)


def normed_linear(stream: Stream, gain: Tensor, eps: float, weight: Tensor, group: int = 0) -> tuple[Stream, Tensor]:
    """The stream, summed, and rms_norm(stream, gain) weight^T, [B, N], of weight [N, dim].

    `group` > 0: the weight is of gates and up projections in groups, as SwiGLU has them, and the result
    silu(gate) up, [B, N / 2].
    """
    x, (outputs, width) = stream.x, weight.shape
    outputs //= 2 if group else 1
    if len(x) == 1:
        assert stream.added is None
        return stream, _linear_of_one(x, weight, x.new_empty(1, outputs), gain=gain, eps=eps, group=group)
    normed = x.new_empty(x.shape)
    parts = 0 if stream.added is None else len(stream.added)
    kernels.rms_norm_rows[(len(x),)](
        *(x, stream.added, gain, normed, eps, x.stride(0)),
        K=width,
        BK=power_of_two(width),
        PARTS=parts,
        **_pdl(x),
        num_warps=16,
    )
    return Stream(x), _linear_of_many(normed, weight, group)[0]


def add_linear(stream: Stream, x: Tensor, weight: Tensor) -> Stream:
    """The stream with x weight^T added: x [B, K], weight [dim, K]."""
    assert stream.added is None
    if len(x) == 1:
        return Stream(_linear_of_one(x, weight, stream.x, residual=stream.x))
    return Stream(stream.x, _linear_of_many(x, weight, in_parts=True))


def _linear_of_one(
    x: Tensor, weight: Tensor, out: Tensor, gain: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, group: int = 0,
) -> Tensor:  # fmt: skip
    outputs, width = out.shape[1], x.shape[1]
    tile = _tile_of_one(width, outputs, group, gain is not None)
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


def _linear_of_many(x: Tensor, weight: Tensor, group: int = 0, in_parts: bool = False) -> Tensor:
    """x weight^T, [1, B, N], or its addends [parts, B, N] float32."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (batch, width), outputs = x.shape, len(weight) // (2 if group else 1)
    tile, chunk = _tile_of_many(batch, width, outputs, group, in_parts)
    parts = -(-width // chunk)
    out = x.new_empty(parts, batch, outputs, dtype=torch.float32 if in_parts else x.dtype)
    grid = -(-outputs // tile["BN"]), parts, -(-batch // tile["BM"])
    tiles = [
        TensorDescriptor(each, list(each.shape), list(each.stride()), [rows, tile["BK"]])
        for each, rows in ((x, tile["BM"]), (weight, tile["BN"]))
    ]
    kernels.linear_of_many[grid](*tiles, out, batch, outputs, CHUNK=chunk, GROUP=group, **tile, **_pdl(x))
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
    window = keys.shape[1] - sink
    assert keys.transpose(1, 2).is_contiguous()
    kernels.ring_attention[(groups, batch)](
        *(qkv, *rotation, *of_norms, *clock, keys, values, out, scale, eps, groups),
        PER_KEY=per_key,
        HALF=width // 2,
        PARTS=width // (width & -width),
        WINDOW=window,
        SINK=sink,
        SINKS=power_of_two(max(sink, 1)),
        QK_NORM=gains is not None,
        **_ring_tile(groups * batch, window, width),
        **_pdl(qkv),
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
    out = query.new_empty(batch, heads * value)
    mixed = query.new_empty(batch, parts, heads, rank, dtype=torch.float32)
    largest, denominator = mixed.new_empty(2, batch, parts, heads)
    latent_query = query.new_empty(batch, heads, rank)
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
    block = min(max(_LEAST, power_of_two(heads)), 32)
    kernels.latent_attention[(parts, -(-heads // block), batch)](
        *(query, latent_query, new, gain, *rotation, *clock, latents, rope_keys, mixed, largest, denominator),
        *(scale, eps, query.stride(0), new.stride(0), room),
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
    logits: Tensor,
    out: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id per sequence in `out`, [B] int64, from logits [B, V]; V is at most MOST_TOKENS_TO_SAMPLE.

    As model/generation.py defines it, and of the same distribution, but other draws. `temperature` 0: the likeliest.
    """
    batch, size = logits.shape
    if not temperature:
        parts = -(-size // _LOGITS)
        values = torch.empty(batch, parts, device=logits.device)
        indices = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
        given = logits, values, indices, size, logits.stride(0)
        # What comes before may be a graph, so only the second kernel begins while the first ends.
        kernels.largest_of_parts[(parts, batch)](*given, BN=_LOGITS, PARTS=parts, num_warps=8)
        found = values, indices, out
        kernels.largest_of_rows[(batch,)](*found, PARTS=parts, PADDED=power_of_two(parts), **_pdl(logits), num_warps=1)
        return out
    seed = torch.randint(1 << 62, (1,), device=logits.device, generator=generator)
    columns = power_of_two(size)
    kernels.sample_rows[(batch,)](
        *(logits, seed, out, size, logits.stride(0), 1 / temperature, top_k, top_p),
        SIZE=columns,
        TOP_K=0 < top_k < size,
        TOP_P=top_p < 1,
        num_warps=max(1, min(32, columns // 1024)),
    )
    return out


def _parts(batch: int, heads: int, room: int) -> int:
    """Into how many parts a sequence's latents are cut, so that there are programs for all multiprocessors."""
    programs = batch * -(-heads // 32)
    return max(1, min(round(2 * _MULTIPROCESSORS / programs), _PARTS, -(-room // _SLOTS)))


def _ring_tile(programs: int, window: int, width: int) -> dict[str, int]:
    """Slots of a ring in a tile, warps of a program, whether it holds the first tile, and how many it reads ahead."""
    is_many = programs > _MULTIPROCESSORS
    slots = min(power_of_two(window), _RING_SLOTS[is_many])
    if is_many:
        return {"BN": slots, "num_warps": max(1, slots * power_of_two(width) // 1024), "HELD": 0, "STAGES": 5}
    return {"BN": slots, "num_warps": max(1, min(8, slots * power_of_two(width) // 2048)), "HELD": 1, "STAGES": 1}


def _tile_of_one(width: int, outputs: int, group: int, is_normed: bool) -> dict[str, int]:
    """The tile of a program of linear_of_one, and how much of the weight is read ahead: the fastest on an H200."""
    if is_normed:
        held = 3 if outputs > 8192 else 1
        return {"BN": 8 if group else 4, "BK": 512, "num_warps": 2, "HELD": min(held, -(-width // 512)), "AHEAD": 1}
    if width <= 2048:
        return {"BN": 8, "BK": power_of_two(width), "num_warps": 8, "HELD": 1, "AHEAD": 0}
    return {"BN": 4, "BK": 512, "num_warps": 2, "HELD": min(8, -(-width // 512)), "AHEAD": 0}


def _tile_of_many(batch: int, width: int, outputs: int, group: int, in_parts: bool) -> tuple[dict[str, int], int]:
    """The tile of a program of linear_of_many, and the inputs that it sums: the fastest on an H200 for 64 sequences."""
    tile = {"BM": max(_LEAST, min(power_of_two(batch), 64)), "BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4}
    if outputs > 128 * _MULTIPROCESSORS:
        tile |= {"BN": 128, "BK": 64, "num_stages": 5}
    if group:
        tile["BN"] = min(group, tile["BN"])
    parts, inputs = -(-_MULTIPROCESSORS * tile["BN"] // outputs) if in_parts else 1, tile["BK"]
    parts = next((each for each in range(parts, 2 * parts) if not width % (each * inputs)), parts)
    return tile, -(-width // (parts * inputs)) * inputs


def _pdl(x: Tensor) -> dict[str, Any]:
    """Launch options of kernels that begin while the one before them ends."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda else {"PDL": False}
