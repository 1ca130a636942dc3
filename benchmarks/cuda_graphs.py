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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_step import configuration
from swamla_titan.data import MicroBatch, micro_batches
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.train.setup import Setup, set_up
from swamla_titan.train.step import TrainStep

WARM = 4  # steps before the capture, which compile


def batches_of(setup: Setup, steps: int) -> list[MicroBatch]:
    """The batches of so many steps, on the device."""
    found = []
    with setup.open_loader() as loader:
        for _ in range(steps):
            [batch] = micro_batches(next(loader), setup.config.training.global_batch_size, 1)
            found.append(batch.to(setup.world.device))
    return found


def tensors_of(batch: MicroBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.tokens, batch.targets, batch.document_ids


class Passes:
    """Forward and backward passes over a batch: launched, or once captured replayed from a graph."""

    def __init__(self, take_step: TrainStep, batch: MicroBatch) -> None:
        self.model, self.targets = take_step.state.model, take_step.targets
        self.parameters = [parameter for part in self.model.parts for parameter in part.parameters()]
        self.place = MicroBatch(
            *(None if x is None else x.clone() for x in tensors_of(batch)), sequences=batch.sequences
        )
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The loss of a batch; parameters have its gradients."""
        for target, source in zip(tensors_of(self.place), tensors_of(batch)):
            if target is not None:
                target.copy_(source)
        if self.graph is None:
            return self.model.train_step([self.place], self.targets)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient  # the step has dropped it; each replay overwrites it
        return self.loss.clone()  # and the loss

    def capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.model.train_step([self.place], self.targets)
        self.gradients = [parameter.grad for parameter in self.parameters]


def measure(setup: Setup, batches: list[MicroBatch], is_graph: bool) -> tuple[float, ...]:
    """Milliseconds a step, the first and the last loss after WARM steps, and GiB."""
    torch._dynamo.reset()
    take_step = TrainStep(setup.stage, setup.world, setup.build_state())
    passes = Passes(take_step, batches[0])
    half = (len(batches) + WARM) // 2
    for number, batch in enumerate(batches):
        if number in (WARM, half):
            torch.cuda.synchronize()
            begun = time.perf_counter()
        if number == WARM and is_graph:
            passes.capture()
        loss = take_step.update(passes(batch), number + 1).loss
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
            setup = set_up(config, init_distributed(config.parallel))
            batches = batches_of(setup, WARM + arguments.steps)
            for is_graph in (False, True):
                torch.cuda.reset_peak_memory_stats()
                kind = "graph" if is_graph else "launches"
                try:
                    took, first, last, memory = measure(setup, batches, is_graph)
                    losses = f"losses {first:.6f} {last:.6f}"
                    print(f"{plan:12} {kind:8} {took:8.2f} ms  {losses}  {memory:6.1f} GiB", flush=True)
                except RuntimeError as error:  # out of memory, or a call that cannot be captured
                    print(f"{plan:12} {kind:8} {str(error).splitlines()[0][:120]}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    destroy_distributed()


if __name__ == "__main__":
    main()
