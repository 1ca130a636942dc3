"""Sequences that ranks share: context parallelism, for sequences that are longer than one GPU has memory for.

All ranks of a context group are given the same full sequences, and each computes its own chunks of them
(sequence_layout.py). Blocks work on single tokens but for attention, whose `key_exchange` is
- "gather": what decoding would keep is gathered, as MLA's latent and rotary key of each token, not keys and values:
  with the default sizes 320 values a token instead of 5120 for 16 heads. Each rank expands them for the full sequence.
  Selective attention gathers what each chunk's queries selected of each key, a sum for each chunk and key, as well.
- "halo": the windows' halos and the sinks are exchanged (`exchange_windows`), however long the sequence is.
Annexes whose result depends on some tokens before a token, as by a convolution, exchange these tokens' values, also
where tensor parallelism cuts the residual stream (`share_stream`). Gradients of parameters are then sums over the
rank's own tokens; whoever averages gradients adds them up over the group.

Collectives (distributed/collectives.py) are started before they are waited for. Tensors hold the tokens of one rank,
[B, 2 * chunk, ...], unless they are said to hold full sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from swamla_titan.distributed.collectives import OPERATORS, waited
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.dispatch import SelectiveImplementation, choose
from swamla_titan.kernels.attention.masks import (
    Chunks,
    KeyIntervals,
    Mask,
    MaskForm,
    MaskSpec,
    Selection,
    SelectionRule,
    block_mask_of,
    dense_mask_of,
    document_ends,
    document_starts,
    intervals_in_sequence,
)
from swamla_titan.kernels.attention.selective import selecting_head
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annex import StreamContext, StreamLayout
from swamla_titan.model.blocks import Block, attention_kinds
from swamla_titan.model.branch import Attention, AttentionContext, InnerAttention, KeyExchange, SequenceContext
from swamla_titan.model.context import FullSequences
from swamla_titan.parallel.sequence_layout import (
    HaloExchange,
    SequenceLayout,
    Traffic,
    WindowExchangePlan,
    chunks_of,
    plan_halos,
    plan_window_exchange,
    stretches,
    window_exchange_bytes,
)


@dataclass(frozen=True)
class WindowSlice(AttentionContext):
    """For this rank's tokens and "halo"; `mask` is over the sections that `exchange_windows` lays out."""

    group: str  # the context group's name, which is how operators in a graph know it
    exchange: WindowExchangePlan
    sink_index: Tensor  # [B or 1, 2 * ranks * sinks]
    sink_owned: Tensor


@dataclass(frozen=True)
class GatheredSlice(AttentionContext):
    """For this rank's tokens and "gather"; `mask` is over the keys of full sequences."""

    group: str
    layout: SequenceLayout


def apply_context_parallel(model: SWAMLAModel, group: dist.ProcessGroup) -> None:
    """Make `model` compute this rank's slice of each sequence, in place; `group` is the context group.

    Called before blocks are compiled and parameters sharded. The model (or a pipeline stage of one) then takes full
    sequences, whose length must be divisible by twice the group's size (config/parallel_rules.py). Decoding (`prefill`,
    `decode`) is not shared; it continues as on one process. A group of one changes nothing.

    Raises UserError for a kind of block that cannot share sequences.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    model.sequences = SharedSequences(size, rank, group.group_name)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        mixer = block.attention
        if not isinstance(mixer, Attention) or mixer.key_exchange not in _INNER:
            raise UserError(f"parallel.context = {size}: {block.kind} blocks cannot share sequences; use 1")
        mixer.inner_attention = _INNER[mixer.key_exchange]()


class WindowExchange(InnerAttention):
    """Attention of this rank's queries, keys and values, [B, 2 * chunk, ...], and the keys that windows add to them."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """As in InnerAttention."""
        assert isinstance(context, WindowSlice)
        assert selection is None, "the keys that windows do not reach are not exchanged"
        sinks = context.sink_index, context.sink_owned
        key, value = exchange_windows(key, value, context.exchange, *sinks, context.group)
        return context.attend(query, key, value, scale)


class LatentGather(InnerAttention):
    """Attention of this rank's queries to keys and values of full sequences, made from gathered latents."""

    def gather(self, latent: Tensor, rope_key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """As in InnerAttention, from latents [B, 2 * chunk, R] and rotated keys [B, 2 * chunk, 1, rope]."""
        assert isinstance(context, GatheredSlice)
        width = latent.shape[-1]
        gathered = all_gather_sequence(torch.cat([latent, rope_key.squeeze(2)], dim=-1), context.layout, context.group)
        return gathered[..., :width], gathered[..., width:].unsqueeze(2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        scale: float,
        selection: Selection | None = None,
    ) -> Tensor:
        """As in InnerAttention; ranks exchange what their queries select, a sum for each key and chunk."""
        if selection is not None:
            assert isinstance(context, GatheredSlice)
            assert isinstance(context.implementation, SelectiveImplementation)
            rule, head, by_query, by_key, _ = selection
            by = selecting_head(query, key, by_query, by_key, head)
            sums = context.implementation.sums(*by, rule, scale)
            before = sums_before_chunks(sums, context.layout, context.group)
            selection = Selection(rule, head, by_query, by_key, before)
        return context.attend(query, key, value, scale, selection)


_INNER: dict[KeyExchange, type[InnerAttention]] = {"halo": WindowExchange, "gather": LatentGather}


def window_intervals(starts: Tensor, exchange: WindowExchangePlan) -> KeyIntervals:
    """What this rank's queries see of the sections that `exchange_windows` lays out, for document starts [B, T].

    Within a section tokens are neighbours as in the sequence, so the intervals are those of it, moved, but for
    sinks that begin before what stands next to the halo: those are the section's first places (`sink_sources`).
    """
    layout = exchange.layout

    def for_each_chunk(values: list[int]) -> Tensor:
        return torch.cat([torch.full((layout.chunk,), value, device=starts.device) for value in values])  # [2 chunk]

    base = [j * exchange.section for j in range(2)]
    # From an index in the sequence to the one in the sections.
    move = for_each_chunk([b + exchange.sinks + exchange.halo - start for b, start in zip(base, layout.starts)])
    full = gathered_intervals(starts, layout, MaskSpec(exchange.window, exchange.sink))
    first, last = full.first + move, full.last + move
    if full.sink_first is None:
        return KeyIntervals(first, last)
    sink_first = torch.maximum(full.sink_first + move, for_each_chunk(base))
    return KeyIntervals(first, last, sink_first, torch.minimum(sink_first + exchange.sink - 1, last))


def gathered_intervals(starts: Tensor, layout: SequenceLayout, spec: MaskSpec) -> KeyIntervals:
    """What this rank's queries see of the full sequence, for document starts [B, T]."""
    queries = local_chunks(torch.arange(layout.seq_len, device=starts.device)[None], layout)
    return intervals_in_sequence(local_chunks(starts, layout), queries, spec.window, spec.sink)


class SharedSequences(FullSequences):
    """This process, rank `rank` of `size` in `group`, computes two chunks of each sequence."""

    def __init__(self, size: int, rank: int, group: str) -> None:
        self.size, self.rank, self.group = size, rank, group

    def local(self, tokens: Tensor) -> Tensor:
        """As in FullSequences: [B, T] -> [B, T / size]."""
        return local_chunks(tokens, SequenceLayout(tokens.shape[1], self.size, self.rank))

    def context(
        self,
        config: ModelConfig,
        seq_len: int,
        document_ids: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        asked: AttentionBackend = "auto",
    ) -> SequenceContext:
        """As in FullSequences, of this rank's tokens."""
        layout = SequenceLayout(seq_len, self.size, self.rank)
        starts = None if document_ids is None else document_starts(document_ids)
        all_starts = torch.zeros(1, seq_len, dtype=torch.int64, device=device) if starts is None else starts
        positions = local_chunks(torch.arange(seq_len, device=device) - all_starts, layout)

        def of_kind(attention: type[Attention]) -> AttentionContext:
            shape = config, seq_len, starts is not None
            request = attention.request(*shape, device, dtype, chunk=layout.chunk)
            choice, spec = choose(request, asked), request.mask
            rotation = attention.rotation(config, positions, dtype)
            if attention.key_exchange == "gather":
                mask = _mask(choice.form, layout, spec, starts, device)
                return GatheredSlice(positions, rotation, mask, choice.implementation, self.group, layout)
            exchange = _window_exchange(attention, spec, layout)
            mask = _mask(choice.form, exchange, spec, starts, device)
            sinks = sink_sources(all_starts, exchange)
            return WindowSlice(positions, rotation, mask, choice.implementation, self.group, exchange, *sinks)

        return SequenceContext({kind: of_kind(attention) for kind, attention in attention_kinds(config).items()})


def exchanged_bytes(
    attention: type[Attention], config: ModelConfig, layout: SequenceLayout, tensor: int, batch: int, dtype: torch.dtype
) -> Traffic:
    """Bytes that the collectives of one layer of this kind send and receive on the layout's rank, forward.

    `tensor`: the tensor-parallel ranks that share its heads. The backward pass sends what the forward received, and
    vice versa.
    """
    heads, spec = attention.heads(config), attention.mask(config)
    if attention.key_exchange == "gather":  # every tensor-parallel rank expands the full latents, to its own heads
        own = 2 * layout.chunk * attention.gathered(config) * dtype.itemsize
        if attention.selection_head(config) is not None:
            own += 2 * layout.seq_len * torch.promote_types(dtype, torch.float32).itemsize
        moved = (layout.size - 1) * batch * own
        return Traffic(moved, moved)
    exchange = _window_exchange(attention, spec, layout)
    return window_exchange_bytes(exchange, batch, heads.keys // tensor, heads.v_width, dtype.itemsize)


def _window_exchange(attention: type[Attention], spec: MaskSpec, layout: SequenceLayout) -> WindowExchangePlan:
    assert attention.key_exchange == "halo", f"{attention.__name__}: no exchange of keys is {attention.key_exchange!r}"
    return plan_window_exchange(layout, spec.window or layout.seq_len, spec.sink)


def _mask(
    form: MaskForm,
    over: WindowExchangePlan | SequenceLayout,
    spec: MaskSpec,
    starts: Tensor | None,
    device: torch.device,
) -> Mask:
    """The mask over the sections of an exchange, or full sequences; `starts` None: one document a sequence."""
    if form == "block" and starts is None:
        return _block_mask_of_one_document(over, spec, device)
    layout = over.layout if isinstance(over, WindowExchangePlan) else over
    if form == "chunks":
        return Chunks(tuple(layout.starts))
    if starts is None:
        starts = torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device)
    if form == "selection":
        own = starts.to(torch.int32)
        return SelectionRule(own, document_ends(own), layout.starts)
    assert form in ("block", "boolean")
    make = block_mask_of if form == "block" else dense_mask_of
    if isinstance(over, WindowExchangePlan):
        return make(window_intervals(starts, over), 2 * over.section)
    return make(gathered_intervals(starts, over, spec), layout.seq_len)


@lru_cache(maxsize=32)
def _block_mask_of_one_document(
    over: WindowExchangePlan | SequenceLayout, spec: MaskSpec, device: torch.device
) -> BlockMask:
    # A validation pass in inference mode may come first, and its tensors could not be kept for a backward later.
    with torch.inference_mode(False):
        layout = over.layout if isinstance(over, WindowExchangePlan) else over
        mask = _mask("block", over, spec, torch.zeros(1, layout.seq_len, dtype=torch.int64, device=device), device)
    assert isinstance(mask, BlockMask)
    return mask


def local_chunks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The tokens of this rank's two chunks, [B, T, ...] -> [B, 2 * chunk, ...]."""
    return torch.cat([x[:, start : start + layout.chunk] for start in layout.starts], dim=1)


def all_gather_sequence(x: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """All ranks' tokens [B, 2 * chunk, N] -> the full sequences in order [B, T, N]. Backward: reduce-scatter."""
    of_chunks = _all_gather_chunks(x.unflatten(1, (2, layout.chunk)), layout, group)  # [2 size, B, chunk, N]
    return of_chunks.transpose(0, 1).reshape(len(x), layout.seq_len, x.shape[-1])


def sums_before_chunks(sums: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """Each rank's sums over the queries of its chunks, [B, 2, T] -> over those of all chunks before, for its own."""
    of_chunks = _all_gather_chunks(sums, layout, group)  # [2 size, B, T]
    own = chunks_of(layout.rank, layout.size)
    return torch.stack([of_chunks[:chunk].sum(dim=0) for chunk in own], dim=1)


def _all_gather_chunks(x: Tensor, layout: SequenceLayout, group: str) -> Tensor:
    """What all ranks have of their two chunks, [B, 2, ...] -> of all chunks in order, [2 * size, B, ...]."""
    gathered = waited(OPERATORS.all_gather_into_tensor(x.contiguous(), layout.size, group))
    early, late = gathered.unflatten(0, (layout.size, -1)).unbind(dim=2)  # chunks 0, 1, ... and ..., size + 1, size
    return torch.cat([early, late.flip(0)])


def sink_sources(starts: Tensor, exchange: WindowExchangePlan) -> tuple[Tensor, Tensor]:
    """Which of its own tokens a rank sends as sinks, for the document starts [B, T] of full sequences.

    For each rank's two chunks, rank by rank, and each sink slot: the token's index among this rank's tokens, and
    whether this rank has it at all, both [B, 2 * size * sinks].

    A chunk's sinks are the first tokens of the document that the chunk's first token belongs to, d. Where those would
    run into the halo, which begins at h, or d is in the halo or the chunk itself, the slots hold the tokens just
    before h instead. So a token has one slot, and the sinks of any document are adjacent (`window_intervals`).
    """
    layout, device = exchange.layout, starts.device
    # Computed on the device, because a Python list would be copied there, and the host would wait.
    early, late = chunks_of(torch.arange(layout.size, device=device), layout.size)
    firsts = torch.stack([early, late], dim=1).flatten() * layout.chunk  # [2 size]
    # Where the beginning of the sequence cuts the halo short it holds all keys, and it does not matter what is here.
    halos = firsts - (exchange.window - 1)
    begin = torch.minimum(starts[:, firsts], halos - exchange.sinks)  # [B, 2 size]
    slots = begin[..., None] + torch.arange(exchange.sinks, device=device)  # [B, 2 size, sinks], sequence indices
    index, owned = torch.zeros_like(slots), torch.zeros_like(slots, dtype=torch.bool)
    for j, start in enumerate(layout.starts):
        here = (slots >= start) & (slots < start + layout.chunk)
        index = torch.where(here, slots - start + j * layout.chunk, index)
        owned = owned | here
    return index.flatten(1), owned.flatten(1)


def exchange_windows(
    key: Tensor, value: Tensor, exchange: WindowExchangePlan, sink_index: Tensor, sink_owned: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """Keys [B, 2 * chunk, G, D] and values -> those that this rank's two chunks may see, [B, 2 * section, G, D].

    A section is [sinks | halo | the chunk itself]; slots that no token belongs to hold zeros. `sink_index` and
    `sink_owned` are from `sink_sources`, [B or 1, 2 * size * sinks]. The two collectives overlap.
    """
    received = _start_halos((key, value), exchange.halos, group) if exchange.window > 1 else None
    sinks = _start_sinks(key, value, exchange, sink_index, sink_owned, group)
    width = key.shape[-1]
    # [received, B, G, 2 D] -> keys and values [B, received, G, D]; likewise sinks [2, sinks, B, G, 2 D].
    far = (key, value) if received is None else waited(received).transpose(0, 1).split(width, dim=-1)
    first = (None, None) if sinks is None else waited(sinks).permute(0, 2, 1, 3, 4).split(width, dim=-1)
    return _sections(key, far[0], first[0], exchange), _sections(value, far[1], first[1], exchange)


def _sections(own: Tensor, far: Tensor, sinks: Tensor | None, exchange: WindowExchangePlan) -> Tensor:
    """[sinks | halo | chunk] for each of the chunks, [B, 2 * section, G, D].

    `own` is [B, 2 * chunk, G, D], `far` [B, received, G, D], `sinks` [2, B, sinks, G, D].
    """
    parts: list[Tensor] = []
    for j, with_halo in enumerate(_with_halos(own, far, exchange.halos, exchange.halo)):
        if sinks is not None:
            parts.append(sinks[j])
        parts += with_halo
    return torch.cat(parts, dim=1)


def _with_halos(own: Tensor, received: Tensor, exchange: HaloExchange, halo: int) -> list[list[Tensor]]:
    """Each stretch of tokens [B, n, ...] behind the pieces of its halo, zeros where that lies before the sequence."""
    sections = []
    for pieces in exchange.sections:
        missing = halo - sum([piece.length for piece in pieces[:-1]])
        zeros = [own.new_zeros(len(own), missing, *own.shape[2:])] if missing else []
        sources = [(own if piece.own else received, piece) for piece in pieces]
        sections.append(zeros + [source[:, piece.start : piece.start + piece.length] for source, piece in sources])
    return sections


def _start_halos(tensors: Sequence[Tensor], exchange: HaloExchange, group: str) -> Tensor:
    """Start to exchange the tokens of halos; gives those of this rank, [received, B, ..., N].

    `tensors` are [B, tokens, ..., n], and N is their widths together.
    """
    slices = [slice(start, start + length) for pieces in exchange.sends for start, length in pieces] or [slice(0)]
    sent = torch.cat([torch.cat([tensor[:, at] for tensor in tensors], dim=-1) for at in slices], dim=1)
    # Tokens first, because the collective splits the first axis.
    received: Tensor = OPERATORS.all_to_all_single(
        sent.transpose(0, 1).contiguous(), list(exchange.receives), exchange.send_splits, group
    )
    return received


def _start_sinks(
    key: Tensor, value: Tensor, exchange: WindowExchangePlan, index: Tensor, owned: Tensor, group: str
) -> Tensor | None:
    """Start to collect the sinks of this rank's chunks, [2, sinks, B, G, 2 D]; None: halos reach all keys.

    Every rank writes the sinks it owns among zeros, and a reduce-scatter combines them: shapes do not depend on where
    documents begin, so the host need not wait for the device. Each sink has one owner, and x + 0 is exact.
    """
    if exchange.sinks == 0:
        return None
    at = index[..., None, None].expand(key.shape[0], -1, *key.shape[2:])
    given = torch.cat([key.gather(1, at), value.gather(1, at)], dim=-1)  # [B, 2 size sinks, G, 2 D]
    given = torch.where(owned[..., None, None], given, 0.0)
    summed = OPERATORS.reduce_scatter_tensor(given.transpose(0, 1).contiguous(), "sum", exchange.layout.size, group)
    sinks: Tensor = summed.unflatten(0, (2, exchange.sinks))
    return sinks


def share_stream(model: SWAMLAModel, world: World) -> None:
    """Tell the model's annexes which tokens of the residual stream this rank holds; nothing where it has no annexes."""
    degrees = world.degrees
    if not len(model.annexes) or degrees.context * degrees.tensor == 1:
        return
    assert world.activations is not None
    if degrees.context > 1 and degrees.tensor > 1:
        group = world.activations["context", "tensor"]._flatten("sequence").get_group()
    else:
        group = world.group("context" if degrees.context > 1 else "tensor")
    halos = frozenset(annex.halo(model.config) for _, annex in model.annexes.each())
    index = world.coordinate("context") * degrees.tensor + world.coordinate("tensor")
    model.annexes.layout = SharedStream(degrees.context, degrees.tensor, index, group.group_name, halos)


@dataclass(frozen=True)
class StreamSlice(StreamContext):
    """The context of this rank's tokens; `exchanges` for each halo that an annex asks for."""

    exchanges: tuple[HaloExchange, ...]
    group: str

    def with_halos(self, x: Tensor, halo: int) -> Iterator[Tensor]:
        """As in StreamContext. Collective over the group."""
        exchange = next(each for each in self.exchanges if each.halo == halo)
        received = self._received(x, exchange) if halo else x
        for with_halo in _with_halos(x, received, exchange, halo):
            # None of what was received, so that it is used on a rank that receives nothing too: else its backward pass
            # would skip the collective for which the other ranks wait.
            yield torch.cat([received[:, :0], *with_halo], dim=1)

    def _received(self, x: Tensor, exchange: HaloExchange) -> Tensor:
        """What the other ranks send, [B, tokens, N]."""
        return waited(_start_halos([x], exchange, self.group)).transpose(0, 1)


@dataclass(frozen=True)
class SharedStream(StreamLayout):
    """This rank is `index` of context x tensor ranks in `group`, which share each sequence."""

    degree_of_context: int
    degree_of_tensor: int
    index: int
    group: str
    halos: frozenset[int]

    def local(self, x: Tensor) -> Tensor:
        """As in StreamLayout."""
        parts = stretches(x.shape[1], self.degree_of_context, self.degree_of_tensor, self.index)
        return torch.cat([x[:, part.start : part.stop] for part in parts], dim=1)

    def context(self, positions: Tensor) -> StreamContext:
        """As in StreamLayout."""
        shape = positions.shape[1], self.degree_of_context, self.degree_of_tensor, self.index
        exchanges = tuple(plan_halos(*shape, halo) for halo in sorted(self.halos))
        return StreamSlice(self.local(positions), exchanges, self.group)
