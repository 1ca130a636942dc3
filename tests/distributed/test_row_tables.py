"""Tables whose rows ranks share: the values, gradients and training of one process; checkpoints for other ranks."""

import contextlib
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swamla_titan.model.init
from swamla_titan.config import Config
from swamla_titan.config.sections import EMA, Checkpoint, Optimizer, Parallel
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World, fake_world
from swamla_titan.errors import UserError
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.model.row_table import RowTable, look_up, request_rows
from swamla_titan.optim import AveragedWeights, build_optimizer
from swamla_titan.parallel.row_tables import (
    ShardedRows,
    bytes_on_host,
    rows_of_rank,
    shard_row_tables,
    validate_host_memory,
)
from swamla_titan.tools.generate import load_model
from tests.distributed.job import run_killed
from tests.distributed.ranks import on_ranks
from tests.distributed.table_model import models_with_tables, run_with_tables
from tests.distributed.test_optimizer_checkpoints import loaded_and_saved
from tests.distributed.test_plans import BATCHES, PLANS, curves, written
from tests.distributed.test_plans import COMMON as OF_PLANS
from tests.train.faults import Fault, run_with_faults
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, tensors

WIDTH = 5
GPU = torch.device("cuda", 0)


def sharded_table(rows: int, world: World) -> tuple[RowTable, Tensor]:
    """A table that the ranks share, in float64, and all of its values."""
    model = torch.nn.Module()
    with torch.device("meta"):
        model.table = RowTable(rows, WIDTH).double()
    shard_row_tables(model, Parallel(), world)
    model.to_empty(device=world.device)
    full = torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(world.device)
    with torch.no_grad():
        own = rows_of_rank(rows, world.size, world.rank)
        local(model.table.weight).copy_(full[own.start : own.stop])
    return model.table, full


def indices_of(rank: int, micro_batch: int, rows: int) -> Tensor:
    """Of another number on each rank; in micro-batch 2 all ask for one row, in 3 rank 0 for none, in 4 nobody."""
    generator = torch.Generator().manual_seed(10 * micro_batch + rank)
    drawn = torch.randint(0, rows, (2, 3 + rank, 2), generator=generator)
    if micro_batch > 2:
        return drawn[:, :0] if micro_batch > 3 or rank == 0 else drawn
    return drawn if micro_batch < 2 else torch.full_like(drawn, rows - 1)


def pull(found: Tensor) -> Tensor:
    factors = torch.arange(found.numel(), device=found.device).view_as(found).cos()
    return (found * factors).sum() + found.square().sum()


def _looked_up(rows: int) -> None:
    world = init_distributed(Parallel())
    table, full = sharded_table(rows, world)
    for micro_batch in range(5):
        indices = indices_of(world.rank, micro_batch, rows).to(world.device)
        found = table(indices)
        assert torch.equal(found, full[indices])
        assert torch.equal(table(indices, torch.bfloat16), full[indices].bfloat16())
        pull(found).backward()
    table.gradient.merge()
    leaf = full.clone().requires_grad_()
    every = [indices_of(rank, batch, rows).to(full.device) for rank in range(world.size) for batch in range(5)]
    torch.stack([pull(F.embedding(each, leaf)) for each in every]).sum().backward()
    assert leaf.grad is not None
    own = rows_of_rank(rows, world.size, world.rank)
    expected = leaf.grad[own.start : own.stop]
    torch.testing.assert_close(table.gradient.dense(len(own)), expected, rtol=0, atol=1e-12)
    assert table.gradient.sums is not None
    squares = table.gradient.sums.square().sum()
    dist.all_reduce(squares)
    torch.testing.assert_close(squares, leaf.grad.square().sum())


@pytest.mark.parametrize("size, rows", [(2, 37), (3, 37), (3, 4), (3, 1)])
def test_look_ups_and_gradients_are_those_of_one_process(size, rows):
    """4 rows: 2, 2 and none; 1: two ranks have none."""
    on_ranks(size, _looked_up, rows)


def _looked_up_together(sizes: tuple[int, ...]) -> None:
    """The first table has the width of one number, the next of two, and so on."""
    world = init_distributed(Parallel()).with_request_group()
    model = torch.nn.Module()
    with torch.device("meta"):
        model.tables = torch.nn.ModuleList(RowTable(rows, width) for width, rows in enumerate(sizes, 1)).double()
    shard_row_tables(model, Parallel(), world)
    model.to_empty(device=world.device)
    tables: list[RowTable] = list(model.tables)
    leaves = []
    for rows, table in zip(sizes, tables):
        draw = torch.Generator().manual_seed(rows)
        full = torch.randn(rows, table.weight.shape[1], dtype=torch.float64, generator=draw).to(world.device)
        own = rows_of_rank(rows, world.size, world.rank)
        local(table.weight).data.copy_(full[own.start : own.stop])
        leaves.append(full.requires_grad_())

    def indices(rank: int, micro_batch: int) -> list[Tensor]:
        return [indices_of(rank, (micro_batch + t) % 5, rows).to(world.device) for t, rows in enumerate(sizes)]

    placement = tables[0].placement
    assert isinstance(placement, ShardedRows)
    for micro_batch in range(5):
        with Exchanges() as through:
            request = request_rows(tables, indices(world.rank, micro_batch))
            assert through.groups == [placement.requests.group_name], "counts, once for all tables"
            found = look_up(tables, request, torch.float64)
            expected = [each.group_name for each in (placement.requests, placement.requests, placement.group)]
            assert through.groups == expected, "which rows, and the rows"
            torch.stack([pull(each) for each in found]).sum().backward()
            assert through.groups[3:] == [placement.group.group_name] * len(tables)
        assert {each.name for each in through.found} == {"alltoall_base_"}, "no table is gathered or reduced"
        for values, leaf, looked_up in zip(found, leaves, indices(world.rank, micro_batch)):
            assert torch.equal(values, leaf[looked_up])
    every = [indices(rank, batch) for rank in range(world.size) for batch in range(5)]
    torch.stack([pull(F.embedding(i, leaf)) for each in every for i, leaf in zip(each, leaves)]).sum().backward()
    for rows, table, leaf in zip(sizes, tables, leaves):
        assert leaf.grad is not None
        own = rows_of_rank(rows, world.size, world.rank)
        table.gradient.merge()
        expected = leaf.grad[own.start : own.stop]
        torch.testing.assert_close(table.gradient.dense(len(own)), expected, rtol=0, atol=1e-12)


class Exchange(NamedTuple):
    """A collective: the name of its operator, its group, and the bytes that it gives."""

    name: str
    group: str
    bytes: int


class Exchanges(TorchDispatchMode):
    """Within, collects the collectives of torch.distributed; those in compiled graphs are others."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Exchange] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing would be compiled within

    @property
    def groups(self) -> list[str]:
        """The name of each collective's group."""
        return [each.group for each in self.found]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(each for each in args if isinstance(each, torch.ScriptObject))
            given = sum(each.nbytes for each in tree_leaves(args[0]))
            name = dist.ProcessGroup.unbox(group).group_name
            self.found.append(Exchange(func._schema.name.removeprefix("c10d::"), name, given))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [2, 3])
def test_several_tables_are_looked_up_in_the_messages_of_one(size):
    """In each micro-batch another of them is one of which a rank, or nobody, asks for a row; 1 row is on one rank."""
    on_ranks(size, _looked_up_together, (37, 1, 4, 101))


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=TWO_GPUS) for rows in (5000, 1)])
def test_gpus_look_up_and_give_gradients_as_one_process_does(rows):
    on_ranks(2, _looked_up, rows)


@pytest.mark.parametrize("sizes", [pytest.param((5000, 1, 40, 20_000), marks=TWO_GPUS)])
def test_gpus_look_up_several_tables_in_the_messages_of_one(sizes):
    on_ranks(2, _looked_up_together, sizes)


@pytest.mark.parametrize("trained", [True, False])
def test_rows_that_are_shared_are_trained_if_the_table_was(trained):
    model = torch.nn.Module()
    with torch.device("meta"):
        model.table = RowTable(7, WIDTH).requires_grad_(trained)
    with fake_world(Degrees(shard=2), "fsdp", 0) as world:
        shard_row_tables(model, Parallel(), world)
        assert local(model.table.weight).shape == (4, WIDTH)
        assert model.table.weight.requires_grad == trained


def test_a_rank_keeps_its_rows_on_the_host_with_their_moments_and_average(monkeypatch):
    made: list[tuple[int, ...]] = []

    def zeros_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(tuple(shape))
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr("swamla_titan.model.row_table.zeros_on_host", zeros_on_host)
    model = torch.nn.Module()
    with torch.device("meta"):
        model.table = RowTable(7, WIDTH)
    with fake_world(Degrees(shard=2), "fsdp", 1) as world:
        shard_row_tables(model, Parallel(tables_on_host=True), world)
        assert made == []
        model.to_empty(device=world.device)
        state = build_optimizer(model, Optimizer(), world.stage_group).state[model.table.weight]
        average = AveragedWeights([model], 0.9)
        assert made == [(3, WIDTH)] * 4
        held = [model.table.weight, state["exp_avg"], state["exp_avg_sq"], average.of_part(model)["table.weight"]]
        assert [tuple(each.shape) for each in held] == [(7, WIDTH)] * 4
        config = Config(ema=EMA(0.9), parallel=Parallel(tables_on_host=True))
        assert bytes_on_host(model, config) == sum(local(each.detach()).nbytes for each in held)
        assert bytes_on_host(model, Config(ema=EMA(0.9))) == 0


def test_tables_that_the_machines_memory_cannot_hold_are_refused_with_the_numbers(monkeypatch):
    engram = EngramConfig((1,), d_mem=512, table_size=1_000_000)  # 8 tables of rows of 64: 2 GB, and 4 GB of moments
    config = Config(
        model=ModelConfig(engram=engram),
        parallel=Parallel(tables_on_host=True),
        checkpoint=Checkpoint(async_mode="disabled"),
    )
    world = World.planned(Degrees(shard=4), GPU)
    for ranks, free, is_refused in (("4", 5, True), ("4", 6, False), ("2", 2, True), ("2", 3, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr("swamla_titan.parallel.row_tables.free_memory", lambda free=free: free << 30)
        message = f"of the {ranks} rank.* take {'5.7' if ranks == '4' else '2.9'} GiB .* and {free}.0 are free"
        with pytest.raises(UserError, match=message) if is_refused else contextlib.nullcontext():
            validate_host_memory(config, world)
    monkeypatch.setattr("swamla_titan.parallel.row_tables.free_memory", lambda: 5 << 30)
    with pytest.raises(UserError, match=r"2.9 GiB .* as much for copies .* 5.0 are free: set checkpoint.async_mode"):
        validate_host_memory(replace(config, checkpoint=Checkpoint()), world)
    for other in (replace(world, device=torch.device("cpu")), World.planned(Degrees(shard=2, pipeline=2), GPU)):
        monkeypatch.setattr("swamla_titan.parallel.row_tables.free_memory", lambda: 0)
        validate_host_memory(config, other)
    validate_host_memory(Config(model=config.model), world)


def _drawn(block: int) -> None:
    swamla_titan.model.init.ROWS_OF_A_BLOCK = block
    world = init_distributed(Parallel())
    table, _ = sharded_table(37, world)
    holder = torch.nn.Module()
    holder.table = table.float()
    draws = swamla_titan.model.init.initial_draws
    one = torch.nn.Module()
    one.table = RowTable(37, WIDTH).to(world.device)
    with torch.no_grad():
        for model in (holder, one):
            for draw in draws(model, 1, False, 7, lambda *_: None):
                draw()
    assert torch.equal(holder.table.weight.full_tensor(), one.table.weight)  # type: ignore[operator]
    assert 0.01 < one.table.weight.std() < 0.03


@pytest.mark.parametrize("block", [8, 64])
def test_each_rank_draws_the_initial_values_of_its_rows(block):
    on_ranks(3, _drawn, block)


SPLIT = ("--training.local_batch_size", "1", "--model.num_layers", "4", "--parallel.pipeline_schedule")
OF_TABLES = PLANS | {
    "zbv-2": (2, ("--parallel.pipeline", "2", *SPLIT, "ZBVZeroBubble")),
    "izb-2": (2, ("--parallel.pipeline", "2", *SPLIT, "InterleavedZeroBubble")),
}
IN_CI = {"fsdp-3", "zbv-2"}


@functools.cache
def alone(*overrides: str) -> dict[str, dict[int, float]]:
    with tempfile.TemporaryDirectory() as folder:
        assert on_ranks(1, run_with_tables, written(Path(folder)), *OF_PLANS, *overrides) == [0]
        return curves(Path(folder))


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=[] if plan in IN_CI else [pytest.mark.slow]) for plan in OF_TABLES]
)
def test_a_plan_trains_tables_as_one_process_does(tmp_path, plan):
    ranks, parallel = OF_TABLES[plan]
    layers = ("--model.num_layers", "4") if SPLIT[2] in parallel else ()
    shape = (*BATCHES["does not"], *layers)
    assert on_ranks(ranks, run_with_tables, written(tmp_path), *OF_PLANS, *shape, *parallel) == [0] * ranks
    found = curves(tmp_path)
    for name, values in alone(*shape).items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("plan", [pytest.param(plan, marks=TWO_GPUS) for plan in ("fsdp-2-every", "tp-2", "pp-2")])
def test_on_gpus_a_plan_trains_tables_as_one_gpu_does(tmp_path, plan):
    shape = (*BATCHES["does not"], "--training.fp32_precision", "ieee")
    assert on_ranks(2, run_with_tables, written(tmp_path), *OF_PLANS, *shape, *PLANS[plan][1]) == [0, 0]
    found = curves(tmp_path)
    for name, values in alone(*shape).items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


COMMON = (
    *("--data.num_workers", "0", "--validation.interval", "0", "--model.dropout", "0", "--ema.decay", "0.8"),
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--checkpoint.interval", "2"),
)
MOMENTS = {"exp_avg", "exp_avg_sq", "touched"}


def _loaded_and_saved(*arguments: Any) -> None:
    with models_with_tables():
        loaded_and_saved(*arguments)


def test_what_2_ranks_wrote_3_and_1_read_bit_for_bit(tmp_path):
    config, settings = written(tmp_path), [*COMMON, "--training.steps", "2"]
    assert on_ranks(2, run_with_tables, config, *settings) == [0, 0]
    first = before = checkpoint(tmp_path / "run", 2)
    for ranks in (3, 1):
        after = tmp_path / f"by-{ranks}"
        on_ranks(ranks, _loaded_and_saved, config, str(before), str(after), settings)
        before = after
    expected, found = tensors(first), tensors(before)
    for table, rows in (("token_table", 101), ("layer_table", 2)):
        held = {name for name in found if f"{table}.weight" in name}
        state = {f"optimizer.state.{table}.weight.{each}" for each in (*MOMENTS, "step")}
        average = {f"ema.{table}.weight{each}" for each in ("", ".log_decay_of_rows", ".log_decay")}
        assert held == state | average | {f"model.{table}.weight"}
        assert {found[name].shape[0] for name in held if found[name].ndim} == {rows}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_run_on_2_then_3_then_1_ranks_learns_what_one_process_does(tmp_path):
    config, whole = written(tmp_path), tmp_path / "whole"
    for ranks, steps in ((2, 2), (3, 4), (1, 6)):
        assert on_ranks(ranks, run_with_tables, config, *COMMON, "--training.steps", str(steps)) == [0] * ranks
    assert on_ranks(1, run_with_tables, config, *COMMON, "--training.steps", "6", "--job.dump_folder", str(whole)) == [
        0
    ]
    for name in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(whole, name), rel=1e-5)
    for name in ("table_rows_touched", "table_rows_touched_since_last_log"):
        shares = metrics(tmp_path / "run", name)
        assert shares == metrics(whole, name)
        assert all(0 < share < 1 for share in shares.values())
    expected, found = (tensors(checkpoint(folder, 6)) for folder in (whole, tmp_path / "run"))
    torch.testing.assert_close(
        found["model.token_table.weight"], expected["model.token_table.weight"], rtol=0, atol=1e-4
    )


def _killed_with_tables(step: int, config: str, *overrides: str) -> int:
    with models_with_tables():
        return run_killed(step, config, *overrides)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_job_continues_bit_for_bit(tmp_path, size):
    config, whole = written(tmp_path), tmp_path / "whole"
    settings = (*COMMON, "--training.steps", "4")
    assert on_ranks(size, run_with_tables, config, *settings, "--job.dump_folder", str(whole)) == [0] * size
    with pytest.raises(AssertionError, match="died"):
        on_ranks(size, _killed_with_tables, 4, config, *settings, "--checkpoint.async_mode", "disabled")
    assert on_ranks(size, run_with_tables, config, *settings) == [0] * size
    assert "resumed from" in (tmp_path / "run/logs/rank-0.log").read_text()
    assert_same_checkpoint(checkpoint(tmp_path / "run", 4), checkpoint(whole, 4))


def _with_faults(faults: tuple[Fault, ...], config: str, *overrides: str) -> int:
    with models_with_tables():
        return run_with_faults(faults, (), config, *overrides).code


def test_a_bad_step_changes_no_row_and_a_rewind_restores_them(tmp_path):
    """Steps 3 and 4 are bad; at the end of 5 the run goes back to what step 1 made."""
    policy = ("--fault_tolerance.max_bad_steps", "2", "--fault_tolerance.max_rewinds", "1")
    faults = (Fault(3, "nan gradient"), Fault(4, "nan gradient"))
    settings = (*COMMON, *policy, "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0")
    assert on_ranks(2, _with_faults, faults, written(tmp_path), *settings, "--training.steps", "7") == [0, 0]
    at = {step: tensors(checkpoint(tmp_path / "run", step)) for step in range(1, 8)}
    for name in (name for name in at[2] if "table" in name):
        assert torch.equal(at[3][name], at[2][name]), "a bad step"
        assert torch.equal(at[5][name], at[1][name]), "the rewind"
        assert not torch.equal(at[2][name], at[1][name])
        assert not torch.equal(at[6][name], at[5][name])


def _averages_of(paths: list[Path]) -> list[list[list[float]]]:
    """The average of the first table as `generate --ema` loads it, from each checkpoint."""
    with models_with_tables():
        models: list[Any] = [load_model(path, ema=True).model for path in paths]
    return [model.token_table.weight.tolist() for model in models]


def test_the_average_of_a_checkpoint_is_that_of_a_pass_over_the_table_in_each_step(tmp_path):
    settings = (*COMMON, "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0", "--training.steps", "5")
    assert on_ranks(2, run_with_tables, written(tmp_path), *settings) == [0, 0]
    paths = [checkpoint(tmp_path / "run", step) for step in range(1, 6)]
    mean, *of_later = torch.tensor(on_ranks(1, _averages_of, paths)[0])
    for step, (path, found) in enumerate(zip(paths[1:], of_later), 2):
        weight = tensors(path)["model.token_table.weight"]
        mean += (1 - min(0.8, (1 + step) / (10 + step))) * (weight - mean)
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-7)
