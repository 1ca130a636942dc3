"""Look-ups that are prepared ahead, on GPUs: values and gradients of tables that no rank shares, without waiting."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.config.sections import Parallel
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.dtensor import local
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import PreparedLookUp
from swamla_titan.model.row_table import row_tables
from swamla_titan.parallel.row_tables import ShardedRows, look_ups_ahead, rows_of_rank, shard_row_tables
from tests.distributed.ranks import on_ranks

T, STEPS = 256, 3
SMALL = ModelConfig(
    **{"num_layers": 4, "dim": 128, "num_heads": 4, "vocab_size": 1000, "max_seq_len": T, "ffn_hidden_dim": 192},
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "swa_window": 64},
    engram={"layers": [0, 2, 3], "heads": 2, "d_mem": 32, "table_size": 5003},  # type: ignore[arg-type]
)
SECONDS_OF_CYCLES = 2_000_000_000


def micro_batches(rank: int, device: torch.device) -> list[MicroBatch]:
    """In page-locked memory if there is a GPU, as a loader gives them."""
    draw = torch.Generator().manual_seed(rank)
    drawn = torch.randint(0, 1000, (STEPS, 2, 4, T), generator=draw)
    documents = (torch.rand(STEPS, 4, T, generator=draw) < 0.02).cumsum(dim=-1)
    locked = (lambda each: each.clone().pin_memory()) if device.type == "cuda" else torch.clone
    return [MicroBatch(locked(t), locked(y), locked(d), 4) for (t, y), d in zip(drawn, documents)]


def built(device: torch.device) -> SWAMLAModel:
    torch.manual_seed(0)
    model = SWAMLAModel(SMALL).to(device)
    model.attention_backend = "reference"
    with torch.no_grad():
        for table in row_tables(model).values():
            table.weight.normal_()
    return model


def shared(size: int) -> tuple[SWAMLAModel, torch.device, int]:
    """The model with the tables of `built` shared; one rank alone shares them with nobody, by the same code."""
    if size == 1:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        groups, rank, model = [dist.new_group([0]) for _ in range(2)], 0, built(device)
        placement = ShardedRows(*groups, device)
        for table in row_tables(model).values():
            table.placement = placement
        return model, device, rank
    world = init_distributed(Parallel()).with_request_group()
    full = built(world.device)
    with torch.device("meta"):
        model = SWAMLAModel(SMALL)
    shard_row_tables(model, Parallel(), world)
    model.to_empty(device=world.device)
    model.attention_backend = "reference"
    for ours, theirs in zip(model.parameters(), full.parameters(), strict=True):
        own = rows_of_rank(len(theirs), world.size, world.rank)
        local(ours).data.copy_(theirs[own.start : own.stop] if local(ours).shape != theirs.shape else theirs)
    return model, world.device, world.rank


def inputs(
    model: SWAMLAModel, batches: list[MicroBatch], device: torch.device, ahead: bool
) -> Iterator[tuple[MicroBatch, PreparedLookUp | None]]:
    on_device = (batch.to(device) for batch in batches)
    return look_ups_ahead(model.annexes, on_device) if ahead else ((batch, None) for batch in on_device)


def passes(model: SWAMLAModel, batches: list[MicroBatch], device: torch.device, ahead: bool) -> list[Tensor]:
    losses = []
    for batch, prepared in inputs(model, batches, device, ahead):
        loss = model(batch.tokens, batch.targets, batch.document_ids, prepared=prepared)
        loss.backward()
        losses.append(loss.detach())
    return losses


def gradients(model: SWAMLAModel) -> list[Tensor]:
    tables = row_tables(model)
    for table in tables.values():
        table.gradient.merge()
    return [
        table.gradient.dense(len(local(weight))) if (table := tables.get(weight)) else weight.grad
        for weight in model.parameters()
    ]


def as_one_process(size: int) -> None:
    model, device, rank = shared(size)
    alone = built(device)
    losses = passes(model, micro_batches(rank, device), device, ahead=True)
    for other in range(size):
        expected = passes(alone, micro_batches(other, device), device, ahead=False)
        if other == rank:
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    for weight, found, expected in zip(weights, gradients(model), gradients(alone), strict=True):
        if weight in row_tables(model):
            own = rows_of_rank(len(expected), size, rank)
            torch.testing.assert_close(found, expected[own.start : own.stop], rtol=1e-4, atol=1e-6)
        elif size == 1:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def while_the_gpu_is_busy(size: int) -> None:
    model, device, rank = shared(size)
    batches = micro_batches(rank, device)
    was_busy = []
    for ahead in (False, True, True, False):  # the first two times memory is allocated, for which the host may wait
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        torch.cuda._sleep(2 * SECONDS_OF_CYCLES)
        done.record()
        torch.cuda.set_sync_debug_mode("error" if len(was_busy) > 1 else "default")
        try:
            # Not the whole model, because the host waits where 1,024 launches are queued.
            for batch, prepared in inputs(model, batches, device, ahead):
                model.annexes.look_up(batch.tokens, batch.document_ids, torch.float32, prepared=prepared)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        was_busy.append(not done.query())
    assert was_busy[2:] == [True, False], "prepared ahead the host queues all micro-batches; at once it has to wait"


SIZES = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_look_ups_ahead_give_what_one_process_looks_up(size: int):
    on_ranks(size, as_one_process, size)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_the_host_does_not_wait_for_what_computes(size: int):
    on_ranks(size, while_the_gpu_is_busy, size)
