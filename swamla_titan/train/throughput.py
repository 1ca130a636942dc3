"""Speed and memory of a run between two log lines."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 peak of the matrix units, FLOP/s, from the vendors' data sheets. The longest name whose words all occur
# counts.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a CUDA device in FLOP/s; None if it is not in the table or is no GPU."""
    if device.type != "cuda":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))  # whole words: an A1000 is no A100
    known = [key for key in PEAK_BF16_FLOPS if words.issuperset(key.split())]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


class Throughput:
    """Measures the steps since the last `read`, leaving out what `paused` encloses (validation, checkpoints).

    MFU = training FLOPs a token x tokens/s of one GPU / its dense bf16 peak, where the FLOPs are those of
    `swamla_titan.model.flops`: three forward passes, sliding-window layers counted with window + sink keys and
    latent-attention layers with the causal half.
    """

    def __init__(self, device: torch.device, num_devices: int, flops_per_token: float, tokens_per_step: int) -> None:
        self.device = device
        self.num_devices = num_devices
        self.flops_per_token = flops_per_token
        self.tokens_per_step = tokens_per_step
        self.peak = peak_flops(device)
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._data = 0.0
        self._steps = 0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Encloses waiting for the loader; one step follows."""
        start = time.perf_counter()
        yield
        self._data += time.perf_counter() - start
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Encloses work that is no training; what the device still computes is awaited first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Values for metrics.jsonl, averaged over the steps since the last call. The device must be idle."""
        step_seconds = (time.perf_counter() - self._start - self._paused) / self._steps
        rate = self.tokens_per_step / step_seconds
        values = {
            "tokens_per_second": rate,
            "data_seconds": self._data / self._steps,
            "step_seconds": step_seconds,
            "memory_gib": self._peak_memory() / 2**30,
        }
        if self.device.type == "cuda":
            per_gpu = rate / self.num_devices
            values |= {"tokens_per_second_per_gpu": per_gpu, "tflops_per_gpu": per_gpu * self.flops_per_token / 1e12}
            if self.peak:
                values["mfu"] = per_gpu * self.flops_per_token / self.peak
        self._reset()
        return values

    def _peak_memory(self) -> float:
        """Bytes: the device's allocated peak since the last call; on a CPU the process's resident peak so far."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
