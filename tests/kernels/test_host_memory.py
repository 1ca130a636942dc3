"""Page-locked memory of the host as tensors of a GPU: what is locked, freed and refused; operators work there."""

import gc
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swamla_titan.checkpoint.async_save import Staging
from swamla_titan.errors import RankFailed
from swamla_titan.kernels import host_memory
from swamla_titan.kernels.host_memory import free_memory, zeros_on_host

GPU = torch.device("cuda", 0)


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
def test_memory_is_free_again_after_its_tensor():
    for _ in range(3):
        held = zeros_on_host((1 << 26,), torch.float32, GPU)
        held.fill_(1.0)
        del held
        gc.collect()
