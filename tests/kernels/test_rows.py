"""Rows of tables that are read, gradients summed by row, Adam and the average of rows, by our kernels against formulas.

The kernels run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla_titan.kernels import rows as kernels
from swamla_titan.kernels.device import Limit
from swamla_titan.kernels.host_memory import zeros_on_host
from swamla_titan.kernels.rows import (
    Segments,
    adam_of_rows,
    average_of_rows,
    copy_rows,
    copy_rows_again,
    rows_as,
)
from swamla_titan.model.row_table import RowGradient
from swamla_titan.optim.ema import up_to_date

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROWS, STEP, EPS = 50, 3, 1e-8


@pytest.mark.gpu
@pytest.mark.parametrize("width, number, keys", [(64, 300, 20), (6, 33, 33), (1, 40, 1), (1500, 9, 2), (4, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_runs_are_summed_from_the_first_value_on(width, number, keys, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    generator = torch.Generator().manual_seed(number)
    found, values = torch.randint(0, keys, (number,), generator=generator), torch.randn(number, width).to(dtype)
    values[0] = -0.0
    expected = torch.zeros(number, width, dtype=torch.promote_types(dtype, torch.float32))
    for run, key in enumerate(found.unique()):
        for value in values[found == key]:
            expected[run] += value
    segments = Segments(found.to(DEVICE))
    sums = segments._sums_by_kernel(values.to(DEVICE), expected.dtype)
    assert torch.equal(sums.cpu(), expected)
    parts = segments.of_kinds([number], [len(found.unique())])  # whose runs are counted
    assert torch.equal(next(parts)._sums_by_kernel(values.to(DEVICE), expected.dtype).cpu(), expected[: run + 1])


def gradient_of(rows: Tensor, values: Tensor) -> RowGradient:
    gradient = RowGradient()
    gradient.add(rows.to(DEVICE), values.to(DEVICE))
    gradient.merge()
    return gradient


def table(width: int, rows: int = ROWS) -> list[Tensor]:
    """Weight, both moments and `touched`."""
    generator = torch.Generator().manual_seed(width)
    weight, first, second = torch.randn(3, rows, width, generator=generator)
    return [each.to(DEVICE) for each in (weight, 0.1 * first, 0.01 * second**2, torch.ones(rows, 1, dtype=torch.int32))]


def move(
    held: Sequence[Tensor],
    gradient: RowGradient,
    divisor: float | None = None,
    bad: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    decay: float = 0.0,
) -> None:
    scalars = [None if each is None else torch.tensor(each, device=DEVICE) for each in (divisor, bad)]
    step, lr = torch.tensor(float(STEP), device=DEVICE), torch.tensor(0.01)
    adam_of_rows(held, gradient.looked_up(), step, *scalars, lr, *betas, EPS, torch.tensor(decay))


def expected(
    held: Sequence[Tensor], dense: Tensor, divisor: float, betas: tuple[float, float], decay: float
) -> list[Tensor]:
    """In float64, from the paper's formulas; rows without gradient stay."""
    weight, first, second = (each.double() for each in held[:3])
    dense, moves = dense.double() / divisor, (dense != 0).any(dim=1, keepdim=True)
    first = betas[0] * first + (1 - betas[0]) * dense
    second = betas[1] * second + (1 - betas[1]) * dense**2
    moved = weight - 0.01 * decay * weight
    moved -= 0.01 * first / (1 - betas[0] ** STEP) / ((second / (1 - betas[1] ** STEP)).sqrt() + EPS)
    new = moved, first, second, torch.full_like(held[3], STEP)
    return [torch.where(moves, one, old) for one, old in zip(new, held)]


@pytest.mark.gpu
@pytest.mark.parametrize("width, number", [(64, 200), (6, 33), (1, 16), (96, 1), (1500, 7)])
@pytest.mark.parametrize("betas, decay", [((0.9, 0.95), 0.0), ((0.3, 0.5), 0.1)])
def test_rows_that_were_looked_up_move_as_in_float64_and_others_keep_their_bits(width, number, betas, decay):
    held, generator = table(width), torch.Generator().manual_seed(number)
    rows, values = (
        torch.randint(0, ROWS, (number,), generator=generator),
        torch.randn(number, width, generator=generator),
    )
    rows[-1], values[rows == rows[0]] = rows[0], 0.0  # of a row that padding alone looked up
    found, gradient = [each.clone() for each in held], gradient_of(rows, values)
    dense = gradient.dense(ROWS)
    move(found, gradient, 2.5, 0.0, betas, decay)
    for one, other, old in zip(found, expected(held, dense, 2.5, betas, decay), held):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)
        stays = (dense == 0).all(dim=1)
        assert torch.equal(one[stays], old[stays])
    assert (found[3][:, 0] == STEP).sum() == len(rows.unique()) - 1


@pytest.mark.gpu
def test_a_bad_step_changes_no_bit_and_a_gradient_that_is_not_finite_is_none_of_zero():
    held, rows, values = table(6), torch.arange(10).repeat(2), torch.ones(20, 6)
    values[3] = torch.tensor([math.nan, 0.0, 0.0, 0.0, 0.0, 0.0])
    found, gradient = [each.clone() for each in held], gradient_of(rows, values)
    move(found, gradient, 1.0, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(found, held))
    move(found, gradient, 1.0, 0.0)
    assert found[0][3].isnan().tolist() == [True] + [False] * 5
    assert found[3][:, 0].tolist() == [STEP] * 10 + [1] * (ROWS - 10)


@pytest.mark.gpu
def test_the_bits_are_the_same_again_whatever_else_was_looked_up():
    held, values = table(64), torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    rows, found = torch.arange(200) % 40, [[each.clone() for each in held] for _ in range(3)]
    for one in found[:2]:
        move(one, gradient_of(rows, values), 1.5)
    move(found[2], gradient_of(rows[rows > 8], values[rows > 8]), 1.5)
    for one, again, fewer in zip(*found):
        assert torch.equal(one, again)
        assert torch.equal(one[9:], fewer[9:])


@pytest.mark.gpu
@pytest.mark.parametrize("width, number", [(64, 200), (6, 33), (1, 16), (96, 1), (1500, 7), (4, 0)])
@pytest.mark.parametrize("bad", [None, 0.0, 1.0])
def test_the_average_of_rows_that_were_looked_up_is_brought_up_to_date_by_the_same_bits(width, number, bad):
    weight, mean, _, _ = table(width)
    of_rows = -torch.rand(ROWS, 1, dtype=torch.float64).to(DEVICE)
    before, log_decay = [mean.clone(), weight, of_rows.clone()], torch.tensor(-1.5, dtype=torch.float64, device=DEVICE)
    rows = torch.randint(0, ROWS, (number,), generator=torch.Generator().manual_seed(number))
    values = torch.ones(number, width)
    values[rows == rows[:1]] = 0.0  # of a row that padding alone looked up
    gradient = gradient_of(rows, values)
    moves = (gradient.dense(ROWS) != 0).any(dim=1, keepdim=True) & (bad != 1)
    average_of_rows(
        (mean, weight, of_rows), gradient.looked_up(), log_decay, bad if bad is None else log_decay.new_tensor(bad)
    )
    new = up_to_date(weight, *before[::2], log_decay), weight, log_decay.expand(ROWS, 1)
    for found, old, expected in zip((mean, weight, of_rows), before, new):
        assert torch.equal(found, torch.where(moves, expected, old))


@pytest.mark.gpu
def test_nothing_is_done_where_no_row_was_looked_up():
    held = table(8)
    found = [each.clone() for each in held]
    move(found, gradient_of(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8)))
    assert all(torch.equal(one, other) for one, other in zip(found, held))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="takes 26 GB")
def test_a_table_of_more_than_two_to_the_31_elements():
    rows = (1 << 31) // 64 + 100
    held = [torch.zeros(rows, 64, device=DEVICE) for _ in range(3)]
    held.append(torch.zeros(rows, 1, dtype=torch.int32, device=DEVICE))
    looked_up = torch.tensor([rows - 1, 0, rows - 1, rows - 50])
    move(held, gradient_of(looked_up, torch.ones(4, 64)))
    for each in held:
        assert each.any(dim=1).nonzero().flatten().tolist() == [0, rows - 50, rows - 1]


def rows_of_a_table(width: int, number: int, device: str) -> tuple[Tensor, ...]:
    """A table, rows of it with repetitions, and the step that last touched each of its rows."""
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(40, width, generator=generator)
    rows = torch.randint(0, 40, (number,), generator=generator)
    touched = torch.randint(0, 6, (40, 1), generator=generator, dtype=torch.int32)
    return table.to(device), rows.to(device), touched.to(device)


def test_without_triton_operators_move_rows(monkeypatch: pytest.MonkeyPatch):
    launched: list[Any] = []
    monkeypatch.setattr(kernels, "_copy", lambda *given, **_: launched.append(given))
    table, rows = torch.arange(6.0).view(3, 2), torch.tensor([2, 0])
    for why, launches in ((None, 2), (Limit("needs the package triton"), 0)):
        monkeypatch.setattr(kernels, "why_no_kernels", lambda device, why=why: why)
        launched.clear()
        found = [copy_rows(table, rows), rows_as(table, rows, torch.float32)]
        assert len(launched) == launches
    assert [each.tolist() for each in found] == [[[4, 5], [0, 1]]] * 2


def test_rows_that_changed_since_are_copied_again():
    table, rows, touched = rows_of_a_table(6, 50, "cpu")
    out = copy_rows(table, rows)
    assert torch.equal(out, table[rows])
    changed = table + 1
    copy_rows_again(out, changed, rows, touched, torch.tensor(3.0))
    assert torch.equal(out, torch.where(touched[rows] >= 3, changed[rows], table[rows]))
    assert 0 < (touched[rows] >= 3).sum() < len(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("width, number", [(64, 50), (6, 33), (1, 16), (96, 1), (1500, 33), (4, 0)])
def test_kernels_copy_rows_and_copy_those_that_changed_since_again(width: int, number: int):
    table, rows, touched = rows_of_a_table(width, number, DEVICE)
    values = torch.full((number, width), torch.nan, device=DEVICE)
    kernels._copy(table, rows, values, programs=3)
    assert torch.equal(values, table[rows])
    changed, since = table + 1, torch.tensor(3.0, device=DEVICE)
    kernels._copy(changed, rows, values, (touched, since))
    assert torch.equal(values, torch.where(touched[rows] >= 3, changed[rows], table[rows]))


@pytest.mark.gpu
@pytest.mark.parametrize("one, other", [("float32", "float16"), ("float16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("width, number", [(64, 50), (6, 33), (1, 1)])
def test_the_kernel_rounds_rows_as_torch_does(width: int, number: int, one: str, other: str):
    if DEVICE == "cpu" and other == "bfloat16":
        pytest.skip("not in Triton's interpreter")
    table, rows, _ = rows_of_a_table(width, number, DEVICE)
    table, rows = table.to(getattr(torch, one)), rows.repeat_interleave(2)[::2]  # not contiguous
    values = torch.empty(number, width, dtype=getattr(torch, other), device=DEVICE)
    kernels._copy(table, rows, values)
    assert torch.equal(values, table[rows].to(values.dtype))
    assert torch.equal(rows_as(table, rows, values.dtype), values)
    assert torch.equal(rows_as(table[:1].expand(40, -1), rows, values.dtype)[0], table[0].to(values.dtype))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA's addresses")
def test_kernels_read_and_write_the_memory_of_the_host():
    table, rows, touched = rows_of_a_table(64, 5000, DEVICE)
    held = zeros_on_host(table.shape, table.dtype, table.device)
    held.copy_(table)
    out = copy_rows(held, rows)
    assert torch.equal(out, table[rows])
    held.add_(1)
    copy_rows_again(out, held, rows, touched, torch.tensor(3.0, device=DEVICE))
    assert torch.equal(out, torch.where(touched[rows] >= 3, table[rows] + 1, table[rows]))
    gradient = gradient_of(rows[:9], table[rows[:9]])
    there, here = held, held.clone()
    for weight in (there, here):
        move([weight, *(torch.ones_like(table) for _ in range(2)), touched.clone()], gradient)
    assert torch.equal(there, here)
    assert (here != table + 1).any(dim=1).nonzero().flatten().tolist() == rows[:9].unique().tolist()
