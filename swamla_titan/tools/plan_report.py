"""The commands `plan` and `train --dry-run`: print the plan of a run, and raise the errors that its start would."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from swamla_titan.config import Config, with_vocabulary
from swamla_titan.config.schedule import Schedule
from swamla_titan.config.sections import MOST_RANKS
from swamla_titan.config.stability import stability_advice
from swamla_titan.config.toml import shown
from swamla_titan.data import described, labelled, load_tokenizer, sequence_order, uneven, waits_for_streams
from swamla_titan.distributed.degrees import DIMENSIONS, fit_degrees
from swamla_titan.distributed.mesh import ELSEWHERE, World
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line, several_lines
from swamla_titan.launch.process_group import device_here
from swamla_titan.launch.ranks import rank_info
from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.counts import parameter_counts
from swamla_titan.parallel.float8 import float8_moments_advice
from swamla_titan.parallel.kernels import attention_summary
from swamla_titan.parallel.stages import stage_count, stage_table, stages_per_rank
from swamla_titan.quantization.coverage import table, warnings
from swamla_titan.tools.activations import recomputed_share
from swamla_titan.tools.plan import Batch, Plan, Shape, ends_of_coordinates, folded, plan, ranks_asked_for, run_count
from swamla_titan.train.setup import Setup, rehearse

_MEANING = {"data": "read different sequences"} | {each.name: each.ranks for each in DIMENSIONS}


def print_plan(config: Config, gpus: int | None) -> None:
    """Print the plan on `gpus` ranks; None: on the product of the degrees in [parallel].

    Raises UserError if the degrees do not fit, or if the tokenizer, whose vocabulary the model needs, cannot be loaded.
    """
    ranks = _positive(gpus) or ranks_asked_for(config.parallel)
    config = with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size)
    lines = list(report(plan(config, ranks)))
    if gpus is None:
        print("(no --gpus: the product of the degrees in [parallel], -1 taken as 1)")
    print("\n".join(lines))


def dry_run(config: Config, gpus: int | None) -> None:
    """Print the plan of a run on `gpus` ranks (None: those that the launcher started), and where the run would begin.

    Raises the UserErrors of `train`, and writes nothing. On a machine without GPUs the run is taken to be for another
    one, and what depends on GPUs is not validated. Under a launcher rank 0 prints.
    """
    ranks = _positive(gpus) or rank_info().size
    here = device_here()
    world = World.planned(fit_degrees(config.parallel, ranks), here if here.type == "cuda" else ELSEWHERE)
    setup = rehearse(config, world)
    found = dataclasses.replace(plan(setup.config, ranks), choices=setup.choices)
    if rank_info().rank == 0:
        _print_dry_run(setup, found)


def _print_dry_run(setup: Setup, found: Plan) -> None:
    config, corpus, newest = setup.config, setup.corpus, setup.origin.path
    if newest is None:
        begin = "begins at step 1" + (f" with the {setup.initial.summary(config)}" if setup.initial else "")
    elif setup.train_state.step < config.training.steps:
        begin = f"continues from {newest}"
    else:
        begin = f"has taken all {config.training.steps} steps, see {newest}"
    print("\n".join(report(found)))
    for advice in stability_advice(config):
        print(f"warning: {one_line(advice)}")
    data = "; ".join(
        f"{label}{each.source.description}; {described(each.segments[-1])}" for label, each in labelled(corpus)
    )
    run = one_line(f"{Path(config.job.dump_folder)} {begin}")
    print(f"\ndata: {one_line(data)}\nrun: {run}\ndry run: nothing is refused, nothing was written")
    if setup.initial and (differences := setup.initial.differences(config, setup.fingerprint)):
        print(f"warning: {one_line(str(setup.initial.path))} differs from this run:\n{several_lines(differences)}")
    for label, each in labelled(corpus):
        if warning := uneven(each.source, each.segments[-1], setup.schedule.longest.training.seq_len):
            print(f"warning: {label}{one_line(warning)}")


def _positive(gpus: int | None) -> int | None:
    if gpus is not None and not 1 <= gpus <= MOST_RANKS:
        raise UserError(f"--gpus {shown(gpus)}: expected a number from 1 to {MOST_RANKS}")
    return gpus


def report(plan: Plan) -> Iterator[str]:
    """The lines of a plan: mesh, batch, context, pipeline, parameters, float8, memory."""
    total, without_embeddings = parameter_counts(plan.config.model)
    ranks = "1 rank" if plan.degrees.size == 1 else f"{plan.degrees.size} ranks"
    yield f"{ranks}: {plan.degrees}"
    yield f"model: {total:,} parameters ({without_embeddings:,} without embeddings)"
    yield from _attention(plan)
    yield from (annex.summary(plan.config.model) for annex in annexes_of(plan.config.model).values())
    yield from _mesh(plan)
    yield from _stages(plan)
    yield from _batch(plan)
    yield from _context(plan)
    yield from _pipeline(plan)
    yield from _parameters(plan)
    yield from _float8(plan)
    yield from _memory(plan)


def _attention(plan: Plan) -> Iterator[str]:
    if plan.attention:
        device = device_here()
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU here (GPUs choose by themselves)"
        yield f"attention: {attention_summary(plan.attention)}, on {on}"


def _mesh(plan: Plan) -> Iterator[str]:
    if not plan.mesh:
        return
    yield "\nmesh: rank 0 and its neighbours"
    for along in plan.mesh:
        yield f"  {along.dimension:<9} {len(along.ranks):>5}  {listed(along.ranks)}: {_MEANING[along.dimension]}"


def _stages(plan: Plan) -> Iterator[str]:
    """A table of training.stages; nothing without them."""
    if len(plan.stages) == 1:
        return
    yield "\nstages: by training.stages; what follows is of the one that needs the most memory"
    heading = (
        "",
        "from step",
        "tokens before",
        "a step",
        "tokens a step",
        "micro-batches",
        "window",
        "memory of a GPU",
    )
    rows: list[tuple[str, ...]] = [heading]
    for each in plan.stages:
        stage, batch, training = each.stage, each.batch, each.stage.training
        windows = ", ".join(map(str, stage.config.model.quantities("window").values()))
        marked = "*" if stage.config is plan.config else ""
        rows.append(
            (
                f"{stage.number}{marked}",
                f"{stage.begin.step + 1:,}",
                f"{stage.begin.tokens:,}",
                f"{training.global_batch_size} x {training.seq_len}",
                f"{stage.tokens_per_step:,}",
                f"{_count(batch)} of {batch.micro_batch_size}",
                windows,
                size(each.worst.memory.total),
            )
        )
    yield from _table(rows)


def _count(batch: Batch) -> str:
    """Micro-batches of a step."""
    return f"{batch.most}" if batch.fewest == batch.most else f"{batch.fewest} or {batch.most}"


def _batch(plan: Plan) -> Iterator[str]:
    training, batch, data = plan.config.training, plan.batch, plan.degrees.data
    tokens = training.global_batch_size * training.seq_len
    yield "\nbatch"
    yield f"  a step: {training.global_batch_size} sequences of {training.seq_len} = {tokens:,} tokens"
    least, most = batch.least_read, batch.most_read
    each = f"{most}" if least == most else f"{least} {'or' if most == least + 1 else 'to'} {most}"
    readers = "1 rank reads them" if data == 1 else f"{data} ranks read {each} of them each"
    if plan.degrees.size > data:
        readers += f", {plan.degrees.size // data} ranks together"
    yield f"  {readers}"
    noun = "micro-batch" if batch.most == 1 else "micro-batches"
    own = batch.micro_batch_size * training.seq_len // plan.degrees.context
    yield f"  {_count(batch)} {noun} of {batch.micro_batch_size} sequences a step; {own:,} tokens on a rank at a time"
    waits = waits_for_streams(
        training.global_batch_size, sequence_order(plan.config.data), data, batch.micro_batch_size
    )
    if waits:
        yield f"  {waits}"


def _context(plan: Plan) -> Iterator[str]:
    if not plan.key_exchanges:
        return
    yield "\ncontext: what keys are made of, or windows' halos and sinks, that ranks exchange"
    for kind, (sent, received) in plan.key_exchanges.items():
        most = f"a rank sends up to {size(sent)} and receives up to {size(received)}"
        yield f"  each {kind.upper()} layer: {most} a micro-batch and pass"


def _pipeline(plan: Plan) -> Iterator[str]:
    if plan.bubble is None:
        return
    config, parallel, most = plan.config, plan.config.parallel, plan.batch.most
    per_rank = stages_per_rank(parallel)
    stages = "stage" if per_rank == 1 else "stages"
    yield f"\npipeline: {parallel.pipeline_schedule}, {per_rank} {stages} a rank"
    longest = Schedule(tuple(each.stage for each in plan.stages)).longest.training.seq_len
    yield from (f"  {line}" for line in stage_table(config.model, longest, stage_count(parallel)))
    run = run_count(parallel, plan.batch)
    added = f" ({run - most} of them empty, which the schedule needs)" if run > most else ""
    yield f"  bubble: ranks wait {plan.bubble:.1%} of a step of {run} micro-batches{added}, transfers not counted"


def _parameters(plan: Plan) -> Iterator[str]:
    kinds: Counter[tuple[str, Shape, str]] = Counter()
    counted = set()
    by_rank = {holding.rank: holding.shapes for holding in plan.holdings}
    for ranks in ends_of_coordinates(plan.degrees):
        for name, (full, most) in by_rank[ranks[0]].items():
            least = by_rank[ranks[-1]][name][1]
            on_rank = _times(most) if most == least else f"{_times(most)} to {_times(least)}"
            assert name not in counted, "no two pipeline coordinates hold a parameter of the same name"
            counted.add(name)
            kinds[folded(name), full, on_rank] += 1
    rows = [(name, str(count), _times(full), on_rank) for (name, full, on_rank), count in kinds.items()]
    yield "\nparameters"
    yield from _table([("name", "count", "whole", "on a rank"), *rows])


def _float8(plan: Plan) -> Iterator[str]:
    if plan.choices:
        yield ""
        yield from plan.choices
    if plan.coverage:
        yield ""
        yield from table(plan.coverage, plan.config.float8.recipe)
        yield from (f"  warning: {text}" for text in warnings(plan.coverage, plan.config, plan.batch.micro_batch_size))


def _memory(plan: Plan) -> Iterator[str]:
    config, memory = plan.config, plan.worst.memory
    dtype = config.training.compute_dtype
    host = ", on the host" if config.parallel.cpu_offload else ""
    moments = ", moments in bfloat16" if config.optimizer.moments == "bfloat16" else ""
    gradients = "float32"
    if plan.degrees.data * plan.degrees.context > 1 and config.parallel.data_parallel != "ddp":
        waiting = run_count(config.parallel, plan.batch) > 1 and not config.parallel.reduce_every_micro_batch
        gradients += ", unsharded until the last micro-batch" if waiting else f", sharded{host}"
    larger = ", with the larger of gradients and activations, which come and go in turn" if memory.in_turn else ""
    rows = [
        ("parameters", memory.parameters, f"float32{host}"),
        ("optimizer", memory.optimizer, f"{config.optimizer.name}{moments}{host}"),
        ("average", memory.average, f"of the weights, float32{host}"),
        ("gradients", memory.gradients, gradients),
        ("weights in use", memory.weights_in_use, f"copies in {dtype}, the most at a time"),
        ("logits", memory.logits, "with their gradient"),
        ("activations", memory.activations, f"estimate; {_recomputed(config)}"),
        (
            "merging",
            memory.merging,
            "of the gradients of tables, beyond logits and activations, which are gone by then",
        ),
        (
            "sum",
            memory.total,
            f"on the GPU{larger}; buffers of communication, workspaces and fragmentation come on top",
        ),
    ]
    if config.parallel.tables_on_host:
        copies = memory.parameters + memory.optimizer + memory.average
        beside = f", beside {size(copies)} for copies of all that checkpoints hold (checkpoint.async_mode)"
        note = f"of these, tables with moments and average{beside if config.checkpoint.async_mode == 'async' else ''}"
        rows.insert(-1, ("on the host", memory.offloaded, note))
    yield "\nmemory of a GPU" + (
        "" if plan.degrees.size == 1 else f", that of rank {plan.worst.rank}, which needs the most"
    )
    yield from (f"  {name:<15} {size(count):>11}  {note}" for name, count, note in rows if count)
    if saved := plan.worst.saved_by_float8_moments:
        yield f"  {float8_moments_advice(saved)}"


def _recomputed(config: Config) -> str:
    """The mode of activation checkpointing, and the share of operations that it repeats."""
    settings = config.activation_checkpoint
    text = f"activation_checkpoint.mode = {settings.mode}"
    if settings.mode == "none":
        return text if settings.memory_budget == 1 else f"{text}, memory_budget = {settings.memory_budget:g}"
    if settings.mode == "selective":
        text += f", {settings.selective}"
    if settings.modules != "block":
        text += f", modules = {settings.modules}"
    return f"{text}: {recomputed_share(config):.1%} more operations"


def listed(ranks: list[int]) -> str:
    """Ranks along a mesh dimension, which are equally far apart: `0-7`, `0, 8, 16 ... 56`."""
    step = ranks[1] - ranks[0]
    assert ranks == list(range(ranks[0], ranks[-1] + 1, step))
    if step == 1 and len(ranks) > 2:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return ", ".join(map(str, ranks[:3])) + f" ... {ranks[-1]}"


def size(count: int) -> str:
    """Bytes in GiB, or in a smaller unit if that would round to nothing."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:,.2f} {name}"


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
