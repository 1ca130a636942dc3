"""Tables whose rows the ranks of a pipeline stage share: rank r holds rows r * n to (r + 1) * n.

All ranks of the stage share them, those of HSDP, DDP, tensor and context parallelism too, because each computes other
tokens of the residual stream. So a table is never gathered, and its gradient needs no reduction of its own:

    request     of all tables: how many distinct rows of a rank's tokens, and which -> their owners (two all-to-alls)
    look up     the rows of all tables -> who asked for them                                        (one all-to-all)
    backward    of a table: gradients summed by distinct row, float32 -> the same owners            (one all-to-all)

How many rows go where is known only to the device, and the host needs it to receive them. A request depends on tokens
alone. So it is made before the forward pass (`look_ups_ahead`), on CUDA within `ShardedRows.ahead`: on a stream and
through a process group of their own, which wait for nothing that computes. When the host then needs the counts of a
micro-batch they have been there since the one before, and for those of the first one of a step it waits for that
stream alone. A request that is made elsewhere is queued, and waited for, like anything else.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from swamla_titan.config import Config
from swamla_titan.config.sections import Parallel
from swamla_titan.data.batches import MicroBatch
from swamla_titan.distributed.dtensor import local, with_shard
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import hand_over, on_stream
from swamla_titan.kernels.host_memory import free_memory
from swamla_titan.kernels.rows import Segments
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annexes import ModelAnnexes, PreparedLookUp
from swamla_titan.model.row_table import LocalRows, RowRequest, row_tables


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
    if parallel.tables_on_host:
        beside = LocalRows(world.device)
        for table in tables.values():
            table.keep_on_host(world.device)
            table.placement = beside
    if not tables or world.stage_group is None or world.stage_group.size() == 1:
        return
    mesh = DeviceMesh.from_group(world.stage_group, world.device.type, mesh_dim_names=("rows",))
    placement = ShardedRows(world.stage_group, world.request_group or world.stage_group, world.device)
    for weight, table in tables.items():
        table.weight = nn.Parameter(_sharded(weight, mesh), requires_grad=weight.requires_grad)
        table.placement = placement


def bytes_on_host(model: nn.Module, config: Config) -> int:
    """What parallel.tables_on_host keeps in the memory of the host: weights, moments and average of a rank's tables.

    `model` may be on the meta device, and a part of one.
    """
    kept = 4 if config.ema.decay else 3
    return kept * sum(local(weight).nbytes for weight in row_tables(model)) if config.parallel.tables_on_host else 0


def validate_host_memory(config: Config, world: World) -> None:
    """Raise UserError if the tables of the ranks of this machine, and copies for checkpoints, are more than is free.

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
    copied = config.checkpoint.async_mode == "async"
    if free is not None and size * (1 + copied) > free:
        copies = " as much for copies of them (checkpoint.async_mode)," if copied else ""
        way_out = 'set checkpoint.async_mode = "disabled", ' if copied else ""
        raise UserError(
            f"parallel.tables_on_host: the tables of the {here} rank(s) of this machine take {size / 2**30:.1f} GiB of "
            f"its memory, with moments and average,{copies} and {free / 2**30:.1f} are free: {way_out}make them "
            "smaller, or share their rows among more machines"
        )


def rows_of_rank(rows: int, ranks: int, rank: int) -> range:
    """The rows that a rank holds, as torch.chunk cuts them: the last ranks may have fewer, or none."""
    most = -(-rows // ranks)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))


def _sharded(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    assert weight.is_meta, "a table is sharded before it has values: it may be larger than a rank's memory"
    own = len(rows_of_rank(len(weight), mesh.size(), mesh.get_local_rank()))
    part = torch.empty(own, *weight.shape[1:], dtype=weight.dtype, device="meta")
    return with_shard(part, mesh, [Shard(0)], weight)


class ShardedRows(LocalRows):
    """The placement of tables whose rows are shared by the ranks of `group`.

    `requests` are the same ranks; requests go through it, rows and gradients through the other.
    """

    def __init__(self, group: dist.ProcessGroup, requests: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(device)
        self.group, self.requests = group, requests
        self._on_device: dict[tuple[int, ...], Tensor] = {}

    def request(self, sizes: Sequence[int], indices: Sequence[Tensor]) -> RowRequest:
        """As in LocalRows. Collective over the group."""
        return ShardedRequest(self, sizes, indices)

    def borders(self, sizes: Sequence[int]) -> list[int]:
        """Where each rank's rows begin, table by table, counted through all tables, and the end of all.

        They are tables * ranks + 1.
        """
        ranks, firsts = self.group.size(), accumulate(sizes, initial=0)
        begins = [
            first + rows_of_rank(size, ranks, r).start for first, size in zip(firsts, sizes) for r in range(ranks)
        ]
        return [*begins, sum(sizes)]

    def borders_on(self, device: torch.device, sizes: Sequence[int]) -> Tensor:
        """The same on the device, copied once, because the copy waits."""
        if (key := tuple(sizes)) not in self._on_device:
            self._on_device[key] = torch.tensor(self.borders(sizes), device=device)
        return self._on_device[key]


class ShardedRequest(RowRequest):
    """A request of rows that the ranks of `shards` share; collective.

    The rows of all tables are counted through, so that one sort finds the distinct ones of each table and rank.
    """

    def __init__(self, shards: ShardedRows, sizes: Sequence[int], indices: Sequence[Tensor]) -> None:
        super().__init__(indices)
        self._shards, self._sizes = shards, sizes
        self._stream = torch.cuda.current_stream(indices[0].device) if indices[0].is_cuda else None
        firsts = accumulate(sizes, initial=0)
        self._all = Segments(torch.cat([each + first for each, first in zip(self._indices, firsts)]))
        self._counts = _ForHost(self._counted())
        self._asked: list[Tensor] | None = None

    def rows(self) -> list[Tensor]:
        """As in RowRequest. The first call waits for the counts, and lets the current stream wait for the rows."""
        if self._asked is None:
            with on_stream(self._stream):
                self._asked = self._ask(*self._counts.read())
            of_tables = [each for of_table in self._of_tables for each in (of_table.order, of_table.offsets)]
            hand_over(self._stream, [*self._asked, *self._runs, *of_tables])
        return self._asked

    def returned(self, read: list[Tensor]) -> list[Tensor]:
        """As in RowRequest."""
        found = _exchanged_together(read, self._received, self._sent, self._shards.group)
        return [rows[runs] for rows, runs in zip(found, self._runs)]

    def summed(self, table: int, gradient: Tensor) -> Tensor:
        """As in RowRequest."""
        sums = self._of_tables[table].sums(gradient)
        return _exchanged(sums, self._sent[table], self._received[table], self._shards.group)

    def _counted(self) -> Tensor:
        """How many distinct rows of each table go to each rank, and how many come from each: [2, ranks, tables]."""
        keys = self._all.keys
        first = torch.searchsorted(keys, self._shards.borders_on(keys.device, self._sizes))  # of each rank and table
        runs = torch.searchsorted(self._all.offsets, first)  # that begin before these, also where there are none
        sent = runs.diff().view(len(self._sizes), -1).T
        counts = torch.stack((sent, torch.zeros_like(sent)))
        dist.all_to_all_single(counts[1], counts[0], group=self._shards.requests)
        return counts

    def _ask(self, *counts: list[list[int]]) -> list[Tensor]:
        """Send the distinct rows to their owners; what this rank was asked for. `counts` as of `_counted`."""
        self._sent, self._received = ([list(of_table) for of_table in zip(*each)] for each in counts)
        self._of_tables = list(self._all.of_kinds(list(map(len, self._indices)), list(map(sum, self._sent))))
        self._runs = [each.runs() for each in self._of_tables]
        distinct = [each.keys[each.offsets[:-1]] for each in self._of_tables]
        asked = _exchanged_together(distinct, self._sent, self._received, self._shards.requests)
        begins = self._shards.borders(self._sizes)[self._shards.group.rank() :: self._shards.group.size()]
        del self._all, self._indices
        return [keys - begin for keys, begin in zip(asked, begins)]


class _ForHost:
    """Values of a tensor that the host reads later; it waits for them, and for nothing that was queued after them."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._is_there = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def read(self) -> list[list[list[int]]]:
        if self._is_there:
            self._is_there.synchronize()
        values: list[list[list[int]]] = self._values.tolist()
        return values


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send consecutive `rows` to each rank, and receive so many."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _exchanged_together(
    tables: list[Tensor], sent: list[list[int]], received: list[list[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """The same of rows of several tables, `sent[table][rank]` and `received`, in one message."""
    if len(tables) == 1:
        return [_exchanged(tables[0], sent[0], received[0], group)]
    widths = [math.prod(rows.shape[1:]) for rows in tables]
    sent, received = ([[n * width for n in of] for of, width in zip(each, widths)] for each in (sent, received))
    pieces = zip(*(rows.flatten().split(of) for rows, of in zip(tables, sent)))
    flat = torch.cat([piece for of_rank in pieces for piece in of_rank])
    out = _exchanged(
        flat, [sum(of_rank) for of_rank in zip(*sent)], [sum(of_rank) for of_rank in zip(*received)], group
    )
    found = out.split([size for of_rank in zip(*received) for size in of_rank])
    return [torch.cat(found[i :: len(tables)]).view(-1, *rows.shape[1:]) for i, rows in enumerate(tables)]


Inputs = tuple[MicroBatch, PreparedLookUp | None]
"""A micro-batch on the device, and the rows that annexes look up for it; None without annexes."""


def look_ups_ahead(annexes: ModelAnnexes, micro_batches: Iterable[MicroBatch]) -> Iterator[Inputs]:
    """Iterate over micro-batches with their look-ups; each is prepared before the one before it is given.

    The first look-up is prepared by the call itself. `micro_batches` are on the device, or are copied there when they
    are taken, which is within `placement.ahead`: so the device must not still compute them. Rows of tables on the host
    are read ahead too. Where ranks share tables, the call and each `next` are collective.
    """
    placement, source = annexes.placement, iter(micro_batches)

    def prepared() -> Inputs | None:
        with placement.ahead():
            batch = next(source, None)
            return None if batch is None else (batch, annexes.prepare(batch.tokens, batch.document_ids))

    def given(inputs: Inputs | None) -> Iterator[Inputs]:
        while inputs is not None:
            batch, look_up = inputs
            tensors = [each for each in (batch.tokens, batch.targets, batch.document_ids) if each is not None]
            if look_up is not None:
                # Known before the next is prepared, behind which they would have to wait.
                tensors += [look_up.context.positions, *look_up.request.rows()]
                with placement.ahead():
                    tensors += look_up.request.read_ahead(annexes.tables)
            placement.hand_over(tensors)
            following = prepared()
            yield inputs
            inputs = following

    return given(prepared())
