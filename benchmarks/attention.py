"""Milliseconds and errors of every way to compute the attention of a block, forward and backward, on one GPU.

    python benchmarks/attention.py
    python benchmarks/attention.py --only swa --paths triton flex --replays 20 --out attention.json

bfloat16, queries, keys and values as views of one tensor, as the model's projections leave them. Times are the GPU's
own (benchmarks/device_time.py), medians with a cold cache. Errors are norms relative to a float64 reference, of the
output and of the worst of the three gradients, for the first two rows and heads, in rows of up to 8,192 tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.device_time import device_milliseconds
from swamla_titan.kernels.attention.dispatch import (
    DOCUMENT,
    FLEX,
    HOPPER,
    HOPPER_WINDOW,
    SDPA,
    WINDOW,
    Implementation,
    reference_attention,
)
from swamla_titan.kernels.attention.masks import (
    DocumentRule,
    Mask,
    Selection,
    SelectionRule,
    WindowRule,
    block_mask,
    block_mask_of_one_document,
    dense_mask,
    document_ends,
    document_starts,
)
from swamla_titan.kernels.attention.selective import reference_selective_attention, selective_attention


class Shape(NamedTuple):
    """`window` None: causal. `documents`: their mean length, 0: one a row. `selects`: selective attention, head 0's."""

    kind: str
    batch: int
    seq_len: int
    heads: int
    key_heads: int
    width: int
    v_width: int
    window: int | None
    documents: int
    selects: bool = False

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.key_heads}" if self.key_heads != self.heads else "")
        widths = f"D{self.width}" + (f"/{self.v_width}" if self.v_width != self.width else "")
        documents = f", documents of {self.documents}" if self.documents else ""
        kind = f"{self.kind} selective" if self.selects else self.kind
        return f"{kind} B{self.batch} T{self.seq_len} {heads} {widths}{documents}"


SINK = 4
_LONGEST_DENSE = 8192  # rows of which a mask of all pairs, and scores in float64, fit into memory
SHAPES = [
    *(Shape("swa", 16, 2048, 16, 16, width, width, 256, 0) for width in (64, 96, 128)),
    Shape("swa", 16, 2048, 16, 4, 96, 96, 256, 0),
    Shape("swa", 16, 2048, 16, 16, 96, 96, 256, 500),
    Shape("swa", 4, 8192, 16, 16, 128, 128, 256, 0),
    Shape("swa", 1, 32768, 16, 16, 96, 96, 256, 0),
    Shape("mla", 16, 2048, 16, 16, 192, 128, None, 0),
    Shape("mla", 16, 2048, 16, 16, 192, 128, None, 500),
    Shape("mla", 4, 8192, 16, 16, 192, 128, None, 0),
    Shape("mla", 4, 8192, 16, 16, 192, 128, None, 4000),
    Shape("mla", 16, 2048, 16, 16, 192, 128, None, 0, selects=True),
    Shape("mla", 16, 2048, 16, 16, 192, 128, None, 500, selects=True),
    Shape("mla", 4, 8192, 16, 16, 192, 128, None, 0, selects=True),
    Shape("mla", 1, 32768, 16, 16, 192, 128, None, 0, selects=True),
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_sdpa(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend):
            grouped = query.shape[2] != key.shape[2]
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend


def flash_attention_4(window: int | None) -> Attend:
    sides = (None, None) if window is None else (window - 1, 0)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func  # the package flash-attn-4

        return flash_attn_func(query, key, value, causal=True, window_size=sides)[0]

    return attend


def ways(shape: Shape, starts: Tensor, device: torch.device) -> dict[str, tuple[Attend, bool]]:
    """Path -> the function, and whether it computes this mask exactly; others are there to compare times."""
    scale = shape.width**-0.5

    def by(implementation: Implementation, mask: Mask) -> Attend:
        return lambda query, key, value: implementation.call(query, key, value, mask, scale)

    found: dict[str, tuple[Attend, bool]] = {}
    is_plain = shape.window is None and not shape.documents and not shape.selects
    if shape.selects:
        found["triton"] = (lambda *heads: selective_attention(*heads, selection_of(starts), scale)), True
        found["cudnn, causal"] = causal_sdpa(SDPBackend.CUDNN_ATTENTION), False
        return found
    if shape.window is not None:
        rule = WindowRule(starts.to(torch.int32) if shape.documents else None, shape.window, SINK)
        found["triton"] = by(WINDOW, rule), True
        found["cuda"] = by(HOPPER_WINDOW, rule), True
    elif shape.documents:
        bounds = starts.to(torch.int32), document_ends(starts).to(torch.int32)
        found["triton"] = by(DOCUMENT, DocumentRule(*bounds)), True
        found["cuda"] = by(HOPPER, DocumentRule(*bounds)), True
    else:
        found["cuda"] = by(HOPPER, None), True
    sink = SINK if shape.window else 0
    if shape.documents:
        found["flex"] = by(FLEX, block_mask(starts, shape.window, sink)), True
    else:
        found["flex"] = by(FLEX, block_mask_of_one_document(shape.seq_len, shape.window, sink, device)), True
    if not is_plain and shape.seq_len <= _LONGEST_DENSE:
        found["sdpa, mask"] = by(SDPA, dense_mask(starts, shape.window, sink)), True
    found["cudnn, causal"] = causal_sdpa(SDPBackend.CUDNN_ATTENTION), is_plain
    if is_plain:
        found["efficient, causal"] = causal_sdpa(SDPBackend.EFFICIENT_ATTENTION), True
    if not shape.documents:
        found["flash-attn-4, no sink"] = flash_attention_4(shape.window), is_plain
    return found


def selection_of(starts: Tensor) -> Selection:
    return Selection(SelectionRule(starts.to(torch.int32), document_ends(starts).to(torch.int32)), head=0)


def inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    query = torch.randn(shape.batch, shape.seq_len, shape.heads, shape.width, device=device, dtype=torch.bfloat16)
    if shape.width == shape.v_width:
        together = torch.randn(
            shape.batch, shape.seq_len, shape.heads + 2 * shape.key_heads, shape.width, device=device, dtype=query.dtype
        )
        parts = together.split([shape.heads, shape.key_heads, shape.key_heads], dim=2)
    else:
        sizes = (shape.batch, shape.seq_len, shape.key_heads)
        key = torch.randn(*sizes, shape.width, device=device, dtype=query.dtype)
        parts = (
            query,
            key,
            torch.randn(*sizes, 2 * shape.v_width, device=device, dtype=query.dtype)[..., shape.v_width :],
        )
    return [part.detach().requires_grad_() for part in parts]


def errors(shape: Shape, starts: Tensor, found: list[Tensor], given: list[Tensor], upstream: Tensor) -> list[float]:
    """Of the output and of the gradients: the first two rows, the first two key heads and what queries share them.

    Of selective attention the first row and all heads, since the selecting one has a gradient from each.
    """
    rows, group = slice(0, 1 if shape.selects else 2), shape.heads // shape.key_heads

    def part(x: Tensor, heads: int) -> Tensor:
        return x[rows, :, :heads].detach().double().transpose(1, 2).requires_grad_()

    heads = [shape.heads] * 3 if shape.selects else [2 * group, 2, 2]
    exact_in = [part(x, n) for x, n in zip(given, heads)]
    if shape.selects:
        selection, tokens_first = selection_of(starts[rows]), [x.transpose(1, 2) for x in exact_in]
        exact = reference_selective_attention(*tokens_first, selection, shape.width**-0.5).transpose(1, 2)
    else:
        mask = dense_mask(starts[rows], shape.window, SINK if shape.window else 0)
        exact = reference_attention(*exact_in, mask, shape.width**-0.5)
    gradients = torch.autograd.grad(exact, exact_in, part(upstream, heads[0]))
    pairs = zip(found, [exact, *gradients], [heads[0], *heads])
    return [((part(x, n) - y).norm() / y.norm()).item() for x, y, n in pairs]


def tried(shape: Shape, attend: Attend, is_exact: bool, given: list[Tensor], starts: Tensor) -> dict[str, float | str]:
    """Errors, where there is something to compare with."""
    out = attend(*given)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, given, upstream)
    longest = _LONGEST_DENSE // 4 if shape.selects else _LONGEST_DENSE
    if not is_exact or shape.seq_len > longest:
        return {}
    of_out, *of_gradients = errors(shape, starts, [out, *gradients], given, upstream)
    return {"error_out": of_out, "error_gradients": max(of_gradients)}


def measure(shape: Shape, path: str, replays: int, device: torch.device) -> dict[str, float | str]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    given = inputs(shape, device)
    length = shape.documents or 2 * shape.seq_len
    starts = document_starts((torch.rand(shape.batch, shape.seq_len, device=device) < 1 / length).cumsum(dim=1))
    starts = starts if shape.documents else torch.zeros_like(starts)
    attend, is_exact = ways(shape, starts, device)[path]
    found: dict[str, float | str] = {}
    try:
        found = tried(shape, attend, is_exact, given, starts)
        # Fresh ones: a graph that was made outside of the capture, and is there yet, would break it.
        given = [x.detach().requires_grad_() for x in given]
        with torch.no_grad():
            found["forward_ms"] = device_milliseconds(lambda: attend(*given), replays)
            upstream = torch.randn_like(attend(*given))
        found["both_ms"] = device_milliseconds(lambda: torch.autograd.grad(attend(*given), given, upstream), replays)
    except Exception as error:  # of whatever library; the other paths are measured all the same
        found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("swa", "mla"), help="blocks of this kind")
    parser.add_argument("--paths", nargs="+", help="default: all")
    parser.add_argument("--replays", type=int, default=7, help="of which a time is the median")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows: dict[str, dict[str, dict[str, float | str]]] = {}
    for shape in SHAPES:
        if arguments.only not in (None, shape.kind):
            continue
        for path in ways(shape, torch.zeros(shape.batch, shape.seq_len, dtype=torch.int64, device=device), device):
            if arguments.paths and path not in arguments.paths:
                continue
            row = rows.setdefault(str(shape), {})[path] = measure(shape, path, arguments.replays, device)
            figures = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            print(f"{shape!s:<45} {path:<22} {figures}", flush=True)
            torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
