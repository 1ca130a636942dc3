"""What is advised where a GPU's memory is full: changes, each with what plan says that it saves here."""

import re
from dataclasses import replace
from typing import Any

import pytest

from swamla_titan.config import Config
from swamla_titan.config.effects import without_effect
from swamla_titan.config.load import split_overrides
from swamla_titan.config.rules import conflicts
from swamla_titan.config.sections import (
    ActivationCheckpoint,
    Compile,
    Float8,
    Kernels,
    Optimizer,
    Parallel,
    Training,
)
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import FLAVORS
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.tools.plan import memory_at, plan
from swamla_titan.tools.plan_report import size
from swamla_titan.tools.savings import advice, savings
from tests.distributed.ranks import on_ranks

BASE = Config(
    model=replace(FLAVORS["base"], num_layers=4, vocab_size=50257),
    training=Training(seq_len=2048, local_batch_size=16, global_batch_size=32),
)


def advised(config: Config, ranks: int = 1, rank: int = 0, **gpu: Any) -> list[str]:
    """The keys with their values, those that save most first."""
    return [saving.line.split(": saves ")[0] for saving in savings(config, ranks, rank, **gpu)]


def test_changes_are_in_the_order_of_what_they_save_and_none_saves_nothing():
    found = savings(BASE, 1, 0)
    assert [each.bytes for each in found] == sorted((each.bytes for each in found), reverse=True)
    assert all(each.bytes > 0 and f": saves {size(each.bytes)}; " in each.line for each in found)
    keys = [each.line.split(": saves ")[0] for each in found]
    for key in (
        "training.local_batch_size = 8",
        "training.seq_len = 1024",
        'activation_checkpoint.mode = "full"',
        'activation_checkpoint.mode = "selective"',
        "activation_checkpoint.memory_budget = 0.5",
        'optimizer.name = "lion"',
        'optimizer.name = "adamw8bit"',
        'optimizer.moments = "bfloat16"',
        'float8.recipe = "native"',
        "parallel.dp_shard = 2",
    ):
        assert key in keys
    assert keys[0] == 'activation_checkpoint.mode = "full"'  # activations are most of it here


def test_tables_may_go_to_the_host():
    engram = EngramConfig((1,), table_size=100_000)
    config = replace(BASE, model=replace(BASE.model, engram=engram))
    assert "parallel.tables_on_host = true" in advised(config)
    assert "parallel.tables_on_host = true" not in advised(config, device="cpu") + advised(BASE)


def test_where_moments_are_most_they_come_first():
    config = replace(BASE, training=Training(seq_len=128, local_batch_size=1, global_batch_size=1))
    assert next(key for key in advised(config) if "parallel" not in key) == 'optimizer.name = "adamw4bit"'


@pytest.mark.parametrize(
    "ranks, rank, overrides",
    [
        (2, 1, {}),
        pytest.param(4, 3, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, 0, {"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_each_number_is_the_difference_of_two_plans_and_its_keys_can_be_set(ranks, rank, overrides):
    config = replace(BASE, parallel=Parallel(**overrides), float8=Float8("tensorwise"))
    before = memory_at(config, ranks, rank).total
    found = [each for each in savings(config, ranks, rank) if f"on {2 * ranks} GPUs" not in each.line]
    assert len(found) > 6
    for each in found:
        arguments = [f"--{pair}" for pair in each.line.split(": saves ")[0].replace(" = ", "=").split(", ")]
        changed = config
        for section, key, text in split_overrides(arguments)[0]:
            value = next(kind for kind in (_number, _flag, lambda text: text.strip('"')) if kind(text) is not None)(
                text
            )
            changed = replace(changed, **{section: replace(getattr(changed, section), **{key: value})})
        idle, contradict = (
            {*map(str, rule(changed))} - {*map(str, rule(config))} for rule in (without_effect, conflicts)
        )
        assert not idle | contradict, each.line
        assert each.bytes == before - memory_at(changed, ranks, rank).total, each.line


def _number(text: str) -> float | int | None:
    return (float(text) if "." in text else int(text)) if re.fullmatch(r"[0-9.]+", text) else None


def _flag(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text)


@pytest.mark.parametrize("ranks, parallel", [(3, {}), (4, {"pipeline": 2})])
def test_the_memory_of_a_rank_is_that_of_the_plan(ranks, parallel):
    config = replace(BASE, parallel=Parallel(**parallel))
    for holding in plan(config, ranks).holdings:
        assert memory_at(config, ranks, holding.rank) == holding.memory


@pytest.mark.parametrize(
    "sections, never",
    [
        ({"training": Training(seq_len=1024, local_batch_size=1)}, "local_batch_size"),
        ({"activation_checkpoint": ActivationCheckpoint("full")}, "activation_checkpoint.mode"),
        (
            {"activation_checkpoint": ActivationCheckpoint("full", modules="both")},
            'activation_checkpoint.modules = "both',
        ),
        ({"activation_checkpoint": ActivationCheckpoint("selective")}, '"selective"'),
        ({"compile": Compile(enabled=False)}, "memory_budget"),
        ({"optimizer": Optimizer("adamw4bit")}, "adamw"),
        ({"optimizer": Optimizer("adamw8bit")}, "optimizer.moments"),
        ({"optimizer": Optimizer(moments="bfloat16")}, 'optimizer.moments = "bfloat16"'),
        ({"optimizer": Optimizer("lion")}, "optimizer.name"),
        ({"optimizer": Optimizer(beta2=0.999)}, "optimizer.moments"),  # too few bits for it
        ({"float8": Float8("native")}, "float8.recipe"),
        ({"model": replace(FLAVORS["debug"], vocab_size=257)}, "float8.recipe"),  # nothing would be converted
    ],
)
def test_what_is_on_already_or_cannot_be_is_not_advised(sections, never):
    assert not any(never in keys for keys in advised(replace(BASE, **sections)))


@pytest.mark.parametrize(
    "sections, key",
    [
        ({"training": Training(compute_dtype="float32")}, 'training.compute_dtype = "bfloat16"'),
        ({"compile": Compile(enabled=False)}, "compile.enabled = true"),
        ({"kernels": Kernels(loss="plain")}, 'kernels.loss = "fused"'),
        ({"float8": Float8("native", output_head=True)}, "float8.output_head = false"),
        ({"float8": Float8("native")}, 'optimizer.name = "adamw_fp8"'),
        ({"optimizer": Optimizer("muon")}, 'optimizer.moments = "bfloat16"'),
        ({"optimizer": Optimizer("lion")}, 'optimizer.moments = "bfloat16"'),
        ({"optimizer": Optimizer(eps=1e-6)}, 'optimizer.name = "lion", optimizer.eps = 1e-08'),
        ({}, 'activation_checkpoint.mode = "full", activation_checkpoint.modules = "feed_forward"'),
        (
            {"activation_checkpoint": ActivationCheckpoint("selective", "blocks")},
            'activation_checkpoint.mode = "full", activation_checkpoint.selective = "operators"',
        ),
        ({"activation_checkpoint": ActivationCheckpoint("full")}, 'activation_checkpoint.modules = "both"'),
        (
            {"activation_checkpoint": ActivationCheckpoint(memory_budget=0.5)},
            'activation_checkpoint.mode = "full", activation_checkpoint.memory_budget = 1.0',
        ),
    ],
)
def test_what_suits_the_configuration_is(sections, key):
    assert key in advised(replace(BASE, **sections))


def test_ranks_are_advised_to_share_what_they_do_not_yet():
    copies = advised(replace(BASE, parallel=Parallel(data_parallel="ddp")), 2)
    assert 'parallel.data_parallel = "fsdp", parallel.dp_replicate = 1' in copies
    shards = advised(replace(BASE, training=Training(seq_len=256, local_batch_size=1, global_batch_size=8)), 2)
    assert {'parallel.reshard_after_forward = "always"', "parallel.reduce_every_micro_batch = true"} <= {*shards}
    assert "parallel.cpu_offload = true" in shards
    one_micro_batch = replace(BASE, training=Training(local_batch_size=16, global_batch_size=32))
    assert "training.local_batch_size = 8, parallel.reduce_every_micro_batch = true" in advised(one_micro_batch, 2)
    assert "parallel.cpu_offload = true" not in advised(BASE, 2, device="cpu")


def test_a_gpu_without_float8_is_not_advised_to_use_it():
    assert not any("float8" in keys for keys in advised(BASE, has_float8=False))
    auto = replace(BASE, float8=Float8("auto"), optimizer=Optimizer("auto"))
    assert not any("float8" in keys for keys in advised(auto, has_float8=False))
    assert 'optimizer.name = "adamw8bit"' in advised(auto, has_float8=False)
    assert 'optimizer.name = "adamw4bit"' in advised(auto)  # of moments that are in float8 already


def _advised_on_a_rank(config: Config) -> list[str]:
    world = init_distributed(config.parallel)
    found = advice(config, world) if world.rank == 1 else []
    world.all_reduce_max(0.0)  # the other one waits, as one that trains on does
    return found


@pytest.mark.slow  # starts a process that imports torch
def test_a_rank_among_others_is_told_the_same():
    config = replace(BASE, training=Training(seq_len=256, local_batch_size=4, global_batch_size=16))
    expected = [each.line for each in savings(config, 2, 1, device="cpu", has_float8=False)]
    assert on_ranks(2, _advised_on_a_rank, config)[1] == expected
