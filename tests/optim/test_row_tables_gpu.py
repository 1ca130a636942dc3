"""Row tables on a GPU, compiled as in training: the steps of a CPU, without waiting, and the same bits again."""

import pytest
import torch
from torch import Tensor, nn

from swamla_titan.config.sections import Optimizer
from swamla_titan.kernels.rows import copy_rows
from swamla_titan.model.row_table import LocalRows, RowRequest, RowSteps, RowTable, look_up, request_rows
from swamla_titan.optim import (
    AveragedWeights,
    build_optimizer,
    clip_divisor,
    gradient_norm,
)

pytestmark = pytest.mark.gpu

ROWS, WIDTH, STEPS = 20_000, 48, 5


def trained(
    device: str, compiled: bool, lazy: bool = True, dtype: torch.dtype = torch.float32, on_host: bool = False
) -> list[Tensor]:
    """The weight, its optimizer state and its average after some steps, of which all but the first must not wait."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    with torch.device("meta"):
        model.table = table = RowTable(ROWS, WIDTH)
    if on_host:
        table.keep_on_host(torch.device(device, 0))
        table.placement = LocalRows(torch.device(device, 0))
    model.to_empty(device=device)
    with torch.no_grad():
        table.weight.copy_(torch.empty(ROWS, WIDTH).normal_(std=0.02, generator=generator))
    optimizer = build_optimizer(model, Optimizer(lazy_tables=lazy), compiled=compiled)
    average = AveragedWeights([model], 0.9, compiled, lazy)
    average.restart()
    # A third of the look-ups are of one row.
    drawn = [torch.randint(-ROWS // 2, ROWS, (2, 4096, 3), generator=generator).clamp(min=0) for _ in range(STEPS)]
    pulls = [torch.randn(2, 4096, 3, WIDTH, generator=generator).to(device, dtype) for _ in range(STEPS)]
    flags = [torch.tensor(float(step == 2), device=device) for step in range(STEPS)]
    batches = [indices.to(device) for indices in drawn]

    def requests(indices: Tensor) -> tuple[list[RowRequest], list[Tensor]]:
        """Of a step's micro-batches, whose rows are read ahead where they are on the host; and tensors of theirs."""
        with table.placement.ahead():
            made = [request_rows([table], [one]) for one in indices]
            return made, [tensor for each in made for tensor in (*each.rows(), *each.read_ahead([table]))]

    torch.cuda.synchronize()
    following = requests(batches[0])
    for step, (pull, flag) in enumerate(zip(pulls, flags)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            asked, tensors = following
            table.placement.hand_over(tensors)
            for request, other in zip(asked, pull):
                [found] = look_up([table], request, dtype)
                (found * other).sum().backward()
            if on_host:
                torch.cuda._sleep(20_000_000)  # so that the rows of the next step are read before and in this update
            following = requests(batches[(step + 1) % STEPS])
            table.gradient.merge()
            divisor = clip_divisor(gradient_norm([(table.gradient.sums, 1.0)]), 1.0)
            average.before_update(flag)
            optimizer.step(1e-3, divisor, flag)
            optimizer.zero_grad()
            average.update(step + 1, flag)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()  # the last request, which nothing looks up, still reads a batch that is freed here
    return [table.weight.detach(), *optimizer.state[table.weight].values(), *average.of_part(model).values()]


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_gpu_moves_tables_as_a_cpu_does_without_waiting(compiled, lazy):
    for one, other in zip(trained("cuda", compiled, lazy), trained("cpu", False, lazy)):
        off = (one.cpu() - other).abs().double()
        assert off.max() < 0.02
        assert (off > 1e-4 * (1 + other.abs())).sum() <= 1e-4 * off.numel() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat(dtype):
    for one, other in zip(trained("cuda", True, dtype=dtype), trained("cuda", True, dtype=dtype)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_on_the_host_moves_by_the_same_bits_without_waiting(dtype, compiled):
    on_host = trained("cuda", compiled, dtype=dtype, on_host=True)
    for one, other in zip(on_host, trained("cuda", compiled, dtype=dtype), strict=True):
        assert one.is_cuda
        assert torch.equal(one, other)


def read_slowly(table: Tensor, rows: Tensor) -> Tensor:
    """As copy_rows, with breaks: reading begins before an update, and ends after it."""
    pieces = []
    for some in rows.split(512):  # 24 of each micro-batch, of about 1 ms, while the other stream sleeps for 10
        torch.cuda._sleep(2_000_000)
        pieces.append(copy_rows(table, some))
    return torch.cat(pieces)


def test_rows_that_are_read_while_they_are_updated_are_those_after_the_update(monkeypatch):
    expected = trained("cuda", True)
    monkeypatch.setattr("swamla_titan.model.row_table.copy_rows", read_slowly)
    for one, other in zip(trained("cuda", True, on_host=True), expected, strict=True):
        assert torch.equal(one, other)


def test_reading_ahead_waits_for_what_a_checkpoint_has_written():
    device = torch.device("cuda", 0)
    with torch.device("meta"):
        table = RowTable(ROWS, WIDTH)
    table.keep_on_host(device)
    table.placement = LocalRows(device)
    table.to_empty(device=device)
    weight, loaded = table.weight.detach(), torch.randn(ROWS, WIDTH, device=device)
    # By which no row has changed since the last step.
    table.steps = RowSteps(torch.zeros(ROWS, 1, dtype=torch.int32, device=device), torch.ones((), device=device))
    request = request_rows([table], [torch.arange(ROWS, device=device)])
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    weight.copy_(loaded)
    table.rewritten()
    with table.placement.ahead():
        tensors = request.read_ahead([table])
    table.placement.hand_over(tensors)
    assert torch.equal(look_up([table], request, torch.float32)[0], loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_algorithms_compute_it_too(dtype):
    expected = trained("cuda", False, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(trained("cuda", False, dtype=dtype), expected):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)
