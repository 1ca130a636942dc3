"""Engram where ranks share sequences, layers, rows or weights: gradients of one process, from weights that matter."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Parallel, Training
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.dtensor import copy_from_full, local, local_slices
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import ModelAnnexes
from swamla_titan.model.row_table import RowGradient, row_tables
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.parallel.pipeline import ModelStage, Pipeline
from swamla_titan.parallel.row_tables import ShardedRows
from swamla_titan.parallel.stages import runnable_micro_batches
from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.distributed.test_plans import COMMON, written
from tests.distributed.test_row_tables import Exchanges
from tests.train.runs import checkpoint, tensors

T = 24
# Halos of 3 * 4 tokens: more than some ranks hold, and more than a stretch of any.
MODEL = ModelConfig(
    **{"num_layers": 3, "dim": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": T, "ffn_hidden_dim": 96},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "swa_window": 5},
    engram={"layers": [0, 2], "orders": [2, 4], "heads": 2, "d_mem": 32, "table_size": 37},  # type: ignore[arg-type]
)


# Of which a stage has two layers with tables.
DEEP = replace(MODEL, num_layers=8, engram=replace(MODEL.engram, layers=(0, 1, 2, 3, 7)))


def config_of(parallel: dict[str, Any], mode: str = "none", shape: ModelConfig = MODEL) -> Config:
    return Config(
        model=shape,
        training=Training(seq_len=T, compute_dtype="float32", local_batch_size=1, global_batch_size=2),
        parallel=Parallel(**parallel),
        compile=Compile(enabled=False),
        activation_checkpoint=ActivationCheckpoint(mode=mode),
    )


def batches() -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 100, (2, T), generator=draw)
    targets = torch.randint(0, 100, (2, T), generator=draw)
    documents = (torch.rand(2, T, generator=draw) < 0.1).cumsum(dim=1)
    return [MicroBatch(tokens[i : i + 1], targets[i : i + 1], documents[i : i + 1], 1) for i in range(2)]


def reference(shape: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Weights that make each part matter, their gradients, and the loss, of one process."""
    torch.manual_seed(3)
    model = SWAMLAModel(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    total = torch.zeros(())
    for batch in batches():
        loss = model(batch.tokens, batch.targets, batch.document_ids, 2.0 * T)
        loss.backward()
        total += loss.detach()
    tables = row_tables(model)
    for table in tables.values():
        table.gradient.merge()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {
        name: tables[parameter].gradient.dense(len(parameter)) if parameter in tables else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return weights, gradients, total  # type: ignore[return-value]


def errors(
    parallel: dict[str, Any], mode: str = "none", compiled: bool = False, shape: ModelConfig = MODEL
) -> dict[str, float]:
    """How far this rank's shard of each gradient of an annex, and of the embedding, is from one process's."""
    weights, gradients, expected = reference(shape)
    world = init_distributed(Parallel(**parallel))
    model = ParallelModel(config_of(parallel, mode, shape), world)
    for part in model.parts:
        for name, parameter in part.named_parameters():
            copy_from_full(parameter, weights[name.replace("head.weight", "embedding.weight")])
        for _, annex in part.annexes.each() if compiled else ():
            annex.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    copies = world.degrees.data  # each of which is given the same sequences here
    with Exchanges() as through:
        loss = model.train_step(batches(), 2.0 * T * copies)
    found = {
        "loss": (loss - expected).abs().item(),
        "messages too many": too_many(through, model),
        "bytes gathered too many": gathered_too_many(through, model),
    }
    for part in model.parts:
        tables = row_tables(part)
        for name, parameter in part.named_parameters():
            if "annexes" in name or name == "embedding.weight":
                table, whole = tables.get(parameter), gradients[name]
                of_rank = local(parameter)
                own = table.gradient.dense(len(of_rank)) if table else local(parameter.grad)  # type: ignore[arg-type]
                difference = own - whole[local_slices(parameter)]
                found[name] = (difference.norm() / whole.norm()).item()
    if compiled:
        found["graphs beyond one"] = counters["stats"]["unique_graphs"] - 1
        found["breaks"] = sum(counters["graph_break"].values())
    return found


def too_many(through: Exchanges, model: ParallelModel) -> int:
    """Of the collectives of a step, requests beyond two a micro-batch and stage, however many layers look up."""
    shared = [part.annexes.placement for part in model.parts if isinstance(part.annexes.placement, ShardedRows)]
    if not shared:
        return sum(each.name == "alltoall_base_" for each in through.found)
    assert shared[0].requests is not shared[0].group, "what computes would have to wait for the other's"
    runs = runnable_micro_batches(model.config.parallel, 2) if model.pipeline else 2
    return through.groups.count(shared[0].requests.group_name) - 2 * runs * len(shared)


def gathered_too_many(through: Exchanges, model: ParallelModel) -> int:
    """Bytes that all-gathers give beyond those of each weight but the tables, once, with FSDP2's padding.

    Left out are small ones, as those of Python objects by which the ends of a pipeline are compared.
    """
    gathered = sum(each.bytes for each in through.found if "allgather" in each.name and each.bytes > 1000)
    for part in model.parts:
        tables = row_tables(part)
        for weight in part.parameters():
            if weight not in tables and weight.dim() > 1 and isinstance(weight, DTensor):  # others are replicated
                gathered -= weight.element_size() * gathered_by_fsdp(weight)
    return max(gathered, 0)


def gathered_by_fsdp(weight: DTensor) -> int:
    """Elements of a tensor-parallel rank's shard, with rows that FSDP2 pads it by."""
    shape, shards = list(weight.shape), 1
    for name, size, placement in zip(weight.device_mesh.mesh_dim_names, weight.device_mesh.shape, weight.placements):
        if name != "tensor":
            shards *= 1 if placement.is_replicate() else size
        elif not placement.is_replicate():
            shape[placement.dim] //= size
    return -(-shape[0] // shards) * shards * math.prod(shape[1:])


PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, context 2": (4, {"tensor": 2, "context": 2}),
    "pipeline 3": (3, {"pipeline": 3}),
    "context 3": (3, {"context": 3}),
    "tensor 4": (4, {"tensor": 4}),
    "fsdp 3": (3, {}),
    "hsdp 2, shard 2": (4, {"data_parallel": "hsdp", "dp_replicate": 2}),
    "ddp 2, context 2": (4, {"data_parallel": "ddp", "context": 2}),
    "pipeline 2, tensor 2": (4, {"pipeline": 2, "tensor": 2}),
    "fsdp 2, tables on the host": (2, {"tables_on_host": True}),
}


@pytest.mark.parametrize(
    "plan",
    [
        *("tensor 2, context 2", "pipeline 3"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(PLANS)[2:]),
    ],
)
def test_gradients_are_those_of_one_process(plan: str):
    ranks, parallel = PLANS[plan]
    check(on_ranks(ranks, errors, parallel))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])  # of four FSDP2 shards the stages
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_stages_of_several_layers_and_split_backward_passes_give_the_same_gradients(schedule: str, ranks: int):
    plan = {"pipeline": 2, "pipeline_schedule": schedule}
    check(on_ranks(ranks, errors, plan, "none", False, DEEP), layers=5)


@pytest.mark.parametrize(
    "parallel", [{"context": 2}, pytest.param({"tensor": 2, "context": 2}, marks=pytest.mark.slow)], ids=str
)
def test_compiled_annexes_of_all_layers_are_one_graph(parallel: dict[str, Any]):
    check(on_ranks(math.prod(parallel.values()), errors, parallel, "none", True))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_annexes_give_the_same_gradients(mode: str, compiled: bool):
    check(on_ranks(2, errors, {"context": 2}, mode, compiled))


def order_of_evaluation() -> list[str]:
    """What a rank of a pipeline does for three micro-batches: prepare look-ups, and compute."""
    torch.manual_seed(0)
    found: list[str] = []
    prepare, look_up = ModelAnnexes.prepare, ModelAnnexes.look_up

    def preparing(*given: Any) -> Any:
        found.append("prepare")
        return prepare(*given)

    def computing(*given: Any) -> Any:
        found.append("compute")
        return look_up(*given)

    ModelAnnexes.prepare, ModelAnnexes.look_up = preparing, computing  # type: ignore[method-assign]
    try:
        model = ParallelModel(config_of({"pipeline": 2}), init_distributed(Parallel(pipeline=2)))
        model.init_weights(0)
        model.evaluate([*batches(), batches()[0]])
    finally:
        ModelAnnexes.prepare, ModelAnnexes.look_up = prepare, look_up  # type: ignore[method-assign]
    return found


def test_evaluation_in_a_pipeline_prepares_look_ups_ahead():
    order = ["prepare", "prepare", "compute", "prepare", "compute", "compute"]
    assert on_ranks(2, order_of_evaluation) == [order, order], "and prepares none twice"


class _Fails(Exception):
    pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_was_abandoned_adds_nothing_to_the_next(ranks: int):
    on_ranks(ranks, after_abandoned_steps, {"pipeline": 2} if ranks == 2 else {})


def after_abandoned_steps(parallel: dict[str, Any]) -> None:
    world = init_distributed(Parallel(**parallel)) if parallel else World.alone()
    model = ParallelModel(config_of(parallel), world)
    model.init_weights(0)
    stages = [part for part in model.parts if isinstance(part, ModelStage)]

    def gradients() -> list[Tensor]:
        model.train_step(batches(), 2.0 * T)
        found = [table.gradient.dense(len(table.weight)) for part in model.parts for table in row_tables(part).values()]
        for part in model.parts:
            for table in row_tables(part).values():
                table.gradient.clear()
        return found

    def fail(*given: Any) -> None:
        raise _Fails

    expected = gradients()
    assert any(gradient.any() for gradient in expected)
    for owner, method in [(RowGradient, "merge"), *([(Pipeline, "schedule")] if stages else [])]:
        with mock.patch.object(owner, method, fail), pytest.raises(_Fails):
            model.train_step(batches(), 2.0 * T)
        assert not any(list(stage.look_ups) for stage in stages)
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True)), method


ENGRAM = (
    *("--model.engram.layers", "0,2", "--model.engram.heads", "2", "--model.engram.d_mem", "16"),
    *("--model.engram.table_size", "101", "--ema.decay", "0.8", "--data.num_workers", "0"),
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--checkpoint.interval", "3"),
)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [(), ("--parallel.tensor", "2"), ("--parallel.pipeline", "2")], ids=str)
def test_tables_on_the_host_train_by_the_same_bits_and_one_process_continues_either(tmp_path, plan):
    split = ("--training.local_batch_size", "1") if "--parallel.pipeline" in plan else ()

    def trained(name: str, ranks: int, steps: int, on_host: str, *plan: str) -> dict[str, Tensor]:
        where = ("--job.dump_folder", str(tmp_path / name), "--parallel.tables_on_host", on_host)
        settings = (*COMMON, *ENGRAM, *split, *plan, *where, "--training.steps", str(steps))
        assert on_ranks(ranks, run, written(tmp_path), *settings) == [0] * ranks
        return tensors(checkpoint(tmp_path / name, steps))

    for ranks, steps, swapped, of_plan in ((2, 6, False, plan), (1, 9, True, ())):
        one = trained("one", ranks, steps, str(swapped).lower(), *of_plan)
        other = trained("other", ranks, steps, str(not swapped).lower(), *of_plan)
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], each) for name, each in one.items())


def check(of_ranks: list[dict[str, float]], layers: int = 2) -> None:
    assert len({name for found in of_ranks for name in found if "annexes" in name}) == layers * 7
    for rank, found in enumerate(of_ranks):
        for name, error in found.items():
            assert abs(error) < 1e-4, f"rank {rank}, {name}: {error:.1e}"
