"""Measures speed and memory between two log lines, and whether steps wait for data."""

import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from swamla_titan.config.mixture import data_of_sources
from swamla_titan.config.schedule import TrainingStage
from swamla_titan.config.sections import Data
from swamla_titan.data import Corpus
from swamla_titan.distributed.mesh import World
from swamla_titan.model.counts import training_flops_per_token
from swamla_titan.system.machine import cores
from swamla_titan.train.policy import Policy, Values

# Limits of the warning that steps wait for data.
_LEAST_SHARE = 0.05  # of the steps' time
_LEAST_STEPS = 10  # over which the share is computed
_REPEAT_AT = 1.5  # times the share of the last warning
_REPEAT_AFTER = 2000  # steps

# Dense bf16 peak of the tensor cores, FLOP/s, from the vendors' data sheets. Of several names whose words all occur in
# the device's name, the longest one counts.
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
    """Dense bf16 peak of a CUDA device in FLOP/s; None if it is not in the table or not a GPU."""
    if device.type != "cuda":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))  # full words, because an A1000 is not an A100
    known = [key for key in PEAK_BF16_FLOPS if words.issuperset(key.split())]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Interval:
    """The steps between two log lines, and their time in seconds, without validation and checkpoints.

    For `waited` of these seconds the device was idle because data were missing.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.steps + other.steps, self.seconds + other.seconds, self.waited + other.waited)


class Throughput(Policy):
    """Measures the steps since the last `metrics`, without what `pause` encloses (validation, checkpoints).

    MFU = training FLOPs a token x tokens/s of one GPU / its dense bf16 peak, where the FLOPs are those of
    `swamla_titan.model.counts`: three forward passes, sliding-window layers counted with window + sink keys and
    latent-attention layers with the causal half.
    """

    def __init__(self, device: torch.device, num_devices: int, flops_per_token: float, tokens_per_step: int) -> None:
        self.device = device
        self.num_devices = num_devices
        self.flops_per_token = flops_per_token
        self.tokens_per_step = tokens_per_step
        self.peak = peak_flops(device)
        self._reset()

    @classmethod
    def of(cls, stage: TrainingStage, world: World) -> "Throughput":
        """Of a run that begins with the steps of `stage`."""
        return cls(world.device, world.size, _flops_per_token(stage), stage.tokens_per_step)

    def begin_stage(self, stage: TrainingStage) -> None:
        """Count the next steps as those of `stage`."""
        self.flops_per_token, self.tokens_per_step = _flops_per_token(stage), stage.tokens_per_step

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._data = 0.0
        self._steps = self._tokens = 0
        self._flops = 0.0
        self._waits: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Encloses the wait for the loader before each step."""
        start = time.perf_counter()
        before = self._event()
        yield
        waited = time.perf_counter() - start
        self._data += waited
        self._steps += 1
        self._tokens += self.tokens_per_step
        self._flops += self.tokens_per_step * self.flops_per_token
        if before:
            after = self._event()
            assert after is not None
            self._waits.append((waited, before, after))

    def _event(self) -> torch.cuda.Event | None:
        """A CUDA event, recorded on the current stream."""
        if self.device.type != "cuda" or not torch.cuda.is_initialized():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stalled(self) -> float:
        """Seconds in which the device was idle because data were missing.

        While the host waits for a step's data, a GPU may still be busy with earlier steps. Between the two events it
        was idle, and only that time counts.
        """
        if self.device.type != "cuda":
            return self._data
        return sum(min(waited, before.elapsed_time(after) / 1000) for waited, before, after in self._waits)

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Leave out what this encloses. The device is idle before it, because the step was logged or will be saved."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def metrics(self) -> Values:
        """Values for metrics.jsonl, averaged over the steps since the last call, which `interval` then holds.

        The device must be idle.
        """
        step_seconds = (time.perf_counter() - self._start - self._paused) / self._steps
        self.interval = Interval(self._steps, step_seconds * self._steps, self._stalled())
        rate = self._tokens / (step_seconds * self._steps)
        values: Values = {
            "tokens_per_second": rate,
            "data_seconds": self._data / self._steps,
            "step_seconds": step_seconds,
            "memory_gib": self._peak_memory() / 2**30,
        }
        if self.device.type == "cuda":
            flops_per_gpu = self._flops / (step_seconds * self._steps) / self.num_devices
            values |= {"tokens_per_second_per_gpu": rate / self.num_devices, "tflops_per_gpu": flops_per_gpu / 1e12}
            if self.peak:
                values["mfu"] = flops_per_gpu / self.peak
        self._reset()
        return values

    def _peak_memory(self) -> float:
        """Peak bytes: allocated on the GPU since the last call; on a CPU the process's resident peak so far."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _flops_per_token(stage: TrainingStage) -> float:
    return training_flops_per_token(stage.config.model, stage.training.seq_len)


class DataWait:
    """Warns that steps wait for data: once, and again if it gets worse or after many steps."""

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._begun = False
        self._unjudged = Interval()  # since the last share was computed
        self._warned_share = 0.0
        self._since_warning = 0  # steps

    @classmethod
    def of(cls, data: Data, corpora: Sequence[Corpus], ranks: int) -> "DataWait":
        """For one of `ranks` ranks that read different sequences of `corpora`."""
        units = min(corpus.source.num_parts for corpus in corpora)
        return cls(data_wait_advice(data, units, streams=-(-data.streams // ranks), cores=cores_per_rank()))

    def warning(self, interval: Interval) -> str | None:
        """The warning that is due after an interval, or None. The first does not count, because loaders start in it."""
        if not self._begun:
            self._begun = True
            return None
        self._unjudged += interval
        if self._unjudged.steps < _LEAST_STEPS or self._unjudged.seconds <= 0:
            return None
        share = self._unjudged.waited / self._unjudged.seconds
        self._since_warning += self._unjudged.steps
        self._unjudged = Interval()
        is_worse = share > _REPEAT_AT * self._warned_share  # as the first one is
        if share <= _LEAST_SHARE or not (is_worse or self._since_warning >= _REPEAT_AFTER):
            return None
        self._warned_share, self._since_warning = share, 0
        return f"steps wait for data {share:.0%} of their time. {self._advice}"


def cores_per_rank() -> int:
    """Cores of this machine per rank on it."""
    return max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def data_wait_advice(data: Data, units: int, streams: int, cores: int) -> str:
    """Advice for a rank that waits for data, owns `streams` of the streams and has `cores` cores."""
    workers, most = data.num_workers, min(streams, cores)
    if workers == 0:
        first = "With data.num_workers = 0 data are read between the steps: set it to 1 or more, to read beside them"
    elif workers < most:
        which = f"there are {cores} cores per rank" if cores <= streams else f"a rank owns {streams} streams"
        first = f"Raise data.num_workers from {workers}, up to {most}: {which}"
    elif workers >= streams:
        first = f"Each stream of a rank has a loader process already: in a new run, raise data.streams ({data.streams})"
    else:
        first = (
            f"{workers} loader processes share {cores} cores per rank: give the job more cores, or fewer ranks a node"
        )
    further = []
    if units < data.streams:
        further.append(
            f"the data are in {units} units, which {data.streams} streams share: split them into more files, parquet "
            "into smaller row groups"
        )
    sources = data_of_sources(data).values()
    if any(each.source == "huggingface" and not os.path.isdir(os.path.expanduser(each.path)) for each in sources):
        further.append("a copy on a local disk needs no network")
    elif any(each.source != "builtin" for each in sources):
        further.append("if the cores are idle meanwhile, the storage is slow: copy the data to a local disk")
    return ". ".join(part[0].upper() + part[1:] for part in (first, *further))
