"""Time of a training step under several settings, in one launch, without checkpoints in between; and where it goes.

    python benchmarks/train_step.py --corpus corpus.jsonl --profile --runs base:16 base:16,kernels.attention=triton
    torchrun --nproc-per-node 2 benchmarks/train_step.py --corpus corpus.jsonl --runs \
        base:32/16 base:32/16,parallel.data_parallel=ddp base:32/16,parallel.tensor=2 base:32/4,parallel.pipeline=2

A run is FLAVOR:SEQUENCES[/MICRO_BATCH][,SECTION.KEY=VALUE...]: sequences a step over all ranks, at most MICRO_BATCH of
them (default: all) in a micro-batch of a rank. `wrapped=true` puts FSDP2 around the model of a single process, to
measure the wrapper. Setup, loader, model and step are the trainer's own. Bad steps are applied, without the policy that
judges them, unless fault_tolerance.skip_bad_steps=true. The host does not wait for the GPU between the steps that
count, which are the second half, as in the trainer between two log lines; data_ms is what it waits for the loader in
one of them.

first_step_s is the time from before the loader is opened, with data and configuration resolved, to the end of the first
step: build_state_s (model and optimizers), first_batch_s (the loader's processes start with it) and step_1_s, which
mostly compiles; before it lies set_up_s. `compilation` is what the process has compiled up to then, so first steps are
compared with one run a launch. Compiled code is kept in compile.cache_folder, or where TORCHINDUCTOR_CACHE_DIR says: a
new folder makes the start a cold one.

With --profile three more steps follow, and their kernels are summed up by kind, on rank 0, in milliseconds a step:
"exposed" is the time in which communication ran and no other kernel did, "busy" that in which any ran, "idle" the rest.
(The first of the three follows a pause, in which a GPU at its power limit rests; its kernels may be faster.) --top
lists the kernels that take longest, the longest times in which none ran, and the matmuls of each shape with their
TFLOP/s, of all three steps; and of each run but the first the kernels whose time differs most from the first run's. A
run that is listed again, to see how figures spread, is profiled once.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from swamla_titan.config import Config, Override, load_config
from swamla_titan.data import BatchLoader, StepBatch
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.launch.ranks import rank_info
from swamla_titan.optim import build_optimizer
from swamla_titan.parallel import data_parallel
from swamla_titan.parallel.compile import compilation
from swamla_titan.parallel.kernels import attention_choices, attention_summary
from swamla_titan.train.setup import Setup, set_up
from swamla_titan.train.step import RunState, TrainStep

PROFILED = 3  # steps
KINDS = {
    "communication": ("nccl", "multimem", "symm"),
    "products": ("nvjet", "gemm", "cutlass", "xmma"),
    "attention": ("flex", "sdpa", "cudnn", "fmha", "flash", "window_", "document_", "hopper_", "select"),
    "casts": ("float8_",),
    "optimizer": ("adam", "fusedoptimizer", "lpnorm", "_lerp_"),  # the last: AdamW and Muon by rules
    "fused": ("triton", "swiglu_", "_heads", "cross_entropy_rows"),
    "copies": ("copy", "memcpy", "split_with_sizes", "chunk_cat", "catarray", "memset"),
}


def configuration(plan: str, arguments: argparse.Namespace, folder: Path) -> Config:
    """The configuration of a run; its learning rate is constant after ten steps."""
    sequences, *overrides = plan.split(",")
    flavor, _, sequences = sequences.partition(":")
    batch, _, micro_batch = sequences.partition("/")
    path = folder / "config.toml"
    path.write_text(f"""
[job]
dump_folder = "{folder / "run"}"
[model]
flavor = "{flavor}"
max_seq_len = {arguments.seq_len}
[data]
source = "local"
path = "{arguments.corpus}"
num_workers = 1
[training]
seq_len = {arguments.seq_len}
local_batch_size = {micro_batch or batch}
global_batch_size = {batch}
steps = 1000
[optimizer]
lr = 3e-4
[lr_schedule]
warmup_steps = 10
min_lr_ratio = 1.0
[fault_tolerance]
skip_bad_steps = false
[validation]
interval = 0
fraction = 0.0
""")
    given = []
    for override in overrides:
        name, _, text = override.partition("=")
        if name != "wrapped":
            section, _, key = name.rpartition(".")
            given.append(Override(section, key, text))
    return load_config(path, given)


def wrap_alone(setup: Setup, state: RunState) -> None:
    """Put FSDP2 around the model of a single process, and build the optimizers of the wrapped weights."""
    config, world = setup.config, setup.world
    assert not state.ema, "wrapped=true: the average of the weights is one of those before they are wrapped"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (1,))
    for part in state.model.parts:
        data_parallel.wrap(part, config.parallel, mesh, part.compute_dtype)
    # In place, because the groups of the state hold this list.
    state.optimizers[:] = [
        build_optimizer(part, config.optimizer, world.stage_group, config.compile.enabled) for part in state.model.parts
    ]


class Stopwatch:
    """Times the start and the steps of a run; the host waits for the GPU only where a measurement begins or ends."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.half, self.steps, self.device = steps // 2, steps, device
        self.waits: list[float] = []
        self.begun = time.perf_counter()
        self.built = self.begun

    def wait_for_gpu(self) -> float:
        """The time at which the GPU is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def after_build(self) -> None:
        """Model and optimizers are built."""
        self.built = self.wait_for_gpu()

    def next(self, loader: Iterator[StepBatch]) -> StepBatch:
        """The next batch; remembers how long the host waited for it."""
        asked = time.perf_counter()
        batch = next(loader)
        self.waits.append(time.perf_counter() - asked)
        return batch

    def before(self, step: int) -> None:
        """Step number `step` (from 0) is about to be submitted."""
        if step <= self.half:
            self.begun_steady = self.wait_for_gpu()

    def after(self, step: int) -> None:
        """Step number `step` was submitted."""
        if step == 0:
            now = self.wait_for_gpu()
            self.start = {
                "first_step_s": now - self.begun,
                "build_state_s": self.built - self.begun,
                "first_batch_s": self.waits[0],
                "step_1_s": now - self.begun_steady,
                "compilation": str(compilation()),
            }
        elif step == self.steps - 1:
            self.step_seconds = (self.wait_for_gpu() - self.begun_steady) / (self.steps - self.half)


def measure(plan: str, arguments: argparse.Namespace, folder: Path, profiled: bool) -> dict[str, Any]:
    config = configuration(plan, arguments, folder)
    world = init_distributed(config.parallel)
    launched = time.perf_counter()
    setup = set_up(config, world)
    clock = Stopwatch(arguments.steps, world.device)
    with setup.open_loader() as loader:
        state = setup.build_state()
        if "wrapped=true" in plan:
            wrap_alone(setup, state)
        clock.after_build()
        take_step = TrainStep(setup.stage, world, state)
        losses = []
        for step in range(arguments.steps):
            batch = clock.next(loader)
            clock.before(step)
            losses.append(take_step(batch, step + 1).loss)
            clock.after(step)
        kernels = profile_steps(take_step, loader, arguments, losses) if profiled else {}
    memory = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    return {
        "attention": attention_summary(attention_choices(setup.config, world.device)),
        "seq_len": setup.config.training.seq_len,
        "step_ms": 1e3 * clock.step_seconds,
        "data_ms": 1e3 * statistics.mean(clock.waits[clock.half :]),  # of which one may be long
        "tokens_per_second": take_step.targets / clock.step_seconds,
        "memory_gib": world.all_reduce_max(memory),
        "set_up_s": clock.begun - launched,
        **clock.start,
        "losses": [round(loss.item(), 6) for loss in losses],
        **kernels,
    }


def profile_steps(
    take_step: TrainStep, loader: BatchLoader, arguments: argparse.Namespace, losses: list[torch.Tensor]
) -> dict[str, Any]:
    """Take PROFILED more steps; returns the summary of their kernels, on rank 0."""
    batch = next(loader)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds, record_shapes=arguments.top > 0) as profiler:
        torch.cuda.synchronize()
        for step in range(arguments.steps, arguments.steps + PROFILED):
            batch = batch if step == arguments.steps else next(loader)
            losses.append(take_step(batch, step + 1).loss)
        torch.cuda.synchronize()
    return summary(profiler, arguments.top) if take_step.world.is_rank_0 else {}


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words)), "other")


def summary(profiler: profile, top: int) -> dict[str, Any]:
    """Milliseconds a step of kernels by kind, and of communication with nothing beside it; with `top` by name too."""
    totals = dict.fromkeys([*KINDS, "other"], 0.0)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    kernels: dict[str, list[float]] = defaultdict(list)
    named: list[tuple[float, float, str]] = []
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA or event.name.startswith(("ProfilerStep", "## ")):
            continue
        if event.is_user_annotation:
            continue
        kind = kind_of(event.name)
        kernels[event.name].append((event.time_range.end - event.time_range.start) / 1e3)
        totals[kind] += (event.time_range.end - event.time_range.start) / 1e3
        spans[kind == "communication"].append((event.time_range.start, event.time_range.end))
        named.append((event.time_range.start, event.time_range.end, event.name))
    both = covered(spans[True] + spans[False])
    for name, each in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(each):8.2f} ms {len(each):5} x {name[:110]}")
    for idle, before, after in sorted(idle_times(named), reverse=True)[: top // 5]:
        print(f"{idle / 1e3:8.2f} ms of nothing between {before[:60]} and {after[:60]}")
    if top:
        print_matmuls(profiler)
    by_name = {name: sum(each) / PROFILED for name, each in kernels.items()}
    every = spans[True] + spans[False]
    took = max(end for _, end in every) - min(start for start, _ in every) if every else 0.0
    return {
        **{f"{kind}_ms": total / PROFILED for kind, total in totals.items()},
        "exposed_ms": (both - covered(spans[False])) / 1e3 / PROFILED,
        "busy_ms": both / 1e3 / PROFILED,
        "idle_ms": (took - both) / 1e3 / PROFILED,
        **({"kernels": by_name} if top else {}),
    }


def print_differences(first: dict[str, float], kernels: dict[str, float], top: int) -> None:
    """Print the kernels whose milliseconds a step differ most from those of the first run."""
    found = {name: kernels.get(name, 0.0) - first.get(name, 0.0) for name in {**first, **kernels}}
    print(f"{sum(found.values()):+8.2f} ms a step of kernels against the first run, of which")
    for name, difference in sorted(found.items(), key=lambda item: -abs(item[1]))[:top]:
        print(f"{difference:+8.2f} ms {name[:110]}")


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def print_matmuls(profiler: profile) -> None:
    """Print [M, K] x [K, N] of all matmuls: how often, how long in all, and how fast."""
    matmuls: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::_scaled_mm") and event.device_type == DeviceType.CPU:
            (m, k), (_, n) = event.input_shapes[event.name == "aten::addmm" :][:2]
            # Its own kernels only, because the profiler also attributes later launches of compiled code to it.
            own = [each.duration for each in event.kernels if kind_of(each.name) == "products"]
            matmuls[m, k, n].append(sum(own))
    for (m, k, n), each in sorted(matmuls.items(), key=lambda item: -sum(item[1])):
        rate = 2 * m * k * n * len(each) / sum(each) / 1e6 if sum(each) else 0.0
        print(f"{sum(each) / 1e3:8.2f} ms {len(each):5} x [{m}, {k}] x [{k}, {n}] at {rate:.0f} TFLOP/s")


def idle_times(spans: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """Lengths of the times that no interval covers, with the names of those around them."""
    found = []
    reached, last = float("inf"), ""
    for start, end, name in sorted(spans):
        if start > reached:
            found.append((start - reached, last, name))
        if not last or end > reached:
            reached, last = end, name
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="FLAVOR:SEQUENCES[/MICRO_BATCH][,SECTION.KEY=VALUE...]"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--top", type=int, default=0, help="with --profile: list so many kernels")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    arguments.corpus = arguments.corpus.resolve()
    results: dict[str, dict[str, Any]] = {}
    kernels: dict[str, dict[str, float]] = {}  # of each profiled run, by name
    with tempfile.TemporaryDirectory() as folder:
        for plan in arguments.runs:
            try:
                results[plan] = measure(plan, arguments, Path(folder), arguments.profile and plan not in results)
            except torch.cuda.OutOfMemoryError:
                if "RANK" in os.environ:  # the others may wait for this rank for ever; torchrun ends them
                    print(plan, "out of memory", flush=True)
                    os._exit(1)
                results[plan] = {"out_of_memory": True}
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if found := results[plan].pop("kernels", None):
                kernels[plan] = found
            if rank_info().rank == 0:
                if found and len(kernels) > 1:
                    print_differences(next(iter(kernels.values())), found, arguments.top)
                print(
                    plan, {k: round(v, 2) if isinstance(v, float) else v for k, v in results[plan].items()}, flush=True
                )
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1))
    destroy_distributed()


if __name__ == "__main__":
    main()
