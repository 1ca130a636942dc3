"""Changes of a configuration that save memory on a rank, and how much each saves by the count of `plan`."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from swamla_titan.conditions import replace_at
from swamla_titan.config import Config, with_vocabulary
from swamla_titan.config.effects import without, without_effect
from swamla_titan.config.rules import conflicts
from swamla_titan.config.schedule import configs_of_stages
from swamla_titan.config.sections import KEYS
from swamla_titan.config.toml import toml
from swamla_titan.data import load_tokenizer, micro_batch_size
from swamla_titan.distributed.degrees import Degrees, fit_degrees
from swamla_titan.distributed.mesh import ELSEWHERE, World
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import has_triton
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY
from swamla_titan.parallel.float8 import resolve_auto
from swamla_titan.tools.plan import memory_at
from swamla_titan.tools.plan_report import size

_LEAST = 0.005  # of the rank's memory now; smaller savings are not worth a restart
_SECONDS = 120.0  # that the computation may take, because the other ranks and the watchdog wait

_NEW_RUN = "a new run, because an optimizer cannot load the states of another"


class Change(NamedTuple):
    """Keys to set, as section.key, the ranks of the run then, and what the change costs."""

    keys: dict[str, Any]
    note: str
    ranks: int


class Saving(NamedTuple):
    """Bytes saved on the rank, and the line that reports the change."""

    bytes: int
    line: str


def advice(config: Config, world: World) -> list[str]:
    """A line for each change that saves memory on this rank, the largest savings first.

    Not collective. A rank of a process group computes it in a subprocess, because `plan` needs a fake process group.
    """
    has_float8 = world.device.type == "cuda" and (
        torch.cuda.get_device_capability(world.device) >= FLOAT8_CAPABILITY and has_triton()
    )
    arguments = config, world.size, world.rank, world.device.type, has_float8
    if not dist.is_initialized():
        return [saving.line for saving in savings(*arguments)]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_savings, args=(sender, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            raise TimeoutError
        lines: list[str] = receiver.recv()
        return lines
    finally:
        process.kill()


def _send_savings(sender: Connection, arguments: tuple[Config, int, int, str, bool]) -> None:
    sender.send([saving.line for saving in savings(*arguments)])


def savings(config: Config, ranks: int, rank: int, device: str = "cuda", has_float8: bool = True) -> list[Saving]:
    """What each change saves on rank `rank` of `ranks`, the largest first; changes that save nothing are left out.

    `has_float8`: whether the GPUs have float8 matmuls. This process must be in no process group.
    """
    degrees = fit_degrees(config.parallel, ranks)
    if not config.model.vocab_size:
        config = with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size)
    config = resolve_auto(config, World.planned(degrees, ELSEWHERE if has_float8 else torch.device("cpu"))).config
    of_stages = [(memory_at(each, ranks, rank).total, each) for each in configs_of_stages(config)]
    now, config = max(of_stages, key=lambda each: each[0])
    stage = f" in stage {of_stages.index((now, config))} of training.stages" if len(of_stages) > 1 else ""
    found = []
    for change in _changes(config, ranks, device, has_float8):
        applied = _applied(config, change.keys)
        if not applied:
            continue
        try:
            saved = now - memory_at(applied[0], change.ranks, rank).total
        except UserError:  # the ranks cannot divide the model so
            continue
        if saved >= _LEAST * now:
            found.append(Saving(saved, f"{_toml(applied[1])}: saves {size(saved)}{stage}; {change.note}"))
    return sorted(found, key=lambda saving: -saving.bytes)


def _applied(config: Config, keys: dict[str, Any]) -> tuple[Config, dict[str, Any]] | None:
    """The configuration with these keys, and all keys to set; None if these keys conflict with others.

    Keys that lose their effect by it are set to their defaults.
    """
    changed = config
    for name, value in keys.items():
        changed = replace_at(changed, name, value)
    idle_before = {each.keys[0] for each in without_effect(config)}
    for each in without_effect(changed):
        name = each.keys[0]
        if name in keys:
            return None
        if name not in idle_before:
            changed, keys = without(changed, name), keys | {name: KEYS[name].default}
    return None if {*conflicts(changed)} - {*conflicts(config)} else (changed, keys)


def _changes(config: Config, ranks: int, device: str, has_float8: bool) -> Iterator[Change]:
    parallel, degrees = config.parallel, fit_degrees(config.parallel, ranks)
    for keys, note in (*_fewer_activations(config, degrees), *_fewer_bytes(config, has_float8)):
        yield Change(keys, note, ranks)
    if ranks > 1 and parallel.data_parallel == "ddp":
        keys = {"parallel.data_parallel": "fsdp", "parallel.dp_replicate": 1}
        yield Change(keys, "ranks share the weights and the optimizer state", ranks)
    elif ranks > 1:
        keys = {"parallel.reshard_after_forward": "always"}
        yield Change(keys, "gathered weights are freed after each forward pass, and gathered again", ranks)
        yield Change({"parallel.reduce_every_micro_batch": True}, "gradients wait in shards; more communication", ranks)
        if device == "cuda":
            note = "weights and optimizer state in the host's memory; slow"
            yield Change({"parallel.cpu_offload": True}, note, ranks)
    if device == "cuda":
        note = "tables and their moments in the host's memory, read and written row by row; slower"
        yield Change({"parallel.tables_on_host": True}, note, ranks)
    more, note = 2 * ranks, f"on {2 * ranks} GPUs"
    if parallel.data_parallel != "ddp":
        yield Change({"parallel.dp_shard": 2 * degrees.shard}, f"{note}, which share the weights", more)
    yield Change({"parallel.context": 2 * parallel.context}, f"{note}, which share each sequence", more)
    yield Change({"parallel.tensor": 2 * parallel.tensor}, f"{note}, which share each matmul", more)


def _fewer_activations(config: Config, degrees: Degrees) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes by which fewer activations exist at a time: smaller micro-batches, or recomputation."""
    training, settings = config.training, config.activation_checkpoint
    size = micro_batch_size(training.local_batch_size, training.global_batch_size, degrees.data)
    if size > 1:
        note = "the global batch stays what it is, in more micro-batches"
        yield {"training.local_batch_size": size // 2}, note
        if training.global_batch_size <= size * degrees.data and degrees.weight_shards > 1:
            # Because otherwise the gradients of the first of several micro-batches wait unsharded.
            in_shards = {"parallel.reduce_every_micro_batch": True}
            yield {"training.local_batch_size": size // 2} | in_shards, f"{note}, whose gradients wait in shards"
    if training.seq_len > 1:
        yield {"training.seq_len": training.seq_len // 2}, "other sequences: a new run, or --checkpoint.allow batch"
    at, again = "activation_checkpoint.", "recomputed in the backward pass"
    if settings.mode == "none":
        yield {f"{at}mode": "selective"}, f"what is cheap is {again}"
        for branch in ("attention", "feed_forward"):
            yield {f"{at}mode": "full", f"{at}modules": branch}, f"the {branch} of each block is {again}"
    if settings.mode != "full" or settings.modules != "block":
        full = {f"{at}mode": "full"} | ({f"{at}modules": "block"} if settings.modules != "block" else {})
        yield full, f"each block is {again}, about a third more work"
    if settings.mode == "full" and settings.modules != "both":
        yield {f"{at}modules": "both"}, f"half a block at a time is {again}"
    if settings.mode == "none" and config.compile.enabled and settings.memory_budget:
        keys = {"activation_checkpoint.memory_budget": settings.memory_budget / 2}
        yield keys, "the compiler recomputes what is cheapest"


def _fewer_bytes(config: Config, has_float8: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes by which the same values take fewer bytes."""
    optimizer, float8 = config.optimizer, config.float8
    if config.training.compute_dtype == "float32":
        yield {"training.compute_dtype": "bfloat16"}, "activations of half the size"
    if not config.compile.enabled:
        yield {"compile.enabled": True}, "fused operations keep less for the backward pass"
    if float8.recipe == "off" and has_float8:
        yield {"float8.recipe": "native"}, "inputs of linear layers are kept in 8 bits"
    if float8.output_head:
        yield {"float8.output_head": False}, "head and loss are one then, and all logits are never held"
    if config.kernels.loss == "plain":
        yield {"kernels.loss": "fused"}, "head and loss are one then, and all logits are never held"
    if optimizer.moments == "float32":
        yield {"optimizer.moments": "bfloat16"}, "moments of half the size; the run may continue"
    if optimizer.name == "adamw":
        in_8_bits = "adamw_fp8" if float8.recipe != "off" else "adamw8bit"
        yield {"optimizer.name": in_8_bits}, f"moments in 8 bits; {_NEW_RUN}"
    if optimizer.name in ("adamw", "adamw8bit", "adamw_fp8"):
        yield {"optimizer.name": "adamw4bit"}, f"moments in 4 bits; {_NEW_RUN}"
    if optimizer.name in ("adamw", "adamw8bit", "adamw4bit", "adamw_fp8"):
        note = f"one moment instead of two, with a third of the lr; {_NEW_RUN}"
        yield {"optimizer.name": "lion"}, note


def _toml(keys: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {toml(value)}" for name, value in keys.items())
