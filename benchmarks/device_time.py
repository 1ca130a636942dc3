"""How long a GPU computes for something, however long its host takes to ask for it."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

_REPEATS = 10  # in a graph
_CACHE_BYTES = 2**28  # more than any GPU's L2 cache


def device_milliseconds(function: Callable[[], Any], replays: int = 7) -> float:
    """Median of a call's time with a cold L2 cache: of CUDA graphs of calls, less those of the clearing of the cache.

    Events around calls would time the host, where that is the slower: compiled code of operators in Python is, for
    tensors of some megabytes.
    """
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")

    def timed(body: Callable[[], Any]) -> float:
        for _ in range(3):  # compiles, and chooses kernels
            body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_REPEATS):
                body()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / _REPEATS)
        return statistics.median(times)

    def with_cold_cache() -> None:
        cache.zero_()
        function()

    return timed(with_cold_cache) - timed(cache.zero_)
