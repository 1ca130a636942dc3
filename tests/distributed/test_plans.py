"""Every plan trains as one process does: the same losses and gradient norms, step by step, from the real command."""

import functools
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from swamla_titan.cli import main
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import metrics

STEPS = 8
# Float32 rounds, and training amplifies roundings: a learning rate that learns, but does not dig.
COMMON = (
    *("--training.steps", str(STEPS), "--model.dropout", "0", "--optimizer.lr", "1e-3"),
    *("--data.num_workers", "0", "--checkpoint.interval", "1000"),
    # 10 sequences, which neither 3 nor 4 ranks divide
    *("--validation.interval", "4", "--validation.max_tokens", "640"),
)


def run(config: str, *overrides: str) -> int:
    return main(["train", config, *COMMON, *overrides])


def written(folder: Path) -> str:
    """The path of the configuration that trains in `folder`."""
    return str(tiny_config(folder))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    names = ("loss", "grad_norm", "val_loss", "engram_gate_0", "engram_gate_2")
    return {name: found for name in names if (found := metrics(folder / "run", name))}


@functools.cache
def alone(*overrides: str) -> dict[str, dict[int, float]]:
    """The curves of one process; computed once for all plans."""
    with tempfile.TemporaryDirectory() as folder:
        assert run(written(Path(folder)), *overrides) == 0
        return curves(Path(folder))


def assert_same_curves(
    folder: Path, model: tuple[str, ...], tolerance: float = 1e-5, later: float | None = None
) -> None:
    """As one process does, within `tolerance`; with `later`, within that from step 6 on."""
    expected, found = alone(*model), curves(folder)
    for name, values in expected.items():
        for step, value in values.items():
            near = tolerance if later is None or step <= 5 else later
            assert found[name][step] == pytest.approx(value, rel=near), (name, step)
        assert found[name].keys() == values.keys()
    assert len(found["loss"]) == STEPS


PLANS = {
    "fsdp-2": (2, ()),
    "fsdp-3": (3, ()),
    "fsdp-4": (4, ()),
    "fsdp-2-every": (2, ("--parallel.reduce_every_micro_batch", "true", "--training.local_batch_size", "1")),
    "fsdp-2-always": (2, ("--parallel.reshard_after_forward", "always", "--training.local_batch_size", "1")),
    "hsdp-2x2": (4, ("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2")),
    "hsdp-2-cp-2": (
        4,
        (
            *("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2", "--parallel.dp_shard", "1"),
            *("--parallel.context", "2"),
        ),
    ),
    "hsdp-2x2-every": (
        4,
        (
            *("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2", "--parallel.dp_shard", "2"),
            *("--parallel.reduce_every_micro_batch", "true", "--training.local_batch_size", "1"),
        ),
    ),
    "ddp-2": (2, ("--parallel.data_parallel", "ddp")),
    "ddp-3": (3, ("--parallel.data_parallel", "ddp", "--training.local_batch_size", "1")),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "cp-2": (2, ("--parallel.context", "2")),
    "cp-4": (4, ("--parallel.context", "4")),
    "cp-2-ddp-2": (4, ("--parallel.context", "2", "--parallel.data_parallel", "ddp")),
    "pp-2": (2, ("--parallel.pipeline", "2", "--training.local_batch_size", "1")),
    "pp-3": (3, ("--parallel.pipeline", "3", "--training.local_batch_size", "1")),
    "fsdp-2-tp-2": (4, ("--parallel.tensor", "2")),
    "ddp-2-tp-2": (4, ("--parallel.tensor", "2", "--parallel.data_parallel", "ddp")),
    "fsdp-2-cp-2": (4, ("--parallel.context", "2", "--parallel.dp_shard", "2")),
    "tp-2-cp-2": (4, ("--parallel.context", "2", "--parallel.tensor", "2")),
    "fsdp-2-pp-2": (4, ("--parallel.pipeline", "2", "--training.local_batch_size", "1")),
    "tp-2-pp-2": (4, ("--parallel.pipeline", "2", "--parallel.tensor", "2", "--training.local_batch_size", "1")),
    "cp-2-pp-2": (4, ("--parallel.pipeline", "2", "--parallel.context", "2", "--training.local_batch_size", "1")),
}
BATCHES = {"divides": ("--training.global_batch_size", "12"), "does not": ("--training.global_batch_size", "5")}
MODELS = {
    "tied": (),
    "untied": (
        *("--model.tie_embeddings", "false", "--model.norm", "dynamic_tanh", "--data.document_mask", "true"),
        *("--model.z_loss", "1e-3"),
    ),
    "selective": ("--model.mla_selective", "true", "--model.selection_head", "1", "--data.document_mask", "true"),
    # Orders of 2 and 4, and so halos of 12 tokens: longer than the stretches that four ranks of a sequence hold.
    "engram": (
        *("--model.engram.layers", "0,2", "--model.engram.orders", "2,4", "--model.engram.heads", "2"),
        *("--model.engram.d_mem", "16", "--model.engram.table_size", "501", "--data.document_mask", "true"),
    ),
}


# In CI a plan runs once, with the batch that does not divide and one of the models; these with the untied one.
UNTIED_IN_CI = {"fsdp-2-every", "hsdp-2x2", "pp-3", "fsdp-2-cp-2"}
ENGRAM_IN_CI = {"tp-2-cp-2", "pp-3"}
SELECTIVE_IN_CI = {"cp-2"}  # whose ranks share what is summed over earlier queries
# Each of these is part of a composition of three below, is two plans that run on their own, or runs with the
# fused loss or with Engram; what two ranks share three or four share too, and pipelines of two are among the schedules;
# DDP of three is DDP of two with a batch that does not divide.
COVERED = {
    *("fsdp-2-tp-2", "fsdp-2-pp-2", "tp-2-pp-2", "hsdp-2x2-every", "cp-2-ddp-2", "hsdp-2-cp-2"),
    *("fsdp-4", "cp-2", "pp-2", "cp-2-pp-2", "ddp-3", "ddp-2-tp-2", "tp-2-cp-2"),
    *("fsdp-2", "fsdp-3", "tp-2", "cp-4"),
}
assert PLANS.keys() > UNTIED_IN_CI | COVERED


def is_in_ci(plan: str, batch: str, model: str) -> bool:
    if of_model := {"engram": ENGRAM_IN_CI, "selective": SELECTIVE_IN_CI}.get(model):
        return plan in of_model and batch == "does not"
    return plan not in COVERED and batch == "does not" and model == ("untied" if plan in UNTIED_IN_CI else "tied")


@pytest.mark.parametrize(
    "plan, batch, model",
    [
        pytest.param(*case, marks=[] if is_in_ci(*case) else [pytest.mark.slow])
        for case in itertools.product(PLANS, BATCHES, MODELS)
    ],
)
def test_a_plan_trains_as_one_process_does(tmp_path, plan, batch, model):
    ranks, overrides = PLANS[plan]
    shape = (*BATCHES[batch], *MODELS[model])
    assert on_ranks(ranks, run, written(tmp_path), *shape, *overrides) == [0] * ranks
    # Adam's first step of a row is as large as its learning rate, whatever the gradient; test_engram.py has gradients.
    assert_same_curves(tmp_path, shape, later=1e-4 if model == "engram" else None)


@pytest.mark.parametrize(
    "plan, model",
    [("fsdp-3", "untied"), ("cp-2-ddp-2", "untied"), pytest.param("fsdp-2", "tied", marks=pytest.mark.slow)],
)
def test_head_and_loss_as_one_train_as_they_do_apart_in_one_process(tmp_path, plan, model):
    ranks, overrides = PLANS[plan]
    shape = (*BATCHES["does not"], *MODELS[model])
    assert on_ranks(ranks, run, written(tmp_path), *shape, *overrides, "--kernels.loss", "fused") == [0] * ranks
    assert_same_curves(tmp_path, shape)


OFFLOADED = ("--parallel.cpu_offload", "true")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "plan",
    [(), OFFLOADED, *(PLANS[name][1] for name in ("fsdp-2-every", "ddp-2", "tp-2", "cp-2", "pp-2"))],
    ids=str,
)
def test_on_gpus_a_plan_trains_as_one_gpu_does(tmp_path, plan):
    shape = (*BATCHES["does not"], *MODELS["untied"], "--training.fp32_precision", "ieee")
    assert on_ranks(2, run, written(tmp_path), *shape, *plan) == [0, 0]
    assert_same_curves(tmp_path, shape, tolerance=1e-4)


# Three ways at once need eight processes: once each.
TRIPLES = {
    "hsdp-2x2-tp-2": (
        *("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2", "--parallel.dp_shard", "2"),
        *("--parallel.tensor", "2"),
    ),
    "fsdp-2-tp-2-pp-2": ("--parallel.pipeline", "2", "--parallel.tensor", "2", "--training.local_batch_size", "1"),
}


@pytest.mark.parametrize("plan", [pytest.param("hsdp-2x2-tp-2", marks=pytest.mark.slow), "fsdp-2-tp-2-pp-2"])
def test_a_composition_of_three_trains_as_one_process_does(tmp_path, plan):
    shape = BATCHES["does not"]
    assert on_ranks(8, run, written(tmp_path), *shape, *TRIPLES[plan]) == [0] * 8
    assert_same_curves(tmp_path, shape)


@pytest.mark.parametrize(
    "schedule",
    [
        *("Interleaved1F1B", "ZBVZeroBubble"),
        *(pytest.param(schedule, marks=pytest.mark.slow) for schedule in ("GPipe", "InterleavedZeroBubble")),
    ],
)
def test_every_schedule_trains_as_one_process_does(tmp_path, schedule):
    """Also with a batch that no number of micro-batches divides, and both ends of the tied weight on one rank (ZBV)."""
    shape = (*BATCHES["does not"], "--model.num_layers", "4")
    plan = ("--parallel.pipeline", "2", "--parallel.pipeline_schedule", schedule, "--training.local_batch_size", "1")
    assert on_ranks(2, run, written(tmp_path), *shape, *plan) == [0, 0]
    assert_same_curves(tmp_path, shape)


@pytest.mark.slow
@pytest.mark.parametrize("mode, modules", [("selective", "block"), ("full", "both")])
@pytest.mark.parametrize("plan", ["tp-2", "fsdp-2", "fsdp-2-tp-2", "fsdp-2-cp-2", "pp-2"])
def test_activation_checkpointing_and_compilation_change_nothing(tmp_path, plan, mode, modules):
    ranks, overrides = PLANS[plan]
    memory = ("--activation_checkpoint.mode", mode, "--activation_checkpoint.modules", modules)
    memory += ("--compile.enabled", "true")
    if mode == "full" and "tp-2" in plan:  # see validate_recomputation
        memory += ("--kernels.attention", "reference")
    assert on_ranks(ranks, run, written(tmp_path), *BATCHES["divides"], *overrides, *memory) == [0] * ranks
    assert_same_curves(tmp_path, BATCHES["divides"])


@pytest.mark.parametrize(
    "plan, recipe, tolerance",
    [
        ("fsdp-2", "native", 1e-3),
        ("tp-2", "native", 1e-3),
        pytest.param("fsdp-2", "rowwise", 1e-3, marks=pytest.mark.slow),
        pytest.param("fsdp-2", "tensorwise", 2e-2, marks=pytest.mark.slow),
        pytest.param("hsdp-2x2", "tensorwise", 2e-2, marks=pytest.mark.slow),
        pytest.param("hsdp-2x2", "native", 1e-3, marks=pytest.mark.slow),
        pytest.param("tp-2", "rowwise", 2e-2, marks=pytest.mark.slow),
        pytest.param("pp-2", "native", 1e-3, marks=pytest.mark.slow),
        pytest.param("cp-2", "native", 3e-3, marks=pytest.mark.slow),
        pytest.param("ddp-3", "native", 1e-3, marks=pytest.mark.slow),
        pytest.param("fsdp-2-tp-2", "native", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_float8_trains_as_float8_in_one_process_does(tmp_path, plan, recipe, tolerance):
    """Scales of rows, and those that are powers of two, need no other rank; but a rounding may move a number to the
    next of the few in 8 bits.

    Under TP weights are cut before rows are scaled, and tensorwise a rank scales what it has: near, not equal. Under CP
    attention sums its keys in another order, so that more numbers move from the first step on.

    A number that moved is off by a sixteenth, and training amplifies it: what is asked of the first steps cannot be
    asked of the last ones, whatever the processor.
    """
    ranks, overrides = PLANS[plan]
    recipe = ("--float8.recipe", recipe, "--float8.linear_layers", "all")
    shape = (*BATCHES["does not"], *recipe)
    assert on_ranks(ranks, run, written(tmp_path), *shape, *overrides) == [0] * ranks
    assert_same_curves(tmp_path, shape, tolerance=tolerance, later=2e-2)
    assert curves(tmp_path)["loss"] != alone(*BATCHES["does not"])["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_native_float8_trains_alike_where_the_backward_pass_is_split(tmp_path, schedule):
    recipe = ("--float8.recipe", "native", "--float8.linear_layers", "all")
    shape = (*BATCHES["divides"], "--model.num_layers", "4", *recipe)
    plan = (*PLANS["pp-2"][1], "--parallel.pipeline_schedule", schedule)
    assert on_ranks(2, run, written(tmp_path), *shape, *plan) == [0, 0]
    assert_same_curves(tmp_path, shape, tolerance=1e-3, later=2e-2)


CHAINS = {
    "tp-2-fsdp-2, ddp-3, alone": ((4, PLANS["fsdp-2-tp-2"][1]), PLANS["ddp-3"], (1, ())),
    "fsdp-3, pp-2-fsdp-2, cp-2": (PLANS["fsdp-3"], PLANS["fsdp-2-pp-2"], PLANS["cp-2"]),
}


@pytest.mark.slow  # test_reshard.py takes the same chains, and looks at more
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_under_any_other_plan(tmp_path, chain):
    """Each plan loads what the one before wrote; the curves are those of one process that was never stopped."""
    shape, checkpoints = BATCHES["does not"], tmp_path / "run" / "checkpoints"
    config = written(tmp_path)
    for start, (ranks, plan) in zip((0, 3, 6), CHAINS[chain]):
        for later in checkpoints.glob("step-*"):
            if int(later.name.removeprefix("step-")) > start:
                shutil.rmtree(later)
        assert on_ranks(ranks, run, config, *shape, *plan, "--checkpoint.interval", "3") == [0] * ranks
        written_steps = [
            line["step"]
            for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        assert written_steps[-(STEPS - start) :] == list(range(start + 1, STEPS + 1)), "it began elsewhere"
    assert_same_curves(tmp_path, shape)
