"""`plan`: mesh, batch, shards and memory of a configuration on a number of ranks, without processes or GPUs.

The run's own code builds and shards the model of some ranks, on the meta device in a fake process group, and the result
is counted. These are the first and the last rank of each pipeline coordinate, because where shards are uneven the first
rank holds the largest and the last rank the smallest.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from swamla_titan.config import Config
from swamla_titan.config.schedule import Schedule, TrainingStage
from swamla_titan.config.sections import Parallel
from swamla_titan.data import distinct_steps, micro_batch_size, sequence_order, sequences_per_rank
from swamla_titan.distributed.degrees import DIMENSIONS, Degrees, fit_degrees
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import ELSEWHERE, World, fake_world
from swamla_titan.kernels.attention.dispatch import Choice as AttentionChoice
from swamla_titan.launch.process_group import device_here
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.branch import Attention
from swamla_titan.parallel.context import exchanged_bytes
from swamla_titan.parallel.float8 import float8_coverage, resolve_auto, saved_by_float8_moments, validate_float8
from swamla_titan.parallel.kernels import attention_choices
from swamla_titan.parallel.model_parts import build_parts
from swamla_titan.parallel.pipeline import ModelStage, Pipeline, costs_of_stages
from swamla_titan.parallel.sequence_layout import SequenceLayout, Traffic
from swamla_titan.parallel.stages import (
    Order,
    bubble_share,
    most_in_flight,
    order_of,
    runnable_micro_batches,
    stages_of_rank,
)
from swamla_titan.quantization.coverage import LinearCoverage
from swamla_titan.tools.activations import block_bytes, recomputed_bytes
from swamla_titan.tools.memory import InFlight, Memory, memory_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Neighbours:
    """A dimension of the mesh, and the ranks of rank 0's group along it."""

    dimension: str
    ranks: list[int]


@dataclass(frozen=True)
class Batch:
    """How steps are divided: each has from `fewest` to `most` micro-batches, as many on each rank.

    For these a rank reads from `least_read` to `most_read` sequences.
    """

    micro_batch_size: int  # sequences
    fewest: int
    most: int
    least_read: int
    most_read: int


@dataclass(frozen=True)
class Holding:
    """One rank's shards of the parameters, and its memory."""

    rank: int
    shapes: dict[str, tuple[Shape, Shape]]  # of each parameter in full, and of this rank's shard
    memory: Memory
    saved_by_float8_moments: int  # of the optimizer's state


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the schedule: its batches, its pipeline's order, and the first and last rank of each coordinate."""

    stage: TrainingStage
    batch: Batch
    order: Order
    holdings: list[Holding]

    @property
    def worst(self) -> Holding:
        """The rank that needs the most memory."""
        return max(self.holdings, key=lambda holding: holding.memory.total)


@dataclass(frozen=True)
class Plan:
    """The result of `plan`, for the stage that needs the most memory; `config` is its configuration.

    `config` has the tokenizer's vocabulary, `stages` all stages of the run.
    """

    config: Config
    stages: list[PlannedStage]
    degrees: Degrees
    mesh: list[Neighbours]
    batch: Batch
    key_exchanges: dict[str, Traffic]  # between context ranks, of a layer of each kind: one pass over a micro-batch
    bubble: float | None  # share of the ranks' time; None without a pipeline
    holdings: list[Holding]  # of the first and last rank of each pipeline coordinate
    coverage: list[LinearCoverage]  # by float8.recipe
    choices: list[str]  # how "auto" was resolved
    attention: dict[str, AttentionChoice]  # of each kind of block, on the device here

    @property
    def worst(self) -> Holding:
        """The rank that needs the most memory."""
        return max(self.holdings, key=lambda holding: holding.memory.total)


def ranks_asked_for(parallel: Parallel) -> int:
    """The product of the degrees of [parallel], where -1 (all ranks that are left) counts as 1."""
    return math.prod(max(getattr(parallel, each.key), 1) for each in DIMENSIONS)


def plan(config: Config, ranks: int) -> Plan:
    """Plan a configuration on `ranks` ranks; its vocabulary must be known.

    This process must be in no process group. Raises UserError where the run itself would because of the layout, but not
    because of what this machine lacks, such as GPUs.
    """
    degrees = fit_degrees(config.parallel, ranks)
    config, choices = resolve_auto(config, World.planned(degrees, ELSEWHERE))
    validate_float8(config, ELSEWHERE, degrees)
    schedule = Schedule.of(config)
    mesh: list[Neighbours] = []
    planned: list[PlannedStage] = []
    for rank in itertools.chain.from_iterable(ends_of_coordinates(degrees)):
        with fake_world(degrees, config.parallel.data_parallel, rank) as world:
            parts = build_parts(_for_any_machine(config), world)
            if rank == 0:
                mesh = list(_neighbours(world))
                planned = [_planned(stage, schedule, world, parts) for stage in schedule.stages]
            shapes, saved = _shapes(parts), saved_by_float8_moments(parts, config)
            for each in planned:
                each.holdings.append(Holding(rank, shapes, _memory(parts, each, schedule, world), saved))
    most = max(planned, key=lambda each: each.worst.memory.total)
    bubble = None
    if degrees.pipeline > 1:
        bubble = bubble_share(most.order, [cost.operations for cost in costs_of_stages(schedule)])
    config, batch = most.stage.config, most.batch
    exchanges = key_exchanges(config, degrees, batch.micro_batch_size)
    return Plan(
        config=config,
        stages=planned,
        degrees=degrees,
        mesh=mesh,
        batch=batch,
        key_exchanges=exchanges,
        bubble=bubble,
        holdings=most.holdings,
        coverage=float8_coverage(config),
        choices=choices,
        attention=attention_choices(config, device_here()),
    )


def memory_at(config: Config, ranks: int, rank: int) -> Memory:
    """The most memory of one rank in any stage, as `plan` counts it; the configuration must have no "auto" left."""
    degrees, schedule = fit_degrees(config.parallel, ranks), Schedule.of(config)
    validate_float8(config, ELSEWHERE, degrees)
    with fake_world(degrees, config.parallel.data_parallel, rank) as world:
        parts = build_parts(_for_any_machine(config), world)
        planned = [_planned(stage, schedule, world, parts) for stage in schedule.stages]
        return max((_memory(parts, each, schedule, world) for each in planned), key=lambda memory: memory.total)


def _planned(stage: TrainingStage, schedule: Schedule, world: World, parts: list[SWAMLAModel]) -> PlannedStage:
    """A stage without holdings yet; `parts`: those of rank 0, or of any rank of a pipeline."""
    batch, laid_out = batch_of(stage, world.degrees), _for_any_machine(stage.config)
    return PlannedStage(stage, batch, _pipeline_order(laid_out, world, parts, batch), [])


def ends_of_coordinates(degrees: Degrees) -> list[list[int]]:
    """The first and the last rank of each pipeline coordinate; one rank where these are the same."""
    size = degrees.size // degrees.pipeline  # the ranks of one are consecutive, because of the order in `Degrees`
    return [sorted({first, first + size - 1}) for first in range(0, degrees.size, size)]


def _memory(parts: list[SWAMLAModel], planned: PlannedStage, schedule: Schedule, world: World) -> Memory:
    config, batch = planned.stage.config, planned.batch
    in_flight = _in_flight(planned, schedule, world)
    return memory_of(parts, config, world, batch.micro_batch_size, run_count(config.parallel, batch), in_flight)


def _for_any_machine(config: Config) -> Config:
    """The configuration without what needs a compiler or a GPU and changes no shape."""
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, async_tensor=False),
        compile=dataclasses.replace(config.compile, enabled=False),
    )


def batch_of(stage: TrainingStage, degrees: Degrees) -> Batch:
    """How the trainer divides the global batch of a stage's step among ranks and micro-batches."""
    training, order = stage.training, sequence_order(stage.config.data)
    size = micro_batch_size(training.local_batch_size, training.global_batch_size, degrees.data)
    total = training.global_batch_size
    read = [
        sequences_per_rank(stage.begin.sequences + step * total, total, order, degrees.data)
        for step in range(min(training.steps, distinct_steps(total, order.streams)))
    ]
    most, least = [max(counts) for counts in read], [min(counts) for counts in read]
    return Batch(size, -(-min(most) // size), -(-max(most) // size), min(least), max(most))


def key_exchanges(config: Config, degrees: Degrees, micro_batch_size: int) -> dict[str, Traffic]:
    """The most that a context-parallel rank sends and receives for the keys of one layer, by the layer's kind."""
    if degrees.context == 1:
        return {}
    layouts = [SequenceLayout(config.training.seq_len, degrees.context, rank) for rank in range(degrees.context)]
    dtype = getattr(torch, config.training.compute_dtype)

    def of_kind(attention: type[Attention]) -> Traffic:
        ranks = [
            exchanged_bytes(attention, config.model, each, degrees.tensor, micro_batch_size, dtype) for each in layouts
        ]
        return Traffic(max(each.sent for each in ranks), max(each.received for each in ranks))

    return {kind: of_kind(attention) for kind, attention in attention_kinds(config.model).items()}


def run_count(parallel: Parallel, batch: Batch) -> int:
    """Micro-batches of a step, including the empty ones that a pipeline schedule adds."""
    return runnable_micro_batches(parallel, batch.most) if parallel.pipeline > 1 else batch.most


def folded(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return re.sub(r"^(blocks|annexes)\.\d+\.", r"\1.*.", name)


def _neighbours(world: World) -> Iterator[Neighbours]:
    """Rank 0's neighbours in each dimension of more than one rank."""
    shown: set[str] = set()
    for mesh in (world.activations, world.weights):
        for dimension in mesh.mesh_dim_names or () if mesh is not None else ():
            assert mesh is not None
            ranks = mesh[dimension].mesh.tolist()
            if len(ranks) > 1 and dimension not in shown:
                yield Neighbours(dimension, ranks)
            shown.add(dimension)


def _pipeline_order(config: Config, world: World, parts: list[SWAMLAModel], batch: Batch) -> Order:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return {}
    stages = [part for part in parts if isinstance(part, ModelStage)]
    count = run_count(parallel, batch)
    schedule = Pipeline(config, world, stages).schedule(count, batch.micro_batch_size, config.training.seq_len)
    return order_of(parallel.pipeline_schedule, parallel.pipeline, count, schedule)


def _in_flight(planned: PlannedStage, schedule: Schedule, world: World) -> InFlight:
    """What the rank of `world` keeps between forward and backward passes, by the pipeline's order."""
    config, batch, order = planned.stage.config, planned.batch, planned.order
    degrees, coordinate = world.degrees, world.coordinate("pipeline")
    if degrees.pipeline == 1:
        layers = range(config.model.num_layers)
        kept, again = (
            count(config, degrees, layers, batch.micro_batch_size) for count in (block_bytes, recomputed_bytes)
        )
        return InFlight(batch.micro_batch_size * kept, batch.micro_batch_size * again, logits=1)
    stages = costs_of_stages(schedule)
    mine: Mapping[int, range] = {
        number: stages[number].layers for number in stages_of_rank(config.parallel, coordinate)
    }
    of_stage = {number: block_bytes(config, degrees, layers, batch.micro_batch_size) for number, layers in mine.items()}
    again = max(recomputed_bytes(config, degrees, layers, batch.micro_batch_size) for layers in mine.values())
    last = {number: int(number == len(stages) - 1) for number in mine}
    most = most_in_flight(order[coordinate], of_stage)
    return InFlight(
        batch.micro_batch_size * most, batch.micro_batch_size * again, logits=most_in_flight(order[coordinate], last)
    )


def _shapes(parts: list[SWAMLAModel]) -> dict[str, tuple[Shape, Shape]]:
    return {
        name: (tuple(parameter.shape), tuple(local(parameter).shape))
        for part in parts
        for name, parameter in part.named_parameters()
    }
