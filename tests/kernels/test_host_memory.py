"""Page-locked memory of the host as tensors of a GPU: what is locked, freed and refused; operators work there.

The kernels run with -m gpu, or on a CPU, slowly, with TRITON_INTERPRET=1.
"""

import gc
import math
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swamla_titan.checkpoint.async_save import Staging
from swamla_titan.errors import RankFailed
from swamla_titan.kernels import host_memory
from swamla_titan.kernels.device import Limit
from swamla_titan.kernels.host_memory import (
    copy_rows,
    copy_rows_again,
    free_memory,
    rows_as,
    write_rows,
    zeros_on_host,
)

GPU = torch.device("cuda", 0)
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Driver:
    """CUDA's functions that lock memory, without CUDA; `refused` is the error of the next call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locked: dict[int, int] = {}
        self.refused = 0
        calls = types.SimpleNamespace(cudaHostRegister=self._lock, cudaHostUnregister=self.locked.pop)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def _lock(self, address: int, size: int, flags: int) -> int:
        if not self.refused:
            self.locked[address] = size
        return self.refused


def test_pages_are_locked_for_as_long_as_their_tensor_exists(monkeypatch: pytest.MonkeyPatch):
    driver = Driver(monkeypatch)
    made: list[Any] = []

    def as_tensor(pages: Any, device: torch.device) -> torch.Tensor:
        """A tensor of the CPU at the same address, which keeps the pages as one of a GPU would."""
        made.append(pages.__cuda_array_interface__)
        return torch.from_numpy(np.asarray(types.SimpleNamespace(pages=pages, __array_interface__=made[-1])))

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    tensor = zeros_on_host((3, 5), torch.float32, GPU)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.float32
    assert not tensor.any()
    tensor[2, 4] = 1.0
    [interface] = made
    assert interface == {"shape": (60,), "typestr": "|u1", "data": (*driver.locked, False), "version": 3}
    assert list(driver.locked.values()) == [60]
    assert host_memory._Pages.addresses == {*driver.locked}
    row = tensor[2]
    del tensor
    gc.collect()
    assert list(driver.locked) == [interface["data"][0]]
    assert row.tolist() == [0, 0, 0, 0, 1]
    del row
    gc.collect()
    assert not driver.locked
    assert not host_memory._Pages.addresses


def test_a_host_that_lacks_memory_or_does_not_lock_it_is_said_so(monkeypatch: pytest.MonkeyPatch):
    driver = Driver(monkeypatch)
    monkeypatch.setattr(host_memory, "free_memory", lambda: 3 << 30)
    with pytest.raises(RankFailed, match=r"tables_on_host: 4.0 GiB more .* are needed, and 3.0 GiB are free"):
        zeros_on_host((1 << 30,), torch.float32, GPU)
    driver.refused = 2
    with pytest.raises(RankFailed, match=r"cannot be locked \(CUDA error 2"):
        zeros_on_host((1024,), torch.float32, GPU)
    assert driver.locked == {}


def test_without_triton_operators_move_rows(monkeypatch: pytest.MonkeyPatch):
    launched: list[Any] = []
    monkeypatch.setattr(host_memory, "_launch", lambda *given, **_: launched.append(given))
    table, rows = torch.arange(6.0).view(3, 2), torch.tensor([2, 0])
    for why, launches in ((None, 2), (Limit("needs the package triton"), 0)):
        monkeypatch.setattr(host_memory, "why_no_kernels", lambda device, why=why: why)
        launched.clear()
        found = [copy_rows(table, rows), rows_as(table, rows, torch.float32)]
        assert len(launched) == launches
    assert [each.tolist() for each in found] == [[[4, 5], [0, 1]]] * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_have_zeros_of_their_own(device: str):
    found = zeros_on_host((2, 3), torch.int32, torch.device(device))
    assert found.device.type == device
    assert found.shape == (2, 3)
    assert found.dtype == torch.int32


def test_the_free_memory_is_that_of_the_machine_or_of_the_container(tmp_path: Path):
    assert free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n")
    assert free_memory(tmp_path) == 7 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 100\nactive_file 200\ninactive_file 300\n")
    assert free_memory(tmp_path) == 7 * 1024
    (group / "memory.max").write_text("6000\n")
    assert free_memory(tmp_path) == 6000 - 5000 + 500


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA's addresses")
def test_operators_of_a_gpu_work_on_it():
    shape = (1000, 64)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.cuda.memory_allocated()
    held, usual = zeros_on_host(shape, torch.float32, GPU), torch.zeros(shape, device=GPU)
    assert held.device == GPU
    assert torch.cuda.memory_allocated() - before == usual.nbytes
    assert not held.any()
    rows = torch.randint(0, 1000, (300,), device=GPU).unique()
    for each in (held, usual):
        each.copy_(values)  # from memory of the host that is not locked
        each[10:20].copy_(values[:10])
        each.index_copy_(0, rows, 2 * each[rows])
        each[500:] = each[:500].clone()
    assert torch.equal(held, usual)
    assert torch.equal(held.cpu(), usual.cpu())
    assert torch.equal(held.clone(), usual)
    other = zeros_on_host(shape, torch.float32, GPU)
    other.copy_(held)
    assert torch.equal(other, usual)
    assert held.isfinite().all()
    empty = zeros_on_host((0, 64), torch.float32, GPU)
    assert empty.device == GPU


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA's addresses")
def test_checkpoints_copy_it_as_it_is_once_work_before_is_done():
    held = zeros_on_host((1 << 20, 16), torch.float32, GPU)
    staging = Staging(GPU, 1 << 27)
    staging._prepared()
    torch.cuda._sleep(100_000_000)
    held.fill_(-0.0)
    held[1:].fill_(math.nan)
    expected = torch.full(held.shape, math.nan)
    expected[0] = -0.0
    copies = staging.copy({"model": {"table": held, "part": held[5:7]}})["model"]
    assert staging._copied is not None
    assert not staging._copied.query(), "the host waits for nothing"
    staging.before_update()
    held.fill_(2.0)
    staging.wait()
    assert torch.equal(copies["table"].view(torch.int32), expected.view(torch.int32))
    assert copies["part"].isnan().all()
    torch.cuda.synchronize()
    assert (held == 2).all()
    staging.close()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA's addresses")
def test_memory_is_free_again_after_its_tensor():
    for _ in range(3):
        held = zeros_on_host((1 << 26,), torch.float32, GPU)
        held.fill_(1.0)
        del held
        gc.collect()


def rows_of_a_table(width: int, number: int, device: str) -> tuple[torch.Tensor, ...]:
    """A table, rows of it with repetitions, and the step that last touched each of its rows."""
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(40, width, generator=generator)
    rows = torch.randint(0, 40, (number,), generator=generator)
    touched = torch.randint(0, 6, (40, 1), generator=generator, dtype=torch.int32)
    return table.to(device), rows.to(device), touched.to(device)


def test_rows_that_stay_are_not_written():
    table, rows, touched = rows_of_a_table(6, 50, "cpu")
    rows, before = rows.unique(), table.clone()
    stays = (touched[rows] > 2).float()
    assert torch.equal(copy_rows(table, rows, stays), torch.where(stays > 0, 0.0, table[rows]))
    write_rows(table, rows, stays, before[rows] + 1)
    assert torch.equal(table[rows], before[rows] + (stays == 0))
    assert torch.equal(table.sum(), (before.index_add(0, rows, (stays == 0).float().expand(-1, 6))).sum())


def test_rows_that_changed_since_are_copied_again():
    table, rows, touched = rows_of_a_table(6, 50, "cpu")
    out = copy_rows(table, rows)
    assert torch.equal(out, table[rows])
    changed = table + 1
    copy_rows_again(out, changed, rows, touched, torch.tensor(3.0))
    assert torch.equal(out, torch.where(touched[rows] >= 3, changed[rows], table[rows]))
    assert 0 < (touched[rows] >= 3).sum() < len(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("width, number", [(64, 50), (6, 33), (1, 16), (96, 1), (4, 0)])
def test_kernels_copy_rows_and_copy_those_that_changed_since_again(width: int, number: int):
    table, rows, touched = rows_of_a_table(width, number, DEVICE)
    values = torch.full((number, width), torch.nan, device=DEVICE)
    host_memory._launch(table, rows, values, rows, rows, host_memory._ALL, programs=3)
    assert torch.equal(values, table[rows])
    changed, since = table + 1, torch.tensor(3.0, device=DEVICE)
    host_memory._launch(changed, rows, values, touched, since, host_memory._SINCE)
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
    host_memory._launch(table, rows, values, rows, rows, host_memory._ALL)
    assert torch.equal(values, table[rows].to(values.dtype))
    assert torch.equal(host_memory.rows_as(table, rows, values.dtype), values)
    assert torch.equal(host_memory.rows_as(table[:1].expand(40, -1), rows, values.dtype)[0], table[0].to(values.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("width, number", [(64, 50), (6, 33), (96, 1), (1500, 33)])
def test_kernels_read_and_write_rows_that_change_alone(width: int, number: int):
    table, rows, touched = rows_of_a_table(width, number, DEVICE)
    rows = rows.unique()
    stays, before = (touched[rows] > 2).float(), table.clone()
    values = torch.full((len(rows), width), 7.0, device=DEVICE)
    host_memory._launch(table, rows, values, stays, stays, host_memory._CHANGING)
    assert torch.equal(values, torch.where(stays > 0, 7.0, table[rows]))
    host_memory._launch(table, rows, values + 1, stays, stays, host_memory._CHANGING, writes=True)
    expected = before.clone()
    expected[rows] = torch.where(stays > 0, before[rows], before[rows] + 1)
    assert torch.equal(table, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA's addresses")
def test_kernels_read_the_memory_of_the_host():
    table, rows, touched = rows_of_a_table(64, 5000, DEVICE)
    held = zeros_on_host(table.shape, table.dtype, GPU)
    held.copy_(table)
    out = copy_rows(held, rows)
    assert torch.equal(out, table[rows])
    held.add_(1)
    copy_rows_again(out, held, rows, touched, torch.tensor(3.0, device=GPU))
    assert torch.equal(out, torch.where(touched[rows] >= 3, table[rows] + 1, table[rows]))
    rows, before = rows.unique(), held.clone()
    stays = (touched[rows] > 2).float()
    write_rows(held, rows, stays, 2 * copy_rows(held, rows, stays))
    before[rows] = torch.where(stays > 0, before[rows], 2 * before[rows])
    assert torch.equal(held, before)
