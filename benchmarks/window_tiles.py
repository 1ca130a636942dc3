"""Which tiles of the window kernels are fastest: each pass timed alone, at each width of head, on a GPU.

    python benchmarks/window_tiles.py [--widths 64 96 128] [--batch 16 --seq-len 2048 --heads 16]

Prints, for each width and pass, its settings from the fastest on, as (rows of queries, rows of keys, warps, stages,
registers) and milliseconds. The best ones belong into kernels/window_attention.py. Several processes compile at once.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from swamla_titan.kernels import window_attention
from swamla_titan.kernels.window_attention import Tiles

PASSES = ("window_forward", "window_grad_query", "window_grad_key_value")
BACKWARD = ("window_grad_query", "window_sum_far", "window_grad_key_value")
Job = tuple[int, str, Tiles]


def candidates() -> dict[str, list[Tiles]]:
    """Settings of each pass that are worth a try."""
    queries = [
        Tiles(*shape, *how)
        for shape in ((64, 32), (64, 64))
        for how in ((4, 2), (4, 3), (4, 2, 128), (4, 3, 128), (4, 2, 168))
    ]
    queries += [Tiles(128, keys, 8, stages, 128) for keys in (32, 64) for stages in (2, 3)]
    keys = [Tiles(*shape, *how) for shape in ((64, 64), (32, 64)) for how in ((4, 2), (4, 3), (4, 2, 168), (4, 3, 168))]
    keys += [Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2)]
    return dict(zip(PASSES, (queries, queries, keys)))


class _Nothing:
    """In place of a kernel that is not to be timed."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: None


def work_of(job: Job, batch: int, seq_len: int, heads: int) -> Callable[[], Any]:
    """What runs one pass alone, on numbers that are like those of training."""
    from swamla_titan.kernels import window_triton as kernels

    width, name, tiles = job
    together = torch.randn(batch, seq_len, 3 * heads, width, device="cuda", dtype=torch.bfloat16)
    query, key, value = together.split(heads, dim=2)
    rule = (None, 256, 4, width**-0.5)
    if name == "window_forward":
        window_attention.forward_tiles = lambda dtype, width: tiles
        return lambda: window_attention._forward(query, key, value, *rule)
    out, lse = window_attention._forward(query, key, value, *rule)
    upstream = torch.randn_like(out)
    other = Tiles(64, 64, 4, 1)
    both = (tiles, other) if name == "window_grad_query" else (other, tiles)
    window_attention.backward_tiles = lambda dtype, width: both
    if not _KERNELS:
        _KERNELS.update({each: getattr(kernels, each) for each in BACKWARD})
    for each in BACKWARD:
        belongs = each == name or (each, name) == ("window_sum_far", "window_grad_key_value")
        setattr(kernels, each, _KERNELS[each] if belongs else _Nothing())
    return lambda: window_attention._backward(upstream, query, key, value, rule[0], out, lse, *rule[1:])


_KERNELS: dict[str, Any] = {}


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
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--processes", type=int, default=12)
    arguments = parser.parse_args()
    shape = {"batch": arguments.batch, "seq_len": arguments.seq_len, "heads": arguments.heads}
    jobs = [(width, name, tiles) for width in arguments.widths for name in PASSES for tiles in candidates()[name]]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        wrong = list(pool.map(partial(compile_alone, **shape), jobs))
    found: dict[tuple[int, str], list[tuple[float, Tiles]]] = {}
    for job, problem in zip(jobs, wrong):
        if problem:
            print("left out", *job, problem)
            continue
        ms = do_bench(work_of(job, **shape), warmup=3, rep=20, return_mode="median")
        found.setdefault(job[:2], []).append((ms, job[2]))
    for (width, name), timed in found.items():
        settings = "  ".join(f"{tuple(tiles)} {ms:.3f}" for ms, tiles in sorted(timed, key=lambda each: each[0])[:6])
        print(f"D{width} {name:<21} {settings}", flush=True)


if __name__ == "__main__":
    main()
