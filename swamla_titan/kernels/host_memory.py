"""Memory of the host that kernels of a GPU read and write: page-locked, and a tensor of that GPU all the same.

CUDA addresses the memory of the host and of all GPUs alike (unified virtual addressing). So a kernel that is given the
address of page-locked memory reads and writes it over PCIe, row by row, in the order of its stream:

    kernel  ->  address  ->  PCIe  ->  page of the host, locked so that it stays where it is

No operator knows the difference, and results are the same bits.
"""

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from swamla_titan.errors import RankFailed
from swamla_titan.kernels.device import power_of_two, why_no_kernels
from swamla_titan.kernels.triton import jit, tl

# Rows of a tile, and programs that together have some 100 KB under way: what PCIe carries in the 2 us of an answer.
_ROWS, _PROGRAMS_BESIDE_OTHERS = 16, 32
_MOST_ELEMENTS = 1 << 14  # of a tile, so that wide rows fit in registers
_ALL, _CHANGING, _SINCE = range(3)  # of rows, as the kernel's WHERE
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device
# Large pages are locked faster. No child process inherits the pages, because the kernel would copy those that are
# locked. Python has these constants where the system does.
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")


def zeros_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in the memory of the host, as a tensor of `device`; of a CPU or the meta device these are any zeros.

    The memory is freed with the tensor. Raises RankFailed where the host has not as much, or does not lock it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cuda" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.as_tensor(_Pages(size, device), device=device).view(dtype).view(shape)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor of a GPU is one of `zeros_on_host`, or a view of one."""
    return tensor.is_cuda and tensor.untyped_storage().data_ptr() in _Pages.addresses


def copy_within_host(target: Tensor, source: Tensor) -> None:
    """Copy a float32 tensor that `is_on_host` into a page-locked one of the CPU, in the order of the current stream.

    By a kernel, because CUDA's own copy from memory of the host to memory of the host makes the host wait.
    """
    there = _Addressed(target.data_ptr(), target.nbytes)
    on_device = torch.as_tensor(there, device=source.device).view(torch.int32)
    torch.bitwise_or(source.view(torch.int32).flatten(), 0, out=on_device)


class _Addressed:
    """Page-locked memory of the host, as torch.as_tensor reads it for a GPU."""

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address, False), "version": 3}


class _Pages(_Addressed):
    """Zeroed and page-locked memory for as long as this exists, which the tensor made of it keeps alive."""

    addresses: ClassVar[set[int]] = set()  # of all that exist

    def __init__(self, size: int, device: torch.device) -> None:
        free = free_memory()
        if free is not None and size > free:
            raise RankFailed(_message(size, f"{free / 2**30:.1f} GiB are free"))
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in _ADVICE:
            with suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        of_bytes = torch.frombuffer(memory, dtype=torch.uint8)
        of_bytes[:: mmap.PAGESIZE].zero_()  # by all cores, where locking alone would fetch one page after another
        super().__init__(of_bytes.data_ptr(), size)
        if refused := lock_pages(self._address, size, device):
            raise RankFailed(_message(size, f"it cannot be locked (CUDA error {refused}; see ulimit -l)"))
        self.addresses.add(self._address)
        # Not at the end of the process, which frees all, and when CUDA may be gone.
        weakref.finalize(self, _unlock_and_free, memory, self._address, device).atexit = False


def _unlock_and_free(memory: mmap.mmap, address: int, device: torch.device) -> None:
    """`memory` is freed when the caller lets go of it."""
    torch.cuda.synchronize(device)  # kernels may still use it
    _Pages.addresses.remove(address)
    unlock_pages(address)


def _message(size: int, reason: str) -> str:
    return (
        f"parallel.tables_on_host: {size / 2**30:.1f} GiB more of the host's memory are needed, and {reason}: make the "
        "tables smaller, or share their rows among more machines; `swamla-titan plan CONFIG` counts what they take"
    )


def rows_as(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`table[rows].to(dtype)`, of a contiguous table of a GPU in one pass; rows do not count from the end."""
    if _is_for_operators(table) or not table.is_contiguous():
        return table[rows].to(dtype)
    values = table.new_empty(len(rows), table.shape[1], dtype=dtype)
    _launch(table, rows, values, rows, rows, _ALL)
    return values


def copy_rows(table: Tensor, rows: Tensor, stays: Tensor | None = None) -> Tensor:
    """`table[rows]`; of rows for which `stays` [n, 1] is not 0 zeros, without reading them.

    Without `stays` by few programs: as many as keep PCIe busy, and no more, because others compute meanwhile.
    """
    if _is_for_operators(table):
        return table[rows] if stays is None else table[rows].where(stays == 0, 0)
    if stays is None:
        values = table.new_empty(len(rows), table.shape[1])
        _launch(table, rows, values, rows, rows, _ALL, programs=_PROGRAMS_BESIDE_OTHERS)
    else:
        values = table.new_zeros(len(rows), table.shape[1])
        _launch(table, rows, values, stays, stays, _CHANGING)
    return values


def copy_rows_again(values: Tensor, table: Tensor, rows: Tensor, touched: Tensor, since: Tensor) -> None:
    """Write `table[rows]` into `values` where a row's `touched` [*, 1], int32, is at least the scalar `since`.

    Of other rows nothing is read from the table.
    """
    if _is_for_operators(table):
        values.copy_(torch.where(touched[rows] >= since, table[rows], values))
    else:
        _launch(table, rows, values, touched, since, _SINCE)


def write_rows(table: Tensor, rows: Tensor, stays: Tensor, values: Tensor) -> None:
    """Write `values` [n, width] into rows of the table for which `stays` [n, 1] is 0, which are all different."""
    if _is_for_operators(table):
        [places] = torch.where(stays[:, 0] == 0)
        table.index_copy_(0, rows[places], values[places])
    else:
        _launch(table, rows, values, stays, stays, _CHANGING, writes=True)


def _is_for_operators(table: Tensor) -> bool:
    """Whether torch's operators move the table's rows, because there are none, or no Triton for its device."""
    return not table.numel() or bool(why_no_kernels(table.device))


def _launch(
    table: Tensor,
    rows: Tensor,
    values: Tensor,
    flag: Tensor,
    since: Tensor,
    where: int,
    writes: bool = False,
    programs: int | None = None,
) -> None:
    width, columns = table.shape[1], power_of_two(table.shape[1])
    assert table.is_contiguous(), "rows lie one behind the other"
    sizes = {"WIDTH": width, "COLUMNS": columns, "ROWS": min(_ROWS, max(_MOST_ELEMENTS // columns, 1))}
    if len(rows):
        programs = programs or -(-len(rows) // sizes["ROWS"])
        given = table, rows.contiguous(), values.contiguous(), flag.contiguous(), since, len(rows)
        with torch.cuda.device_of(table):  # Triton launches on the current one
            move_rows[(programs,)](*given, **sizes, WHERE=where, WRITES=writes)


@jit
def move_rows(
    table_ptr, rows_ptr, values_ptr, flag_ptr, since_ptr, number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, WHERE: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """table [*, WIDTH] at rows [number] -> values [number, WIDTH]; with WRITES the other way.

                 rows          table                          values
    program 0    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 0
    program 1    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 1
    program 0    ROWS   ->    ...                                                   tile 2, if there are 2 programs

    WHERE: 0: all; 1: where flag [number] is 0; 2: where flag [*] of the row is at least `since`. Of other rows neither
    table nor values are read or written. What is written is rounded to its dtype. COLUMNS is the power of two from
    WIDTH on.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(number, ROWS), tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        wanted = at < number
        row = tl.load(rows_ptr + at, mask=wanted, other=0)
        if WHERE == 1:
            wanted = wanted & (tl.load(flag_ptr + at, mask=wanted, other=1) == 0)
        if WHERE == 2:
            wanted = wanted & (tl.load(flag_ptr + row, mask=wanted, other=0) >= tl.load(since_ptr).to(tl.int32))
        inside = wanted[:, None] & (column < WIDTH)
        in_table = table_ptr + row[:, None] * WIDTH + column
        in_values = values_ptr + at.to(tl.int64)[:, None] * WIDTH + column
        if WRITES:
            tl.store(in_table, tl.load(in_values, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(in_values, tl.load(in_table, mask=inside, other=0.0), mask=inside)


def lock_pages(address: int, size: int, device: torch.device) -> int:
    """Page-lock memory for the GPUs; 0, or the number of CUDA's error."""
    # A new thread's current device is GPU 0, so it must be set.
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE))


def unlock_pages(address: int) -> None:
    """Undo `lock_pages`; before the memory is freed.

    An address stays locked when its memory is freed, and the next memory there could then not be locked, or copies
    would go to the old pages.
    """
    torch.cuda.cudart().cudaHostUnregister(address)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, or the container that the process is in, has free; None where it does not say."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))  # given up where needed
        found.append(limit - used + cached)
    return min(found, default=None)
