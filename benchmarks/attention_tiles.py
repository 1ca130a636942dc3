"""Which tiles of our attention kernels are fastest: each pass timed alone, on a GPU.

    python benchmarks/attention_tiles.py [--kernels window documents selective] [--seq-len 2048 --batch 16]

`window` is the sliding window at heads of each of --widths, `documents` MLA's causal attention inside documents of 500
tokens at heads of 192 and 128, `selective` selective attention in sequences of one document at these. Prints, for each
pass, its settings from the fastest on, as (rows of queries, rows of keys, warps, stages, registers) and milliseconds.
The best ones belong into kernels/attention/window.py, document.py and selective.py. Several processes compile at once.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla_titan.kernels.attention import document as document_attention
from swamla_titan.kernels.attention import selective, selective_triton, window_triton
from swamla_titan.kernels.attention import window as window_attention
from swamla_titan.kernels.attention.masks import document_ends, document_starts
from swamla_titan.kernels.device import Tiles


class Kernel(NamedTuple):
    """A pass: the kernel's name, settings worth a try, and all kernels of the backward pass if it is one of them."""

    name: str
    tiles: list[Tiles]
    backward: tuple[str, ...] = ()


def window_kernels() -> list[Kernel]:
    """Many small programs win here."""
    queries = [
        Tiles(*shape, *how)
        for shape in ((64, 32), (64, 64))
        for how in ((4, 2), (4, 3), (4, 2, 128), (4, 3, 128), (4, 2, 168))
    ]
    queries += [Tiles(128, keys, 8, stages, 128) for keys in (32, 64) for stages in (2, 3)]
    keys = [Tiles(*shape, *how) for shape in ((64, 64), (32, 64)) for how in ((4, 2), (4, 3), (4, 2, 168), (4, 3, 168))]
    keys += [Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2)]
    backward = ("window_grad_query", "window_sum_far", "window_grad_key_value")
    return [
        Kernel("window_forward", queries),
        Kernel("window_grad_query", queries, backward),
        Kernel("window_grad_key_value", keys, backward),
    ]


def document_kernels() -> list[Kernel]:
    """Heads twice as wide, and as many tiles as documents are long."""
    forward = [Tiles(64, keys, 4, stages) for keys in (32, 64) for stages in (2, 3, 4)]
    forward += [Tiles(128, keys, 8, stages) for keys in (32, 64) for stages in (2, 3, 4)]
    queries = [Tiles(64, keys, warps, stages) for keys in (32, 64) for warps in (4, 8) for stages in (2, 3)]
    queries += [Tiles(64, 32, 4, 4), *(Tiles(128, 32, 8, stages) for stages in (2, 3)), Tiles(32, 32, 4, 3)]
    keys = [Tiles(rows, 64, warps, stages) for rows in (32, 64) for warps in (4, 8) for stages in (1, 2, 3)]
    keys += [Tiles(rows, 128, 8, stages) for rows in (32, 64) for stages in (1, 2)]
    keys += [Tiles(rows, 32, 4, stages) for rows in (32, 64) for stages in (2, 3)]
    backward = ("document_grad_query", "document_grad_key_value")
    return [
        Kernel("document_forward", forward),
        Kernel("document_grad_query", queries, backward),
        Kernel("document_grad_key_value", keys, backward),
    ]


def selective_kernels() -> list[Kernel]:
    """As documents, and three kernels of one head, of which each tile is visited once for all heads."""
    names = "select_keys", "selective_forward", "selective_grad_query", "selective_grad_key_value", "selection_grad"
    names = *names, "grad_selected", "grad_selecting"
    forward, queries, keys = (kernel.tiles for kernel in document_kernels())
    one_head = [Tiles(rows, keys, 4, stages) for rows in (32, 64) for keys in (32, 64) for stages in (1, 2, 3)]
    one_head += [Tiles(128, keys, 8, stages) for keys in (32, 64) for stages in (1, 2)]
    pairs = [Tiles(*sides, 4, stages) for sides in ((64, 64), (64, 32), (32, 64)) for stages in (1, 2, 3)]
    pairs += [Tiles(*sides, 8, stages) for sides in ((128, 64), (64, 128), (128, 128), (64, 64)) for stages in (1, 2)]
    tiles = one_head, forward, queries, keys, pairs, one_head, one_head
    return [Kernel(name, settings, names) for name, settings in zip(names, tiles)]


class Job(NamedTuple):
    """One setting of one pass."""

    width: int
    kernel: Kernel
    tiles: Tiles


class _Nothing:
    """In place of a kernel that is not to be timed."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: None


_KERNELS: dict[str, Any] = {}
_WINDOW_TILES, _DOCUMENT_TILES = window_attention.forward_tiles, document_attention.FORWARD  # those in use
_OTHER = Tiles(64, 64, 4, 1)  # of the pass that is not timed


def leave_alone(module: Any, job: Job) -> None:
    """Nothing of a backward pass is launched but the kernel that is timed, and what sums its far keys."""
    timed = job.kernel.name
    for each in job.kernel.backward:
        kernel = _KERNELS.setdefault(each, getattr(module, each))
        belongs = each == timed or (each, timed) == ("window_sum_far", "window_grad_key_value")
        setattr(module, each, kernel if belongs else _Nothing())


def work_of(job: Job, batch: int, seq_len: int, heads: int) -> Callable[[], Any]:
    """What runs one pass alone, on numbers that are like those of training."""
    both = (_OTHER, job.tiles) if job.kernel.name.endswith("key_value") else (job.tiles, _OTHER)
    if job.kernel in selective_kernels():
        return selective_work(job, batch, seq_len, heads)
    make = window_work if job.kernel.name.startswith("window") else document_work
    return make(job, both, batch, seq_len, heads)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def window_work(job: Job, both: tuple[Tiles, Tiles], batch: int, seq_len: int, heads: int) -> Callable[[], Any]:
    query, key, value = randn(batch, seq_len, 3 * heads, job.width).split(heads, dim=2)
    rule = (None, 256, 4, job.width**-0.5)
    window_attention.forward_tiles = _WINDOW_TILES
    if not job.kernel.backward:
        window_attention.forward_tiles = lambda dtype, width: job.tiles
        return lambda: window_attention._forward(query, key, value, *rule)
    out, lse = window_attention._forward(query, key, value, *rule)
    upstream = torch.randn_like(out)
    window_attention.backward_tiles = lambda dtype, width: both
    leave_alone(window_triton, job)
    return lambda: window_attention._backward(upstream, query, key, value, rule[0], out, lse, *rule[1:])


def document_work(job: Job, both: tuple[Tiles, Tiles], batch: int, seq_len: int, heads: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    query, key = (randn(batch, seq_len, heads, 192) for _ in range(2))
    value = randn(batch, seq_len, heads, 256)[..., 128:]
    starts = document_starts((torch.rand(batch, seq_len, device="cuda") < 1 / 500).cumsum(dim=1))
    bounds = starts.to(torch.int32), document_ends(starts).to(torch.int32)
    inputs = query, key, value, *bounds
    document_attention.FORWARD = _DOCUMENT_TILES
    if not job.kernel.backward:
        document_attention.FORWARD = job.tiles
        return lambda: document_attention.run_forward(*inputs, 192**-0.5)
    out, lse = document_attention.run_forward(*inputs, 192**-0.5)
    upstream = torch.randn_like(out)
    document_attention.BACKWARD = both
    leave_alone(document_attention, job)
    return lambda: document_attention.run_backward(upstream, *inputs, out, lse, 192**-0.5)


_SELECTIVE_TILES = {name: getattr(selective, name) for name in ("FORWARD", "BACKWARD", "SELECTION")}


def selective_work(job: Job, batch: int, seq_len: int, heads: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    query, key = (randn(batch, seq_len, heads, 192) for _ in range(2))
    value = randn(batch, seq_len, heads, 256)[..., 128:]
    starts = torch.zeros(1, seq_len, device="cuda", dtype=torch.int32)
    inputs, rest = (query, key, value, None, None), (starts, torch.full_like(starts, seq_len))
    options = [0], 0, 192**-0.5
    for name in job.kernel.backward:
        setattr(selective_triton, name, _KERNELS.setdefault(name, getattr(selective_triton, name)))
    for name, tiles in _SELECTIVE_TILES.items():
        setattr(selective, name, tiles)
    out, lse, sums = selective._forward(*inputs, None, *rest, *options)
    upstream, name = torch.randn_like(out), job.kernel.name
    leave_alone(selective_triton, job)
    if name == "selective_forward":
        selective.FORWARD = job.tiles
    elif name in ("selective_grad_query", "selective_grad_key_value"):
        selective.BACKWARD = job.tiles, job.tiles
    else:
        selective.SELECTION = job.tiles, job.tiles
    if name in ("select_keys", "selective_forward"):
        return lambda: selective._forward(*inputs, None, *rest, *options)
    return lambda: selective._backward(upstream, *inputs, *rest, out, lse, sums, *options)


def compile_alone(job: Job, **shape: int) -> str | None:
    """Leaves the code in Triton's cache; what is wrong with the setting, if anything."""
    try:
        work_of(job, **shape)()
        torch.cuda.synchronize()
    except Exception as error:  # of the compiler, of the driver: the setting is not for this GPU
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return None


def main() -> None:
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["window", "documents", "selective"]
    parser.add_argument("--kernels", nargs="+", choices=known, default=known)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128], help="of heads under a window")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--processes", type=int, default=12)
    arguments = parser.parse_args()
    shape = {"batch": arguments.batch, "seq_len": arguments.seq_len, "heads": arguments.heads}
    passes: list[tuple[int, Kernel]] = []
    if "window" in arguments.kernels:
        passes += [(width, kernel) for width in arguments.widths for kernel in window_kernels()]
    if "documents" in arguments.kernels:
        passes += [(192, kernel) for kernel in document_kernels()]
    if "selective" in arguments.kernels:
        passes += [(192, kernel) for kernel in selective_kernels()]
    jobs = [Job(width, kernel, tiles) for width, kernel in passes for tiles in kernel.tiles]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        wrong = list(pool.map(partial(compile_alone, **shape), jobs))
    found: dict[tuple[int, str], list[tuple[float, Tiles]]] = {}
    for job, problem in zip(jobs, wrong):
        if problem:
            print("left out", job.width, job.kernel.name, tuple(job.tiles), problem)
            continue
        ms = do_bench(work_of(job, **shape), warmup=3, rep=20, return_mode="median")
        found.setdefault((job.width, job.kernel.name), []).append((ms, job.tiles))
    for (width, name), timed in found.items():
        settings = "  ".join(f"{tuple(tiles)} {ms:.3f}" for ms, tiles in sorted(timed, key=lambda each: each[0])[:6])
        print(f"D{width} {name:<23} {settings}", flush=True)


if __name__ == "__main__":
    main()
