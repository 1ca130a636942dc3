"""Tables whose rows the ranks of a pipeline stage share: rank r holds rows r * n to (r + 1) * n.

All ranks of the stage share them, those of HSDP, DDP, tensor and context parallelism too, because each computes other
tokens of the residual stream. So a table is never gathered, and its gradient needs no reduction of its own:

    look up     distinct rows of a rank's tokens, sorted -> their owners; the rows come back      (two all-to-alls)
    backward    gradients summed by distinct row, float32 -> the same owners                      (one all-to-all)

How many rows go where is known only to the device, and the host needs it to receive them. On CUDA that is counted and
exchanged on a stream of its own, which begins when all is done that was queued before the look-up, because the indices
may be among it. So at each look-up the host waits for all that was queued before; a backward pass does not wait. It is
planned to hash and count ahead of the forward pass, on a stream that waits for the tokens alone.
"""

import os
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from swamla_titan.config import Config
from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.host_memory import free_memory
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.row_table import Backward, LocalRows, Rows, Segments, row_tables


def shard_row_tables(model: nn.Module, parallel: Parallel, world: World) -> None:
    """Give each rank of the pipeline stage its rows of the model's tables, in place, on the meta device.

    Nothing where there are none, or one rank, but for parallel.tables_on_host. Raises UserError for tables with
    parallel.cpu_offload.
    """
    tables = row_tables(model)
    if tables and parallel.cpu_offload:
        raise UserError(
            "parallel.cpu_offload: tables of embeddings are looked up where the tokens are computed, and stay there; "
            "set it to false, or share their rows among more ranks"
        )
    for table in tables.values() if parallel.tables_on_host else ():
        table.keep_on_host(world.device)
    if not tables or world.stage_group is None or world.stage_group.size() == 1:
        return
    mesh = DeviceMesh.from_group(world.stage_group, world.device.type, mesh_dim_names=("rows",))
    for weight, table in tables.items():
        table.weight = nn.Parameter(_sharded(weight, mesh), requires_grad=weight.requires_grad)
        table.placement = ShardedRows(len(weight), world.stage_group)


def bytes_on_host(model: nn.Module, config: Config) -> int:
    """What parallel.tables_on_host keeps in the memory of the host: weights, moments and average of a rank's tables.

    `model` may be on the meta device, and a part of one.
    """
    kept = 4 if config.ema.decay else 3
    return kept * sum(local(weight).nbytes for weight in row_tables(model)) if config.parallel.tables_on_host else 0


def validate_host_memory(config: Config, world: World) -> None:
    """Raise UserError if the tables of the ranks of this machine need more of its memory than is free.

    What each rank then takes can still fail (kernels/host_memory.py): the machine has other programs.
    """
    ranks = world.degrees.size
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or min(ranks, torch.cuda.device_count()))
    # Stages of a pipeline need different amounts, and which of them are here is not known yet.
    is_known = here == ranks or world.degrees.pipeline == 1
    if not config.parallel.tables_on_host or world.device.type != "cuda" or world.is_elsewhere or not is_known:
        return
    with torch.device("meta"):
        model = SWAMLAModel(replace(config.model, vocab_size=config.model.vocab_size or 1))
    size, free = bytes_on_host(model, config) * here // ranks, free_memory()
    if free is not None and size > free:
        raise UserError(
            f"parallel.tables_on_host: the tables of the {here} rank(s) of this machine take {size / 2**30:.1f} GiB of "
            f"its memory, with moments and average, and {free / 2**30:.1f} are free: make them smaller, or share their "
            "rows among more machines"
        )


def rows_of_rank(rows: int, ranks: int, rank: int) -> range:
    """The rows that a rank holds, as torch.chunk cuts them: the last ranks may have fewer, or none."""
    most = -(-rows // ranks)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))


def _sharded(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    assert weight.is_meta, "a table is sharded before it has values: it may be larger than a rank's memory"
    own = len(rows_of_rank(len(weight), mesh.size(), mesh.get_local_rank()))
    part = torch.empty(own, *weight.shape[1:], dtype=weight.dtype, device="meta")
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())


class _Request(NamedTuple):
    """What this rank asks of each rank, and each rank of it: distinct rows of a look-up, and how many of them."""

    segments: Segments
    sent: list[int]
    received: list[int]


class ShardedRows(LocalRows):
    """The placement of a table whose rows are shared by the ranks of `group`."""

    def __init__(self, rows: int, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()
        self._begins = [*(rows_of_rank(rows, self.size, rank).start for rank in range(self.size)), rows]
        self.begin = self._begins[group.rank()]
        self._stream: torch.cuda.Stream | None = None
        self._borders: Tensor | None = None

    def look_up(self, held: Rows, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Backward]:
        """As in LocalRows. Collective over the group, and so is the backward."""
        segments, sent, received = self._request(indices)
        distinct = segments.keys[segments.offsets[: sum(sent)]]
        asked = self._exchanged(distinct, sent, received) - self.begin
        found = self._exchanged(held.read(asked).to(dtype), received, sent)
        back = torch.empty_like(segments.order)
        back[segments.order] = segments.index

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
            return asked, self._exchanged(segments.sums(gradient)[: sum(sent)], sent, received)

        return found[back], backward

    def _exchanged(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send consecutive `rows` to each rank, and receive so many."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out

    def _request(self, indices: Tensor) -> _Request:
        if not indices.is_cuda:
            segments, counts = self._counted(indices)
            sent, received = counts.tolist()
            return _Request(segments, sent, received)
        self._stream = self._stream or torch.cuda.Stream(indices.device)
        now = torch.cuda.current_stream(indices.device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            segments, counts = self._counted(indices)
            on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            on_host.copy_(counts, non_blocking=True)
        self._stream.synchronize()
        now.wait_stream(self._stream)
        for each in (segments.keys, segments.order, segments.index, segments.offsets):
            each.record_stream(now)
        sent, received = on_host.tolist()
        return _Request(segments, sent, received)

    def _counted(self, indices: Tensor) -> tuple[Segments, Tensor]:
        """The distinct rows, and how many of them go to and come from each rank: [2, ranks]."""
        segments = Segments(indices)
        if self._borders is None:  # once, because the copy waits
            self._borders = torch.tensor(self._begins, device=indices.device)
        first = torch.searchsorted(segments.keys, self._borders)  # of each rank's keys
        runs = torch.searchsorted(segments.offsets, first)  # that begin before these, also where there are none
        counts = torch.stack((runs.diff(), torch.zeros_like(runs[1:])))
        dist.all_to_all_single(counts[1], counts[0], group=self.group)
        return segments, counts
