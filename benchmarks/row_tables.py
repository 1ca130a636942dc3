"""Time that a row table takes of a step: look-up, backward, merge and norm of its gradient, and Adam of its rows.

    python benchmarks/row_tables.py                                  # 100M rows of 64, 32,768 tokens x 16 look-ups
    torchrun --nproc-per-node 4 benchmarks/row_tables.py             # its rows shared by four ranks
    python benchmarks/row_tables.py --host --rows 60000000           # in the memory of the host
    python benchmarks/row_tables.py --device cpu --rows 10000 --tokens 64 --steps 3

Rows are drawn so that a share of the look-ups falls on a few rows, as n-grams of text do (--common). `host` is the
time until the last launch returns: where it is near `step`, the host waits or is the bottleneck. The last table has the
medians.

With --host the table is in the memory of the host. Look-up and update then read and write rows over PCIe; with
--model-ms the rows of the next step are read ahead while the device does nothing for so long, as in training.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swamla_titan.config.sections import Optimizer, Parallel
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.model.row_table import RowRequest, RowTable, look_up, request_rows
from swamla_titan.optim import AveragedWeights, build_optimizer, clip_divisor, gradient_norm
from swamla_titan.parallel.row_tables import shard_row_tables

CYCLES_A_MS = 1_900_000  # of an H200, or a bit less
PHASES = ("look up", "model", "backward", "merge and norm", "average", "update")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32768, help="of this rank, a step")
    parser.add_argument("--lookups", type=int, default=16, help="a token")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--common", type=float, default=0.3, help="share of the look-ups that a thousandth of rows has")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the update; on a GPU that of --all-rows is"
    )
    parser.add_argument("--all-rows", action="store_true", help="optimizer.lazy_tables = false")
    parser.add_argument("--ema", action="store_true", help="also keep an average of the table")
    parser.add_argument("--host", action="store_true", help="parallel.tables_on_host = true")
    parser.add_argument(
        "--model-ms", type=float, default=0.0, help="time that passes between look-up and backward; rows are read ahead"
    )
    parser.add_argument("--step-ms", type=float, default=300.0, help="of the model without the table, for the share")
    return parser.parse_args()


class Clock:
    """Times of consecutive phases on a device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def phases(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:])
        if self.is_cuda:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1000 * (end - begin) for begin, end in pairs]


def drawn(options: argparse.Namespace, device: torch.device, seed: int) -> Tensor:
    """Indices [tokens of a micro-batch, look-ups]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = options.tokens // options.micro_batches, options.lookups
    common = torch.rand(shape, device=device, generator=generator) < options.common
    few = max(1, options.rows // 1000)
    indices = torch.randint(0, options.rows, shape, device=device, generator=generator)
    return torch.where(common, indices % few, indices)


def main() -> None:
    options = arguments()
    world = init_distributed(Parallel())
    device = torch.device(options.device, world.device.index) if options.device == "cuda" else torch.device("cpu")
    model = nn.Module()
    with torch.device("meta"):
        model.table = RowTable(options.rows, options.width)
    begin = time.perf_counter()
    shard_row_tables(model, Parallel(tables_on_host=options.host), world)
    model.to_empty(device=device)
    table: RowTable = model.table
    with torch.no_grad():
        local(table.weight).normal_(std=0.02)
    config = Optimizer(lazy_tables=not options.all_rows)
    optimizer = build_optimizer(model, config, world.stage_group, compiled=not options.eager)
    average = AveragedWeights([model], 0.999, not options.eager, config.lazy_tables) if options.ema else None
    if average:
        average.restart()
    made = time.perf_counter() - begin
    bad = torch.zeros((), device=device)
    dtype = getattr(torch, options.dtype)
    reduce: Callable[[Tensor], Tensor] | None = _summed if world.size > 1 else None

    def drawn_for(number: int) -> list[Tensor]:
        return [drawn(options, device, number * 1000 + i * 100 + world.rank) for i in range(options.micro_batches)]

    def requests(batches: list[Tensor]) -> tuple[list[RowRequest], list[Tensor]]:
        """As look_ups_ahead makes them, but of all micro-batches at once."""
        with table.placement.ahead():
            made = [request_rows([table], [indices]) for indices in batches]
            tensors = [tensor for each in made for tensor in each.rows()]
            if options.model_ms:
                tensors += [tensor for each in made for tensor in each.read_ahead([table])]
        return made, tensors

    following = requests(drawn_for(0))

    def step(number: int) -> tuple[list[float], float]:
        nonlocal following
        batches = drawn_for(number + 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock, begin = Clock(device), time.perf_counter()
        clock.mark()
        asked, tensors = following
        table.placement.hand_over(tensors)
        found = [look_up([table], request, dtype)[0] for request in asked]
        clock.mark()
        following = requests(batches)
        if options.model_ms:
            torch.cuda._sleep(int(options.model_ms * CYCLES_A_MS))
        clock.mark()
        for rows in found:
            rows.backward(rows.detach())
        clock.mark()
        table.gradient.merge()
        norm = gradient_norm([(table.gradient.sums, 1.0)], reduce)
        clock.mark()
        if average:
            average.before_update(bad)
            average.update(number + 1, bad)
        clock.mark()
        optimizer.step(config.lr, clip_divisor(norm, 1.0), bad)
        optimizer.zero_grad()
        clock.mark()
        host = 1000 * (time.perf_counter() - begin)
        return clock.phases(), host

    measured = [step(number) for number in range(options.steps + 3)][3:]
    if world.is_rank_0:
        report(options, world, [phases for phases, _ in measured], [host for _, host in measured])
        print(f"{'made in s':<16}{made:>9.3f}")
        if device.type == "cuda":
            print(f"{'peak GiB':<16}{torch.cuda.max_memory_allocated() / 2**30:>9.3f}")
    destroy_distributed()


def _summed(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value


def report(options: argparse.Namespace, world: World, phases: list[list[float]], hosts: list[float]) -> None:
    """The table, of rank 0."""
    medians = [statistics.median(each) for each in zip(*phases)]
    model = PHASES.index("model")
    total = statistics.median(sum(each) - each[model] for each in phases)
    lookups = options.tokens * options.lookups
    print(f"{options.rows:,} rows of {options.width} on {world.size} rank(s), {lookups:,} look-ups a step and rank")
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'phase':<16}{'ms':>9}")
    for name, value in zip(PHASES, medians):
        print(f"{name:<16}{value:>9.3f}")
    print(f"{'sum':<16}{total:>9.3f}   {total / options.step_ms:.2%} of {options.step_ms:g} ms")
    print(f"{'host':<16}{statistics.median(hosts):>9.3f}")


if __name__ == "__main__":
    main()
