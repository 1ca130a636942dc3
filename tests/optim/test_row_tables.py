"""Row tables: gradients by rows, Adam of the rows looked up, their average; no step passes over a table."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.state import OF_MODELS, OptimizerStates, State, Weights
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config.sections import Optimizer
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.rows import Segments
from swamla_titan.model.layers import UpdateRule
from swamla_titan.model.row_table import LocalRows, RowTable, look_up, request_rows, row_tables
from swamla_titan.optim import (
    AveragedWeights,
    bring_up_to_date,
    build_optimizer,
    bytes_of_average,
    clip_divisor,
    gradient_norm,
    state_bytes,
)
from swamla_titan.optim.ema import up_to_date
from swamla_titan.optim.groups import Kind, groups

ROWS, WIDTH, LR = 40, 6, 0.01


def with_table(rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, RowTable]:
    """A module with a table and a linear layer."""
    torch.manual_seed(3)
    table = RowTable(rows, width)
    nn.init.normal_(table.weight)
    model = nn.Module()
    model.table, model.linear = table, nn.Linear(4, 4)
    return model.to(dtype), table


def lookups(step: int, rows: int = ROWS) -> Tensor:
    """Some rows several times, some not at all."""
    return torch.randint(0, rows // 2, (2, 5, 3), generator=torch.Generator().manual_seed(step)) + step % 4


def pull(found: Tensor) -> Tensor:
    return (found * torch.arange(found.numel()).view_as(found).cos()).sum() + found.square().sum()


def backward(table: RowTable, *of_micro_batches: Tensor) -> None:
    for indices in of_micro_batches:
        pull(table(indices)).backward()
    table.gradient.merge()


def reference(weight: Tensor, *of_micro_batches: Tensor) -> Tensor:
    """The gradient as torch has it."""
    leaf = weight.detach().clone().requires_grad_()
    torch.stack([pull(F.embedding(indices, leaf)) for indices in of_micro_batches]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def optimizer_of(model: nn.Module, **settings: Any) -> Any:
    return build_optimizer(model, Optimizer(lr=LR, **settings))


def test_value_and_gradient_are_those_of_an_embedding_and_no_dense_gradient_is_made():
    _, table = with_table(dtype=torch.float64)
    indices = lookups(1), lookups(2)
    assert torch.equal(table(indices[0]), F.embedding(indices[0], table.weight))
    backward(table, *indices)
    assert table.weight.grad is None
    torch.testing.assert_close(table.gradient.dense(ROWS), reference(table.weight, *indices), rtol=0, atol=1e-13)
    norm = gradient_norm([(table.gradient.sums, 1.0)])
    torch.testing.assert_close(norm, reference(table.weight, *indices).norm())


@pytest.mark.parametrize("size", [1, 3, 7, 1 << 18])
def test_pieces_hold_each_row_once_until_the_last_is_repeated_idly(size, monkeypatch):
    monkeypatch.setattr("swamla_titan.model.row_table._ROWS_OF_A_PIECE", size)
    _, table = with_table()
    indices = torch.tensor([7, 7, 3, 9, 3, 7, 20, 7])
    backward(table, indices)
    expected, seen = reference(table.weight, indices), set()
    for piece in table.gradient.pieces():
        assert len(piece.rows) <= size
        of_piece = set()
        for row, gradient, is_idle in zip(piece.rows.tolist(), piece.gradients, piece.is_idle):
            torch.testing.assert_close(gradient, expected[row])
            assert is_idle.item() == (row in seen)
            of_piece.add(row)
        seen |= of_piece
    assert seen == {3, 7, 9, 20}


def test_rows_are_given_in_the_dtype_asked_for_and_gradients_are_summed_in_float32():
    _, table = with_table()
    indices = torch.zeros(512, dtype=torch.int64)
    found = table(indices, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    found.backward(torch.full_like(found, 1.0))
    table.gradient.merge()
    assert table.gradient.dense(ROWS)[0].tolist() == [512.0] * WIDTH  # bfloat16 stops at 256


def test_sums_by_row_have_the_same_bits_whatever_the_order_of_the_others():
    rows, values = torch.randint(0, 9, (200,)), torch.randn(200, 5)
    whole = Segments(rows).sums(values)
    row = 4
    assert torch.equal(Segments(rows[rows == row]).sums(values[rows == row])[0], whole[len(rows[rows < row].unique())])
    assert whole[len(rows.unique()) :].count_nonzero() == 0


@pytest.mark.parametrize("piece", [4, 1 << 18])
def test_lazy_adam_is_torch_sparse_adam(piece, monkeypatch):
    monkeypatch.setattr("swamla_titan.model.row_table._ROWS_OF_A_PIECE", piece)
    model, table = with_table()
    optimizer, weight = optimizer_of(model, beta2=0.99), nn.Parameter(table.weight.detach().clone())
    other = torch.optim.SparseAdam([weight], lr=5 * LR, betas=(0.9, 0.99))
    for step in range(1, 8):
        indices = lookups(step)
        weight.grad = reference(weight, indices).to_sparse(1)
        # There eps is added to what is not yet divided by the bias correction.
        other.param_groups[0]["eps"] = 1e-8 * math.sqrt(1 - 0.99**step)
        other.step()
        before = table.weight.detach().clone()
        backward(table, indices)
        optimizer.step(LR)
        optimizer.zero_grad()
        torch.testing.assert_close(table.weight.detach(), weight.detach(), rtol=1e-5, atol=1e-6)
        untouched = [row for row in range(ROWS) if row not in indices]
        assert untouched
        assert torch.equal(table.weight[untouched], before[untouched])
    assert optimizer.state[table.weight]["touched"][0].item() == 4  # the last step with row 0
    assert table.gradient.sums is None


def test_a_row_that_padding_alone_looked_up_stays_because_other_numbers_of_ranks_pad_otherwise():
    model, table = with_table()
    optimizer = optimizer_of(model)
    for step in range(2):
        indices = torch.tensor([1, 2, 2, 3])
        # In the second step padding looks up row 1, and row 2 beside a token.
        factors = torch.tensor([1.0, 1.0, 1.0, 1.0] if step == 0 else [0.0, 0.0, 1.0, 1.0])
        before = [each.clone() for each in (table.weight.detach(), *optimizer.state[table.weight].values())]
        (table(indices) * factors[:, None]).sum().backward()
        table.gradient.merge()
        optimizer.step(LR)
        optimizer.zero_grad()
    after = [table.weight.detach(), *optimizer.state[table.weight].values()]
    for one, other in zip(before[:-1], after[:-1]):
        moved = (one != other).any(dim=1)
        assert moved.nonzero().flatten().tolist() == [2, 3]


def test_adam_of_all_rows_is_adamw_without_decay():
    model, table = with_table()
    optimizer, weight = optimizer_of(model, lazy_tables=False), nn.Parameter(table.weight.detach().clone())
    other = torch.optim.AdamW([weight], lr=5 * LR, betas=(0.9, 0.95), weight_decay=0)
    for step in range(1, 8):
        indices = lookups(step)
        weight.grad = reference(weight, indices)
        other.step()
        backward(table, indices)
        optimizer.step(LR)
        optimizer.zero_grad()
        torch.testing.assert_close(table.weight.detach(), weight.detach(), rtol=1e-5, atol=1e-6)


def test_where_all_rows_are_looked_up_lazy_adam_is_adam_of_all_rows():
    found = []
    for lazy in (True, False):
        model, table = with_table()
        optimizer = optimizer_of(model, lazy_tables=lazy)
        for step in range(4):
            backward(table, torch.cat((torch.arange(ROWS), lookups(step).flatten())))
            optimizer.step(LR)
            optimizer.zero_grad()
        found.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw8bit", "adamw4bit", "adamw_fp8", "muon"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_rule_holds_beside_every_optimizer(name, moments):
    model, table = with_table(rows=1000, width=32)
    config = Optimizer(name=name, moments=moments, weight_decay=0.3, lr_multipliers={"table.*": 0.5, "linear.*": 3.0})
    kinds = {parameter: kind for kind, parameters in groups(model, config).items() for parameter in parameters}
    assert kinds[table.weight] == Kind("rows", "float32", 0.0, 2.5)
    assert str(kinds[table.weight]) == "adam of the rows looked up, no decay, lr x 2.5"
    linear = kinds[model.linear.weight]
    assert linear.weight_decay == 0.3
    assert linear.lr_multiplier == 3.0
    optimizer = build_optimizer(model, config)
    state = optimizer.state[table.weight]
    held = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    assert held == {
        "exp_avg": ((1000, 32), torch.float32),
        "exp_avg_sq": ((1000, 32), torch.float32),
        "touched": ((1000, 1), torch.int32),
        "step": ((), torch.float32),
    }
    of_linear = sum(each.nbytes for weight in model.linear.parameters() for each in optimizer.state[weight].values())
    assert state_bytes(model, config) == of_linear + sum(each.nbytes for each in state.values())


class Decaying(RowTable):
    update_rule = UpdateRule(by_rows=True)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_table_that_declares_decay_decays_where_it_moves(lazy):
    found, start = [], torch.randn(ROWS, WIDTH)
    for kind in (RowTable, Decaying):
        model = nn.Module()
        model.table = kind(ROWS, WIDTH)
        model.table.update_rule = replace(kind.update_rule, lr_multiplier=1.0)
        with torch.no_grad():
            model.table.weight.copy_(start)
        optimizer = optimizer_of(model, lazy_tables=lazy, weight_decay=0.5)
        backward(model.table, lookups(1))
        optimizer.step(LR)
        found.append(model.table.weight.detach())
    moved = torch.zeros(ROWS, 1)
    moved[lookups(1).unique() if lazy else slice(None)] = 1
    torch.testing.assert_close(found[1] - found[0], -LR * 0.5 * start * moved, rtol=1e-4, atol=1e-6)


def test_by_rows_is_refused_for_what_is_no_table():
    model = nn.Module()
    model.linear = nn.Linear(4, 4)
    model.linear.update_rule = UpdateRule(by_rows=True)
    with pytest.raises(TypeError, match=r"Linear.update_rule: by_rows is for a RowTable"):
        groups(model, Optimizer())


def test_tables_tied_to_one_weight_are_refused():
    model, table = with_table()
    model.other = RowTable(ROWS, WIDTH)
    assert set(row_tables(model).values()) == {table, model.other}
    model.other.weight = table.weight
    with pytest.raises(TypeError, match="two RowTables have the same weight"):
        row_tables(model)


def test_a_gradient_is_merged_once():
    _, table = with_table()
    backward(table, lookups(1))
    table.gradient.merge()  # nothing was added
    with pytest.raises(AssertionError, match="would discard the sums of the first"):
        backward(table, lookups(2))
    table.gradient.clear()
    backward(table, lookups(2))


@pytest.mark.parametrize("lazy", [True, False])
def test_clipping_divides_and_a_bad_step_changes_no_bit(lazy):
    model, table = with_table()
    optimizer = optimizer_of(model, lazy_tables=lazy)
    average = AveragedWeights([model], 0.9, lazy_tables=lazy)
    average.restart()

    def step(number: int, bad: float, spoil: bool = False) -> None:
        backward(table, lookups(number))
        if spoil:
            table.gradient.sums[0, 0] = math.nan
        norm = gradient_norm([(table.gradient.sums, 1.0)])
        flag = torch.tensor(bad)
        average.before_update(flag)
        optimizer.step(LR, clip_divisor(norm, 0.5), flag)
        optimizer.zero_grad()
        average.update(number, flag)

    def held() -> list[Tensor]:
        return [table.weight.detach(), *optimizer.state[table.weight].values(), *average.of_part(model).values()]

    step(1, 0.0)
    first = optimizer.state[table.weight]["exp_avg"].norm().item()
    assert first == pytest.approx(0.1 * 0.5, rel=1e-4)
    before = [each.clone() for each in held()]
    step(2, 1.0, spoil=True)
    assert all(torch.equal(one, other) for one, other in zip(held(), before))
    step(3, 0.0)
    assert not any(torch.equal(one, other) for one, other in zip(held(), before) if one.numel() > 16)


def test_a_table_that_was_not_looked_up_stays_as_it_is():
    model, table = with_table()
    optimizer, before = optimizer_of(model), table.weight.detach().clone()
    table.gradient.merge()
    optimizer.step(LR)
    assert torch.equal(table.weight, before)
    assert optimizer.state[table.weight]["step"] == 0


class Shapes(TorchDispatchMode):
    """The operators that were given, or gave, a tensor with this many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        if any(self.rows in each.shape or each.numel() >= self.rows for each in tensors):
            self.found.add(operator.overloadpacket.__name__)
        return out


GATHERS_AND_SCATTERS = {"index", "index_copy_", "detach"}  # the last makes another name of the same memory


def test_no_operator_of_a_step_sees_the_table_but_gathers_and_scatters():
    rows = 100_003
    model, table = with_table(rows=rows, width=4)
    optimizer, average = optimizer_of(model), AveragedWeights([model], 0.9)
    average.restart()
    bad = torch.tensor(0.0)
    with Shapes(rows) as shapes:
        for number in (1, 2):
            backward(table, lookups(number), lookups(number + 5))
            norm = gradient_norm([(table.gradient.sums, 1.0)])
            torch._foreach_mul_([table.gradient.sums], torch.tensor(0.5))  # as loss scaling does
            average.before_update(bad)
            optimizer.step(LR, clip_divisor(norm, 1.0), bad)
            optimizer.zero_grad()
            average.update(number, bad)
    assert shapes.found == GATHERS_AND_SCATTERS
    with Shapes(rows) as shapes:  # the means of this test
        table.weight.detach().mul(2)
    assert shapes.found - GATHERS_AND_SCATTERS


@pytest.mark.slow  # it compiles
def test_compiled_adam_moves_rows_as_eager_adam_does_and_is_compiled_once_for_any_number_of_them():
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        model, table = with_table()
        optimizer = build_optimizer(model, Optimizer(), compiled=compiled)
        for step in range(1, 6):
            backward(table, lookups(step)[:, :step])
            optimizer.step(LR, clip_divisor(torch.tensor(3.0), 1.0), torch.tensor(0.0))
            optimizer.zero_grad()
        found.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("piece", [4, 1 << 18])
def test_the_average_is_that_of_a_pass_over_the_table_in_each_step(lazy, piece, monkeypatch):
    monkeypatch.setattr("swamla_titan.model.row_table._ROWS_OF_A_PIECE", piece)
    model, table = with_table()
    optimizer, average = optimizer_of(model, lazy_tables=lazy), AveragedWeights([model], 0.8, lazy_tables=lazy)
    average.restart()
    mean = table.weight.detach().double()
    for step in range(1, 30):
        flag = torch.tensor(float(step in (3, 4)))
        backward(table, lookups(step))
        average.before_update(flag)
        optimizer.step(LR, bad=flag)
        optimizer.zero_grad()
        average.update(step, flag)
        if not flag:
            mean += (1 - min(0.8, (1 + step) / (10 + step))) * (table.weight.detach().double() - mean)
    assert bytes_of_average(model) == sum(each.nbytes for each in average.of_part(model).values())
    weights, held = table.weight.detach().clone(), [each.clone() for each in average.of_part(model).values()]
    with average.in_place_of_weights():
        torch.testing.assert_close(table(torch.arange(ROWS)).detach().double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(table.weight, weights)
    assert all(torch.equal(one, other) for one, other in zip(average.of_part(model).values(), held))


def test_the_average_of_a_full_table_is_brought_up_to_date_some_rows_at_a_time(monkeypatch):
    rows = 10 * ROWS
    mean, weight, of_rows = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH), -torch.rand(rows, 1).double()
    now = torch.tensor(-1.5, dtype=torch.float64)
    expected = up_to_date(weight, mean, of_rows, now)
    monkeypatch.setattr("swamla_titan.optim.ema._ROWS_AT_A_TIME", 7)
    with Shapes(rows) as shapes:
        bring_up_to_date(mean, weight, of_rows, now)
    assert shapes.found <= {"split", "slice"}, "which copy nothing"
    assert torch.equal(mean, expected)


def test_a_table_on_the_host_keeps_its_dtype_and_its_rows_are_rounded_when_they_are_read():
    """So a model may be cast, of which the tables do not fit on the GPU: a cast would make a copy there."""
    model, table = with_table()
    cast = with_table()[1].to(torch.bfloat16)
    table._host_of = torch.device("cpu")
    model.to(torch.bfloat16)
    assert (model.linear.weight.dtype, table.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(table(lookups(1), torch.bfloat16), cast(lookups(1)))


@pytest.mark.parametrize("piece", [4, 1 << 18])
def test_a_table_on_the_host_moves_by_the_same_bits(piece, monkeypatch):
    """Rows that were read ahead are used if they stay: those of padding, whose gradient is zero, and in a bad step."""
    monkeypatch.setattr("swamla_titan.model.row_table._ROWS_OF_A_PIECE", piece)
    found = []
    for on_host in (False, True):
        model, table = with_table()
        table._host_of = torch.device("cpu") if on_host else None
        optimizer, average = optimizer_of(model), AveragedWeights([model], 0.8)
        average.restart()
        following = request_rows([table], [lookups(1)])
        for step in range(1, 12):
            flag = torch.tensor(float(step in (3, 4)))
            padding = table(torch.tensor([ROWS - 1, 0, step])) * torch.tensor([0.0, 0.0, 1.0])[:, None]
            padding.sum().backward()
            pull(look_up([table], following, torch.float32)[0]).backward()
            table.gradient.merge()
            following = request_rows([table], [lookups(step + 1)])
            assert bool(following.read_ahead([table])) == on_host, "before the update"
            average.before_update(flag)
            optimizer.step(LR, bad=flag)
            optimizer.zero_grad()
            average.update(step, flag)
        state = optimizer.state[table.weight]
        assert state["touched"][ROWS - 1] == 0
        found.append([table.weight.detach(), *state.values(), *average.of_part(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("begins", ["before", "within"])
def test_rows_read_ahead_of_an_update_are_those_after_it(begins, monkeypatch):
    """Also of an update that has been counted, and has written a part of its rows, when reading begins."""
    monkeypatch.setattr("swamla_titan.model.row_table._ROWS_OF_A_PIECE", 4)
    model = nn.Module()
    with torch.device("meta"):
        model.table = table = RowTable(ROWS, WIDTH)
    table.keep_on_host(torch.device("cpu"))
    model.to_empty(device="cpu")
    nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(3))
    assert request_rows([table], [lookups(1)]).read_ahead([table]) == [], "nothing updates the rows"
    optimizer = optimizer_of(model)
    rule, pieces = optimizer.rules["rows"], 0
    write = rule.move_piece

    def write_a_piece(*given: Any) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 2 and begins == "within":
            request.read_ahead([table])
        write(*given)

    monkeypatch.setattr(rule, "move_piece", write_a_piece)
    for step in range(1, 8):
        bad, pieces = float(step == 4), 0
        backward(table, lookups(step))
        request = request_rows([table], [lookups(step + 1)])
        if begins == "before":
            request.read_ahead([table])
        optimizer.step(LR, bad=torch.tensor(bad))
        optimizer.zero_grad()
        rows, weight = lookups(step + 1).flatten(), table.weight.detach()
        [ahead] = request._ahead
        assert ahead is not None
        assert (ahead.values != weight[rows]).any() == (not bad)
        assert step == 1 or (optimizer.state[table.weight]["touched"][rows] < ahead.since).any(), "rows that are kept"
        assert torch.equal(look_up([table], request, torch.float32)[0].flatten(0, -2), weight[rows])


class Waits(LocalRows):
    """Counts how often the stream of requests was to wait."""

    count = 0

    def catch_up(self) -> None:
        self.count += 1


@pytest.mark.parametrize("writes", ["load", "begin"])
def test_rows_that_were_read_ahead_of_a_load_are_not_used_after_it(writes, tmp_path):
    """Because `touched` and the last step are then from before the rows that were read."""
    model, table = with_table()
    table._host_of, table.placement = torch.device("cpu"), Waits()
    optimizer = optimizer_of(model)
    state = State([Weights([model]), OptimizerStates([model], [optimizer], Optimizer())], OF_MODELS, World.alone())
    store = Checkpoints(tmp_path, 0, known=OF_MODELS)
    for step in range(1, 5):
        backward(table, lookups(step))
        optimizer.step(LR)
        optimizer.zero_grad()
        if step == 1:
            train_state = TrainState(step, tokens=0, sequences=0, cursors={}, fingerprint={})
            path = store.save(state.tensors(), train_state, {})
    request = request_rows([table], [torch.arange(ROWS)])
    request.read_ahead([table])
    assert table.placement.count == 0
    if writes == "load":
        state.load_learned(path, {})
    else:
        with torch.no_grad():
            table.weight.neg_()
        state.begin()
    assert table.placement.count == 1
    weight = table.weight.detach()
    [ahead] = request._ahead
    assert ahead is not None
    assert (ahead.values != weight).any()
    assert torch.equal(look_up([table], request, torch.float32)[0], weight)


def test_only_rows_of_the_host_are_read_ahead_and_not_in_place_of_an_average():
    model, table = with_table()
    optimizer_of(model)
    request = request_rows([table], [lookups(1)])
    assert request.read_ahead([table]) == []
    table._host_of = torch.device("cpu")
    assert len(request.read_ahead([table])) == 2
    average = AveragedWeights([model], 0.9)
    average.restart()
    with average.in_place_of_weights():
        assert request.read_ahead([table]) == []
