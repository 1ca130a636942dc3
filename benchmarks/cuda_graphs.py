"""Would CUDA graphs pay? Steps whose kernels are launched one by one, and steps that replay forward and backward pass.

    python benchmarks/cuda_graphs.py --corpus corpus.jsonl --runs debug:8 small:2 small:8 base:16

A run is FLAVOR:SEQUENCES[,SECTION.KEY=VALUE...], in one micro-batch on one GPU. Both kinds of steps take the same
batches from the same weights, so their losses are the same until training has made more of the last bits. Clipping and
optimizer are launched in both. Prints ms a step, the losses of the first replayed step and of the last one, and GiB of
memory, in which a graph holds what its kernels use.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_step import configuration
from swamla_titan.config import Config
from swamla_titan.data import BatchLoader, MicroBatch, micro_batches
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.optim import build_optimizer, clip_gradients, set_learning_rate
from swamla_titan.parallel.compile import warm_compiler
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.numerics import set_numerics
from swamla_titan.train.open_data import open_data

WARM = 4  # steps before the capture, which compile


def batches_of(config: Config, world: World, steps: int) -> tuple[Config, list[MicroBatch]]:
    config, corpus, _ = open_data(config)
    size = config.training.global_batch_size
    found = []
    with BatchLoader(
        corpus, seq_len=config.training.seq_len, global_batch_size=size, rank=world.data_rank, world_size=1
    ) as loader:
        for _ in range(steps):
            [batch] = micro_batches(next(loader), size, 1)
            found.append(batch.to(world.device))
    return config, found


def parts_of(batch: MicroBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.tokens, batch.targets, batch.document_ids


def measure(config: Config, world: World, batches: list[MicroBatch], is_graph: bool) -> tuple[float, ...]:
    """Milliseconds a step, the first and the last loss after WARM steps, and GiB."""
    torch._dynamo.reset()
    model = ParallelModel(config, world)
    model.init_weights(config.job.seed)
    optimizer = build_optimizer(model.parts[0], config.optimizer, compiled=config.compile.enabled)
    tokens = config.training.global_batch_size * config.training.seq_len
    place = MicroBatch(*(None if x is None else x.clone() for x in parts_of(batches[0])), rows=batches[0].rows)

    def passes() -> torch.Tensor:
        return model.train_step([place], tokens)

    def step(batch: MicroBatch, passes: Callable[[], torch.Tensor], keep: bool) -> torch.Tensor:
        for target, source in zip(parts_of(place), parts_of(batch)):
            if target is not None:
                target.copy_(source)
        loss = passes()
        norm = model.gradient_norm()
        set_learning_rate(optimizer, 3e-4)
        clip_gradients(optimizer, norm, config.training.max_grad_norm)
        optimizer.step()
        if not keep:
            optimizer.zero_grad()
        return loss

    for batch in batches[:WARM]:
        step(batch, passes, keep=False)
    torch.cuda.synchronize()
    run = passes
    if is_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = passes()  # leaves its gradients where each replay writes them anew

        def run() -> torch.Tensor:
            graph.replay()
            return replayed

    half = (len(batches) + WARM) // 2
    for number, batch in enumerate(batches[WARM:], WARM):
        if number == half:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        loss = step(batch, run, keep=is_graph).clone()  # a graph writes each into the same place
        if number == WARM:
            first = loss
    torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - begun) / (len(batches) - half)
    return milliseconds, first.item(), loss.item(), torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument("--runs", nargs="+", required=True, metavar="FLAVOR:SEQUENCES[,SECTION.KEY=VALUE...]")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    arguments.corpus = arguments.corpus.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for plan in arguments.runs:
            config = configuration(plan, arguments, Path(folder))
            world = init_distributed(config.parallel)
            warm_compiler(config.compile, world.device)
            set_numerics(config, world.device, world.rank)
            config, batches = batches_of(config, world, WARM + arguments.steps)
            for is_graph in (False, True):
                torch.cuda.reset_peak_memory_stats()
                kind = "graph" if is_graph else "launches"
                try:
                    took, first, last, memory = measure(config, world, batches, is_graph)
                    losses = f"losses {first:.6f} {last:.6f}"
                    print(f"{plan:12} {kind:8} {took:8.2f} ms  {losses}  {memory:6.1f} GiB", flush=True)
                except RuntimeError as error:  # out of memory, or a call that cannot be captured
                    print(f"{plan:12} {kind:8} {str(error).splitlines()[0][:120]}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    destroy_distributed()


if __name__ == "__main__":
    main()
