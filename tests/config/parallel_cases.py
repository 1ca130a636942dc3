"""The cases of [parallel]: what each key changes on the ranks of a real run.

That every plan computes what one process does is proved in tests/distributed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from swamla_titan.config.sections import Parallel
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel import data_parallel as data_parallel_module
from swamla_titan.parallel.data_parallel import reshards_after_forward
from swamla_titan.parallel.tensor import enable_async_tensor_parallel
from tests.config.runner import Runner

UNITS = 4  # of FSDP2: three blocks, and what lies around them
QKV = "blocks.0.attention.wqkv.weight"  # [192, 64]
FOUR_MICRO_BATCHES = ("--training.global_batch_size", "8", "--training.local_batch_size", "1")  # a rank of two
HSDP = ("--parallel.data_parallel", "hsdp")


def data_parallel(run: Runner) -> None:
    losses = [run("--parallel.data_parallel", plan).series() for plan in ("fsdp", "ddp")]
    assert losses[0] == losses[1]  # one process is one process
    assert 'expected one of "fsdp", "hsdp", "ddp"' in run.refusal("--parallel.data_parallel", "zero3")
    for plan, rows in (("fsdp", 96), ("ddp", 192)):
        one, other = run.on_ranks(2, "--parallel.data_parallel", plan)
        assert one.shapes[QKV] == other.shapes[QKV] == (rows, 64)
        assert (one.parts == other.parts) == (plan == "ddp")
        assert not any(row in other.tokens[0] for row in one.tokens[0])  # they read different sequences


def dp_shard(run: Runner) -> None:
    assert "0: expected a number of ranks" in run.refusal("--parallel.dp_shard", "0")
    for number, degrees in ((2, "2"), (3, "-1")):
        for seen in run.on_ranks(number, "--parallel.dp_shard", degrees):
            assert seen.shapes[QKV] == (192 // number, 64)
    misfit = run.refusal_on_ranks(2, "--parallel.dp_shard", "3")
    assert "the degrees dp_shard 3 = 3 do not fit 2 processes: start 3, or let dp_shard x dp_replicate be 2" in misfit


def dp_replicate(run: Runner) -> None:
    assert 'data_parallel = "fsdp" keeps one copy' in run.refusal("--parallel.dp_replicate", "2")
    seen = run.on_ranks(4, *HSDP, "--parallel.dp_replicate", "-1", "--parallel.dp_shard", "2")
    assert {rank.shapes[QKV] for rank in seen} == {(96, 64)}
    assert seen[0].parts == seen[2].parts != seen[1].parts == seen[3].parts  # two copies, two parts each
    assert "the degrees dp_replicate 3 = 3 do not fit 2" in run.refusal_on_ranks(
        2, "--parallel.data_parallel", "ddp", "--parallel.dp_replicate", "3"
    )


def tensor(run: Runner) -> None:
    assert "expected a whole number >= 1" in run.refusal("--parallel.tensor", "0")
    one, other = run.on_ranks(2, "--parallel.tensor", "2")
    assert one.tokens == other.tokens  # they compute the same sequences
    assert one.shapes[QKV] == other.shapes[QKV] == (96, 64)
    assert one.shapes["blocks.0.attention.wo.weight"] == (64, 32)  # one of two heads
    assert one.block_inputs == {(2, 32, 64)}  # and half of the tokens between the products


def context(run: Runner) -> None:
    assert "expected a whole number >= 1" in run.refusal("--parallel.context", "0")
    seen = run.on_ranks(2, "--parallel.context", "2")
    assert {shape for rank in seen for shape in rank.block_inputs} == {(2, 32, 64)}
    assert {rank.shapes[QKV] for rank in seen} == {(96, 64)}  # they share the weights as well


def pipeline(run: Runner) -> None:
    assert "expected a whole number >= 1" in run.refusal("--parallel.pipeline", "0")
    one, other = run.on_ranks(2, "--parallel.pipeline", "2")
    assert [name for rank in (one, other) for part in rank.blocks for name in part] == ["0", "1", "2"]
    assert 0 < len(one.blocks[0]) < 3
    assert one.tokens
    assert not other.tokens  # the second stage is fed activations
    assert {rank.shapes[QKV] for rank in (one, other) if QKV in rank.shapes} == {(192, 64)}


def reshard_after_forward(run: Runner) -> None:
    gathers = {}
    for policy in ("auto", "always", "never"):
        seen = run.on_ranks(2, "--parallel.reshard_after_forward", policy, "--validation.interval", "0")
        assert set(seen[0].gathered) == {policy != "always"}
        gathers[policy] = seen[0].collectives["allgather"]
    micro_batches = 2
    # For each pass of a block, and what lies around them for both; kept weights once a step.
    assert gathers["always"] - gathers["never"] == micro_batches * (UNITS + UNITS - 1) - UNITS
    assert gathers["auto"] == gathers["never"]  # of a model this small
    gathers = {}
    for rows in ("4", "1"):  # 1 and 4 micro-batches a step
        batch = ("--training.global_batch_size", "8", "--training.local_batch_size", rows)
        gathers[rows] = run.on_ranks(2, *batch, "--validation.interval", "0")[0].collectives["allgather"]
    assert gathers["1"] == gathers["4"]  # what is kept is kept for all of a step
    assert not reshards_after_forward(Parallel(), 2**32)
    assert reshards_after_forward(Parallel(), 2**32 + 1)
    assert not reshards_after_forward(Parallel(pipeline=2), 2**32 + 1)
    assert not reshards_after_forward(Parallel(reshard_after_forward="never"), 2**32 + 1)
    seen = run.on_ranks(4, "--parallel.pipeline", "2", "--training.local_batch_size", "1")
    assert all(rank.gathered and all(rank.gathered) for rank in seen)  # auto, under a pipeline


def reduce_every_micro_batch(run: Runner) -> None:
    for every, reductions in (("false", UNITS), ("true", 4 * UNITS)):
        for seen in run.on_ranks(2, *FOUR_MICRO_BATCHES, "--parallel.reduce_every_micro_batch", every):
            assert seen.collectives["reduce_scatter"] == reductions


def cpu_offload(run: Runner) -> None:
    """On a CPU it is refused; what a GPU's `fully_shard` would be told is asked of a stand-in for it."""
    if not torch.cuda.is_available():
        assert "parallel.cpu_offload = true needs GPUs" in run.refusal("--parallel.cpu_offload", "true")
    with torch.device("meta"):
        model = SWAMLAModel(ModelConfig(num_layers=3, dim=64, num_heads=2, vocab_size=50))
    for wanted, policy in ((True, CPUOffloadPolicy), (False, OffloadPolicy)):
        given: list[Any] = []
        whole: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                data_parallel_module,
                "fully_shard",
                lambda *_, offload_policy, ignored_params, given=given, whole=whole, **__: (
                    given.append(offload_policy),
                    whole.append(len(ignored_params)),
                ),
            )
            mesh: Any = None  # nothing is sharded
            data_parallel_module.wrap(model, Parallel(cpu_offload=wanted), mesh, torch.float32)
        assert [type(each) for each in given] == [policy] * UNITS
        norms = sum(weight.ndim < 2 for weight in model.parameters())
        assert norms > 0
        assert whole == [0 if wanted else norms] * UNITS  # offloaded norms are FSDP2's to bring, like all weights


def tables_on_host(run: Runner) -> None:
    """Weight, moments and average are made where a GPU would have the host's memory, and end with the same bits."""
    engram = ("--model.engram.layers", "1", "--model.engram.d_mem", "64", "--model.engram.table_size", "50")
    average = ("--ema.decay", "0.9", "--validation.use_ema", "true", "--validation.interval", "1")
    settings = (*engram, *average, "--parallel.tables_on_host")
    made: list[tuple[int, ...]] = []
    read: list[int] = []

    def copy_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        read.append(len(rows))
        return table[rows]

    def zeros_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(tuple(shape))
        return torch.zeros(shape, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swamla_titan.model.row_table.zeros_on_host", zeros_on_host)
        patch.setattr("swamla_titan.model.row_table.copy_rows", copy_rows)
        on_device = run(*settings, "false")
        assert made == read == []
        result = run(*settings, "true")
    found = result.tensors()
    assert result.series("val_loss") == on_device.series("val_loss")
    assert made == [tuple(found["model.annexes.1.engram.table.weight"].shape)] * 4
    assert all(torch.equal(found[name], each) for name, each in on_device.tensors().items())
    assert len(read) == sum(call.training for call in result.calls), "rows of each micro-batch are read ahead"
    assert "tables: in the memory of the host, at most 0.00 GiB" in (result.folder / "logs/rank-0.log").read_text()
    assert "has no effect" in run.refusal("--parallel.tables_on_host", "true")
    dense = run.refusal(*engram, "--parallel.tables_on_host", "true", "--optimizer.lazy_tables", "false")
    assert "false would read and write all rows in the memory of the host" in dense


def async_tensor(run: Runner) -> None:
    """On a CPU it is refused; on GPUs the compiler's pass is switched on, for the ranks of the mesh."""
    if not torch.cuda.is_available():
        overrides = ("--parallel.tensor", "2", "--parallel.async_tensor", "true", "--compile.enabled", "true")
        assert "parallel.async_tensor = true needs GPUs" in run.refusal_on_ranks(2, *overrides)
    groups: list[str] = []
    mesh: Any = SimpleNamespace(device_type="cuda", get_group=lambda: SimpleNamespace(group_name="tensor ranks"))
    with pytest.MonkeyPatch.context() as patch, inductor.patch(_micro_pipeline_tp=False):
        patch.setattr(symmetric_memory, "enable_symm_mem_for_group", groups.append)
        enable_async_tensor_parallel(mesh)
        assert inductor._micro_pipeline_tp
    assert groups == ["tensor ranks"]


def pipeline_schedule(run: Runner) -> None:
    settings = ("--parallel.pipeline", "2", "--model.num_layers", "4", "--training.local_batch_size", "1")
    for schedule, parts, has_last in (
        ("GPipe", 1, False),
        ("InterleavedZeroBubble", 2, False),
        ("ZBVZeroBubble", 2, True),  # there and back: the first rank has the last stage too
    ):
        first, second = run.on_ranks(2, *settings, "--parallel.pipeline_schedule", schedule)
        assert first.schedules == second.schedules == {f"Schedule{schedule}"}
        assert len(first.blocks) == len(second.blocks) == parts
        assert "0" in first.blocks[0]
        assert ("3" in first.blocks[-1]) == has_last


def pipeline_stages_per_rank(run: Runner) -> None:
    settings = (
        "--parallel.pipeline",
        "2",
        "--model.num_layers",
        "6",
        "--parallel.pipeline_schedule",
        "Interleaved1F1B",
    )
    for given, stages in (("0", 2), ("3", 3)):
        for rank in run.on_ranks(2, *settings, "--parallel.pipeline_stages_per_rank", given):
            assert len(rank.blocks) == stages


PARALLEL_CASES: dict[str, Callable[[Runner], None]] = {
    f"parallel.{case.__name__}": case
    for case in (
        data_parallel,
        dp_shard,
        dp_replicate,
        tensor,
        context,
        pipeline,
        reshard_after_forward,
        reduce_every_micro_batch,
        cpu_offload,
        tables_on_host,
        async_tensor,
        pipeline_schedule,
        pipeline_stages_per_rank,
    )
}
