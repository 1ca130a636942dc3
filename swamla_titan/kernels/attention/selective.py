"""Selective attention (Leviathan et al., arXiv:2410.02703): queries mask keys for the queries behind them.

One head selects. With S its scaled scores, as its softmax has them, before anything is subtracted,

    F[t, s] = sum over queries u with s < u < t of relu(S[u, s]), for each key s but the first of its document,

and the logits of every head, the selecting one among them, become scale * query key^T - F before the softmax. So a
query is masked by what earlier queries selected, and neither itself nor the first token of a document ever is. Pairs of
one document have nothing but tokens of that document between them, hence F never crosses a border.

Backward: with dL the gradients of the logits, summed over the heads, that of relu(S[u, s]) is minus the sum over
t > u of dL[t, s], and goes into the selecting head's queries and keys.

Queries are taken in slabs (`Slab`), which are the shorter the longer the sequence is: F of a slab is there for all
heads at once, and the sums of what was selected before it are one element a key. The backward pass takes the slabs from
the last on and needs the sums before each. The forward pass saves those before each stretch of slabs (`stretches`), of
which a chunk has at most `MOST_SAVED`, and within a stretch it is selected again:

    slabs of a chunk   [ 0 | 1 | 2 ][ 3 | 4 | 5 ][ 6 | 7 ]      stretches of three
    saved sums         ^            ^            ^              before 0, 3 and 6
    backward           7: select 6 again for the sums before it; 6; 5: select 3 and 4 again; 4: ...

So memory grows with the length of the sequence, and not with its square.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Size, Tensor

from swamla_titan.kernels.attention import selective_triton as kernels
from swamla_titan.kernels.attention.masks import Selection, SelectionRule, attention_flops, chunk_pairs
from swamla_titan.kernels.device import SplitWidth, Tiles, strides, tma_descriptors_of_two, tma_readable
from swamla_titan.kernels.operator import differentiate

MOST_ELEMENTS = 1 << 26  # of F at a time: 128 MiB, and 256 MiB of its gradient; 16 sequences of 2048 in one slab
MOST_SAVED = 64  # slabs of a chunk before which the sums are saved: 256 bytes a token; all up to 65,536 tokens
_ALIGNED = 8  # elements of 16 bits: where a row of F may begin, for the tensor memory accelerator
_ROWS = 128  # queries of a slab at least, and a divisor of those of most
_REFERENCE_ROWS = 1024

T = TypeVar("T")


class Slab(NamedTuple):
    """Consecutive queries of one chunk: where they are in the tensor of queries (`at`) and in the sequence."""

    at: slice
    places: slice

    @property
    def rows(self) -> int:
        """How many."""
        return self.at.stop - self.at.start


def slabs_of_chunks(starts: Sequence[int], queries: int, most_rows: int) -> list[list[Slab]]:
    """Of each chunk its slabs in order; the chunks are of equal length, `queries` in all, and begin at `starts`."""
    length = queries // len(starts)

    def slab(chunk: int, first: int) -> Slab:
        end = min(first + most_rows, length)
        before, start = chunk * length, starts[chunk]
        return Slab(slice(before + first, before + end), slice(start + first, start + end))

    return [[slab(chunk, first) for first in range(0, length, most_rows)] for chunk in range(len(starts))]


def selective_attention(query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float) -> Tensor:
    """Selective attention by our Triton kernels, forward and backward, as one operator (CUDA).

    query [B, Q, H, D], key [B, S, H, D], value [B, S, H, E] as for document_attention, Q queries that are
    chunks of the sequence -> [B, Q, H, E], contiguous. Value and gradients are the same in every run.
    """
    rule, by = selection.rule, (selection.query, selection.key, selection.before)
    out: Tensor = _forward(query, key, value, *by, rule.starts, rule.ends, list(rule.chunks), selection.head, scale)[0]
    return out


def selected_sums(query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
    """What each chunk of queries selects of each key, by our kernels: the sum of relu(S), [B, chunks, S] float32.

    From the selecting head's query [B, Q, D] and key [B, S, D].
    """
    sums: Tensor = _sums(query, key, rule.starts, rule.ends, list(rule.chunks), scale)
    return sums


def reference_selective_attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float
) -> Tensor:
    """`selective_attention` written down, for any device and dtype; the softmax as in reference_attention."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rule, outs = selection.rule, []
    by = selecting_head(query.transpose(1, 2), key.transpose(1, 2), selection.query, selection.key, selection.head)
    for chunk, slabs in enumerate(slabs_of_chunks(rule.chunks, query.shape[2], _REFERENCE_ROWS)):
        total = None if selection.before is None else selection.before[:, chunk]
        for slab in slabs:
            selected = _selected(by[0][:, slab.at], by[1], rule, slab, scale)  # [B, rows, S]
            bias = _earlier(selected) if total is None else _earlier(selected) + total[:, None]
            total = bias[:, -1] + selected[:, -1]
            scores = (query[:, :, slab.at] @ key.transpose(-2, -1) * scale).to(bias.dtype) - bias[:, None]
            scores = scores.masked_fill(~_seen(rule, slab)[:, None], float("-inf"))
            outs.append(scores.softmax(dim=-1).to(value.dtype) @ value)
    return torch.cat(outs, dim=2).transpose(1, 2)


def reference_selected_sums(query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
    """`selected_sums` written down."""
    found = [
        torch.stack([_selected(query[:, slab.at], key, rule, slab, scale).sum(dim=1) for slab in slabs]).sum(dim=0)
        for slabs in slabs_of_chunks(rule.chunks, query.shape[1], _REFERENCE_ROWS)
    ]
    return torch.stack(found, dim=1)


def reference_selected_before(query: Tensor, key: Tensor, rule: SelectionRule, scale: float) -> Tensor:
    """F [B, T, T] of full sequences, from the selecting head's queries and keys [B, T, D]."""
    [[slab]] = slabs_of_chunks((0,), query.shape[1], query.shape[1])
    return _earlier(_selected(query, key, rule, slab, scale))


def selecting_head(
    query: Tensor, key: Tensor, by_query: Tensor | None, by_key: Tensor | None, head: int
) -> tuple[Tensor, Tensor]:
    """The queries [B, Q, D] and keys [B, S, D] that select: those given, or of a head of query and key."""
    if by_query is None or by_key is None:
        return query[:, :, head], key[:, :, head]
    return by_query, by_key


def _selected(query: Tensor, key: Tensor, rule: SelectionRule, slab: Slab, scale: float) -> Tensor:
    """relu(S) of a slab's queries [B, rows, D] and all keys, 0 where nothing is selected: [B, rows, S].

    In float32 at least, as the kernels have them: it is added up over queries.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    return torch.where(_seen(rule, slab, strictly=True), scores.relu(), 0.0)


def _earlier(selected: Tensor) -> Tensor:
    """The sum over earlier queries, of something [B, rows, S] for each query."""
    if not selected.is_cuda:
        return selected.cumsum(dim=1) - selected
    # A GPU's cumsum is refused under deterministic algorithms; matmuls in float64 know no TF32.
    rows = selected.shape[1]
    earlier = torch.ones(rows, rows, dtype=torch.float64, device=selected.device).tril(-1)
    return (earlier @ selected.double()).to(selected.dtype)


def _seen(rule: SelectionRule, slab: Slab, strictly: bool = False) -> Tensor:
    """Which keys a slab's queries see, boolean [B or 1, rows, S]; strictly: may select."""
    key = torch.arange(rule.starts.shape[1], device=rule.starts.device)
    query, start = key[slab.places, None], rule.starts[:, slab.places, None]
    return (key < query) & (key > start) if strictly else (key <= query) & (key >= start)


# The fastest on an H200 of those that benchmarks/attention_tiles.py tries.
FORWARD = Tiles(128, 64, 8, 3)
BACKWARD = Tiles(128, 32, 8, 3), Tiles(32, 64, 4, 2)  # of queries, and of keys and values
SELECTION = Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 2)  # of the selecting head, and of the sum of the logits' gradients


def _most_rows(batch: int, seq_len: int) -> int:
    """The queries of a slab, if its chunk has as many."""
    return max(MOST_ELEMENTS // (batch * seq_len) // _ROWS, 1) * _ROWS


def saved_sums(batch: int, seq_len: int, length: int) -> int:
    """Sums, [B, S] float32 each, that the forward pass saves of a chunk of `length` queries."""
    return len(stretches(range(0, length, _most_rows(batch, seq_len))))


def stretches(slabs: Sequence[T]) -> list[Sequence[T]]:
    """The slabs of a chunk in equal stretches, but for the last, as short as MOST_SAVED of them allow."""
    length = -(-len(slabs) // MOST_SAVED)
    return [slabs[first : first + length] for first in range(0, len(slabs), length)]


def with_sums(slabs: Sequence[T], saved: Tensor) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Slabs in order, and where the sums before and after each are written.

    Those before a stretch have a buffer of their own in `saved`; the others share one and overwrite each other.
    """
    shared = torch.empty_like(saved[0])
    buffers = [each for own, stretch in zip(saved, stretches(slabs)) for each in (own, *[shared] * (len(stretch) - 1))]
    return zip(slabs, buffers, [*buffers[1:], shared])


def slabs_in_reverse(
    slabs: Sequence[T], saved: Tensor, select: Callable[[T, Tensor, Tensor], None]
) -> Iterator[tuple[T, Tensor]]:
    """Slabs from the last on, with the sums before each, of which `saved` has those before each stretch.

    `select(slab, before, after)` computes the sums after a slab from those before it. It is called again for the slabs
    of a stretch, whose sums are saved likewise: at most MOST_SAVED of them, and of more than MOST_SAVED^2 slabs twice
    as many.
    """
    for stretch, before in reversed(list(zip(stretches(slabs), saved))):
        if len(stretch) == 1:
            yield stretch[0], before
        else:
            again = saved.new_empty(len(stretches(stretch)), *before.shape)
            again[0] = before
            for each in islice(with_sums(stretch, again), len(stretch) - 1):
                select(*each)
            yield from slabs_in_reverse(stretch, again, select)


class _Pass:
    """What the kernels of a pass share: queries that are chunks of a sequence, all its keys, and the slabs."""

    def __init__(
        self, query: Tensor, key: Tensor, starts: Tensor, ends: Tensor, chunks: Sequence[int], scale: float
    ) -> None:
        """query [B, Q, ..., D] and key [B, S, ..., D]; starts and ends as in SelectionRule."""
        self.device, self.scale = query.device, scale
        self.batch, self.queries, self.seq_len, self.width = *query.shape[:2], key.shape[1], query.shape[-1]
        for bounds in (starts, ends):  # else it would read what is not there
            assert bounds.shape in ((1, self.seq_len), (self.batch, self.seq_len))
            assert bounds.is_contiguous()
            assert bounds.dtype == torch.int32
        assert self.queries % len(chunks) == 0
        assert max(chunks) + self.queries // len(chunks) <= self.seq_len
        self.bounds, self.split = (starts, ends), SplitWidth.of(self.width)
        self.starts_batch = self.seq_len if starts.shape[0] == self.batch else 0
        self.chunks = slabs_of_chunks(chunks, self.queries, _most_rows(self.batch, self.seq_len))
        self.last, self.room = self.chunks[-1][-1], self.chunks[0][0].rows  # no other slab has more rows
        self.row_width = -(-self.seq_len // _ALIGNED) * _ALIGNED

    def float32(self, *shape: int) -> Tensor:
        """An uninitialized tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def pairs(self, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor with an element for each query of a slab and each key, [B, room, row_width]."""
        return torch.empty(self.batch, self.room, self.row_width, dtype=dtype, device=self.device)

    def by_keys(self, tiles: Tiles, *heads: int) -> tuple[int, ...]:
        """A grid of tiles of keys."""
        return -(-self.seq_len // tiles.keys), *heads, self.batch

    def by_keys_seen(self, slab: Slab, tiles: Tiles, *others: int) -> tuple[int, ...]:
        """A grid of tiles of the keys that a slab's queries may see."""
        return -(-slab.places.stop // tiles.keys), *others

    def by_queries(self, slab: Slab, tiles: Tiles, *heads: int) -> tuple[int, ...]:
        """A grid of tiles of a slab's queries."""
        return -(-slab.rows // tiles.queries), *heads, self.batch

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        slab: Slab,
        tiles: Tiles,
        *own: Any,
        sizes: Sequence[int] = (),
        **rest: Any,
    ) -> None:
        """A kernel for a slab: its own arguments, then slab and sizes, which all kernels take in this order."""
        where = self.starts_batch, slab.at.start, slab.places.start, slab.rows, self.room, self.row_width
        kernel[grid](
            *own, *where, *sizes, self.seq_len, self.scale, **self.split._asdict(), **tiles.constants(), **rest
        )

    def select(
        self, by: tuple[Tensor, Tensor], slab: Slab, before: Tensor, after: Tensor, f: Tensor | None = None
    ) -> None:
        """F of a slab, and the sums of what was selected after it, from those before.

        By the selecting head's queries [B, Q, D] and keys [B, S, D].
        """
        tiles = SELECTION[0]
        own = *by, *self.bounds, before, after, after if f is None else f, *strides(*by)
        self.launch(kernels.select_keys, self.by_keys(tiles), slab, tiles, *own, STORED=f is not None)

    def grad_selecting(
        self, slab: Slab, by: tuple[Tensor, Tensor], grad: Tensor, after: Tensor, before: Tensor, of_f: bool,
        grad_query: Tensor, grad_key: Tensor,
    ) -> None:  # fmt: skip
        """Gradients of the selecting head's queries in a slab, and of its keys; slabs are taken from the last on.

        `grad`: the sums of the logits' gradients over heads, if `of_f`; overwritten. `after`: the gradient of the sums
        after the slab, of which comes that of those `before`.
        """
        tiles = SELECTION[0]
        own = *by, *self.bounds, grad, after, before, grad_key, *strides(*by)
        options: dict[str, Any] = {"OF_F": of_f, "ADDED": slab is not self.last}
        self.launch(kernels.grad_selected, self.by_keys(tiles), slab, tiles, *own, **options)
        own = by[1], self.bounds[0], grad, grad_query, *strides(by[1])
        grid = self.by_queries(slab, tiles)
        self.launch(kernels.grad_selecting, grid, slab, tiles, *own, sizes=(self.queries,))


def _tiles_of(f: Tensor, tiles: Tiles) -> Any:
    """By which the tensor memory accelerator reads F, [B, rows, S] as `_Pass.pairs` has it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(f, list(f.shape), list(f.stride()), [1, tiles.queries, tiles.keys])


@torch.library.custom_op("swamla_titan::selective_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    before: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    chunks: list[int],
    head: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Q, H, E], lse [B, H, Q] as in document.py, and sums before slabs, [chunks, saved_sums, B, S] float32."""
    batch, queries, heads, _ = query.shape
    assert key.shape[2:] == query.shape[2:]
    assert value.shape[:3] == key.shape[:3]
    by = selecting_head(query, key, by_query, by_key, head)
    key, value = tma_readable(key), tma_readable(value)
    v_width, tiles = value.shape[-1], FORWARD
    out = query.new_empty(batch, queries, heads, v_width)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    run = _Pass(query, key, starts, ends, chunks, scale)
    saved = run.float32(len(chunks), len(stretches(run.chunks[0])), batch, run.seq_len)
    f = run.pairs(torch.float16)
    saved[:, 0] = 0 if before is None else before.transpose(0, 1)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        read = *tma_descriptors_of_two(key, value, tiles.keys), _tiles_of(f, tiles)
        for slabs, of_chunk in zip(run.chunks, saved):
            for slab, so_far, after in with_sums(slabs, of_chunk):
                run.select(by, slab, so_far, after, f)
                own = *read, query, out, lse, starts, *strides(query, out)
                grid, sizes = run.by_queries(slab, tiles, heads), (queries, heads)
                run.launch(kernels.selective_forward, grid, slab, tiles, *own, sizes=sizes, DV=v_width)
    return out, lse, saved


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, by_query: Any, by_key: Any, before: Any, starts: Any, ends: Any,
    chunks: list[int], head: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, _ = query.shape
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    count = saved_sums(batch, key.shape[1], queries // len(chunks))
    saved = lse.new_empty(len(chunks), count, batch, key.shape[1])
    return query.new_empty(batch, queries, heads, value.shape[-1]), lse, saved


@torch.library.custom_op("swamla_titan::selective_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: Tensor,
    chunks: list[int],
    head: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, by_query, by_key, and of `before` [B, chunks, S].

    Those of by_query and by_key are empty where there are none: then they are in those of query and key.
    """
    by = selecting_head(query, key, by_query, by_key, head)
    run = _Pass(query, key, starts, ends, chunks, scale)
    grad_by = run.float32(run.batch, run.queries, run.width), run.float32(run.batch, run.seq_len, run.width)
    later, grad_before = run.float32(run.batch, run.seq_len), run.float32(len(chunks), run.batch, run.seq_len)
    unused, none = torch.empty_like(later), torch.zeros_like(later)
    f, grad = run.pairs(torch.float16), run.pairs(torch.float32)
    with torch.cuda.device_of(query):
        of_heads = _GradientsOfHeads(run, grad_out, query, key, value, out, lse)
        select = partial(run.select, by)
        for slabs, of_chunk, grad_of_chunk in reversed(list(zip(run.chunks, saved, grad_before))):
            for slab, before in slabs_in_reverse(slabs, of_chunk, select):
                select(slab, before, unused, f)
                of_heads.add(slab, f, grad)
                after = none if slab is slabs[-1] else later
                grad_sums = grad_of_chunk if slab is slabs[0] else later
                run.grad_selecting(slab, by, grad, after, grad_sums, True, *grad_by)
    grad_query, grad_key, grad_value = of_heads.results()
    if by_query is None:
        grad_query[:, :, head] += grad_by[0]
        grad_key[:, :, head] += grad_by[1]
        grad_by = run.float32(0), run.float32(0)
    of_by = grad_by[0].to(query.dtype), grad_by[1].to(key.dtype)
    return grad_query, grad_key, grad_value, *of_by, grad_before.transpose(0, 1).contiguous()


class _GradientsOfHeads:
    """Gradients of all heads, slab by slab from the last on, as document.py has them; F is taken as given."""

    def __init__(
        self, run: _Pass, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        grad_out, query, key, value = (tma_readable(each) for each in (grad_out, query, key, value))
        self.run, self.grad_out, self.query, self.key, self.value, self.out = run, grad_out, query, key, value, out
        self.lse, self.delta, self.dtype = lse, torch.empty_like(lse), query.dtype
        self.grad_query = query.new_empty(query.shape)
        is_one = run.last is run.chunks[0][0]
        kept = query.dtype if is_one else torch.float32  # sums over slabs are added up in float32
        self.grad_key, self.grad_value = (x.new_empty(x.shape, dtype=kept) for x in (key, value))

        of_queries, of_keys, of_logits = *BACKWARD, SELECTION[1]
        self.read_keys = tma_descriptors_of_two(key, value, of_queries.keys)
        self.read_queries = tma_descriptors_of_two(query, grad_out, of_keys.queries)
        of_logits_by_queries = tma_descriptors_of_two(query, grad_out, of_logits.queries)
        self.read_all = *of_logits_by_queries, *tma_descriptors_of_two(key, value, of_logits.keys)

    def add(self, slab: Slab, f: Tensor, grad: Tensor) -> None:
        """Gradients by a slab's queries; `grad` becomes the sum over heads of those of its logits."""
        run, starts = self.run, self.run.bounds[0]
        (of_queries, of_keys), of_logits = BACKWARD, SELECTION[1]
        heads = self.query.shape[2]
        rest: dict[str, Any] = {"sizes": (run.queries, heads), "DV": self.value.shape[-1]}

        given = self.query, self.out, self.grad_out, self.grad_query
        own = *self.read_keys, _tiles_of(f, of_queries), *given, self.lse, self.delta, starts, *strides(*given)
        grid = run.by_queries(slab, of_queries, heads)
        run.launch(kernels.selective_grad_query, grid, slab, of_queries, *own, **rest)

        given = self.key, self.value, self.grad_key, self.grad_value
        own = *self.read_queries, _tiles_of(f, of_keys), *given, self.lse, self.delta, *run.bounds, *strides(*given)
        added = slab is not run.last  # which comes first, and gives all keys a value
        grid = run.by_keys_seen(slab, of_keys, heads, run.batch) if added else run.by_keys(of_keys, heads)
        run.launch(kernels.selective_grad_key_value, grid, slab, of_keys, *own, **rest, ADDED=added)

        grid = run.by_keys_seen(slab, of_logits, *run.by_queries(slab, of_logits))
        own = *self.read_all, f, grad, self.lse, self.delta, starts
        run.launch(kernels.selection_grad, grid, slab, of_logits, *own, **rest)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        return self.grad_query, self.grad_key.to(self.dtype), self.grad_value.to(self.dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, by_query: Tensor | None, by_key: Tensor | None,
    starts: Any, ends: Any, out: Any, lse: Tensor, saved: Any, chunks: list[int], head: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_by = [query.new_empty(0 if each is None else each.shape) for each in (by_query, by_key)]
    grad_before = lse.new_empty(query.shape[0], len(chunks), key.shape[1])
    return *(x.new_empty(x.shape) for x in (query, key, value)), *of_by, grad_before


def _flops(query: Size, value: Size, chunks: list[int], **_: Any) -> int:
    return attention_flops(query, value[3], chunk_pairs(query[1], chunks))


differentiate(_forward, _backward, ("out", "lse", "saved"), _flops)


@torch.library.custom_op("swamla_titan::selected_sums", mutates_args=())
def _sums(query: Tensor, key: Tensor, starts: Tensor, ends: Tensor, chunks: list[int], scale: float) -> Tensor:
    run = _Pass(query, key, starts, ends, chunks, scale)
    sums = run.float32(len(chunks), run.batch, run.seq_len).zero_()
    with torch.cuda.device_of(query):
        for slabs, total in zip(run.chunks, sums):
            for slab in slabs:
                run.select((query, key), slab, total, total)
    return sums.transpose(0, 1).contiguous()


@_sums.register_fake
def _(query: Tensor, key: Tensor, starts: Any, ends: Any, chunks: list[int], scale: float) -> Tensor:
    return query.new_empty(query.shape[0], len(chunks), key.shape[1], dtype=torch.float32)


@torch.library.custom_op("swamla_titan::selected_sums_backward", mutates_args=())
def _sums_backward(
    grad_sums: Tensor, query: Tensor, key: Tensor, starts: Tensor, ends: Tensor, chunks: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    run = _Pass(query, key, starts, ends, chunks, scale)
    gradients = run.float32(run.batch, run.queries, run.width), run.float32(run.batch, run.seq_len, run.width)
    grad, unused = run.pairs(torch.float32), run.float32(run.batch, run.seq_len)
    with torch.cuda.device_of(query):
        for slabs, after in reversed(list(zip(run.chunks, grad_sums.transpose(0, 1).contiguous()))):
            for slab in reversed(slabs):
                run.grad_selecting(slab, (query, key), grad, after, unused, False, *gradients)
    return gradients[0].to(query.dtype), gradients[1].to(key.dtype)


differentiate(_sums, _sums_backward)
