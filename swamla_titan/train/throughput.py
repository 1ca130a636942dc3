"""Speed and memory of a run between two log lines."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swamla_titan.train.policies.data_wait import Interval

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
        self._waits: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Encloses waiting for the loader; one step follows."""
        start = time.perf_counter()
        before = self._event()
        yield
        waited = time.perf_counter() - start
        self._data += waited
        self._steps += 1
        if before:
            after = self._event()
            assert after is not None
            self._waits.append((waited, before, after))

    def _event(self) -> torch.cuda.Event | None:
        """A mark in what a GPU is given to do."""
        if self.device.type != "cuda" or not torch.cuda.is_initialized():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stalled(self) -> float:
        """Seconds that the device did nothing for want of data. A GPU may still be busy with earlier steps while their
        successor's data are waited for: between its two marks it was idle, and only that counts."""
        if self.device.type != "cuda":
            return self._data
        return sum(min(waited, before.elapsed_time(after) / 1000) for waited, before, after in self._waits)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Encloses work that is no training; what the device still computes is awaited first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Values for metrics.jsonl, averaged over the steps since the last call, which `interval` then holds. The
        device must be idle."""
        step_seconds = (time.perf_counter() - self._start - self._paused) / self._steps
        self.interval = Interval(self._steps, step_seconds * self._steps, self._stalled())
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
