"""Rows shared by context ranks, on real gloo processes, against one process that computes the whole rows."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from swamla_titan.config.sections import Parallel
from swamla_titan.kernels.attention import dispatch
from swamla_titan.kernels.attention.masks import MaskSpec, dense_mask, dense_mask_of, document_starts
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.launch.ranks import rank_info
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.branch import SequenceContext
from swamla_titan.model.cache import DecodeCache
from swamla_titan.parallel.context import (
    SharedSequences,
    _mask,
    apply_context_parallel,
    exchanged_bytes,
    window_intervals,
)
from swamla_titan.parallel.sequence_exchange import (
    all_gather_sequence,
    exchange_windows,
    local_chunks,
    sink_sources,
)
from swamla_titan.parallel.sequence_layout import SequenceLayout, plan_window_exchange, window_exchange_bytes
from tests.distributed.ranks import init_gloo, on_ranks
from tests.model.tiny import TINY

SIZES = [2, 3, pytest.param(4, marks=pytest.mark.slow)]
T = 48
BASE = replace(TINY, max_seq_len=T)
SWA_ONLY = {"swa_layers_per_cycle": 1, "mla_layers_per_cycle": 0, "num_layers": 2}
MLA_ONLY = {"swa_layers_per_cycle": 0, "mla_layers_per_cycle": 1, "num_layers": 2}
MODELS = {
    "mixed": {},
    "grouped queries, qk_norm, q_lora": {"num_kv_heads": 2, "qk_norm": True, "q_lora_rank": 7},
    "untied, z_loss, dynamic_tanh": {"tie_embeddings": False, "z_loss": 0.01, "norm": "dynamic_tanh"},
    "swa": SWA_ONLY,
    "mla": MLA_ONLY,
    "selective": MLA_ONLY | {"mla_selective": True, "selection_head": 2},
    "window over several chunks": SWA_ONLY | {"swa_window": 31},
    "window over the row": SWA_ONLY | {"swa_window": 100},
    "sink larger than the window": SWA_ONLY | {"swa_window": 4, "swa_sink_size": 9},
    "sink larger than the row": SWA_ONLY | {"swa_window": 4, "swa_sink_size": 100},
    "no sink": SWA_ONLY | {"swa_sink_size": 0},
    "window of one": SWA_ONLY | {"swa_window": 1},
}


def rows(seq_len=T, batch=2, seed=1):
    """Tokens, targets (some ignored) and document ids (one-token documents among them), equal on all ranks."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BASE.vocab_size, (batch, seq_len), generator=draw)
    targets = torch.randint(0, BASE.vocab_size, (batch, seq_len), generator=draw)
    targets[0, : seq_len // 3] = -100
    ids = (torch.rand(batch, seq_len, generator=draw) < 0.1).cumsum(dim=1)
    ids[1, :3] = torch.tensor([70, 71, 72])
    return tokens, targets, ids


def build(config, dtype=torch.float64):
    """A model in training mode whose matrices are large enough for each part to matter in the loss."""
    torch.manual_seed(2)
    model = SWAMLAModel(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def loss_and_gradients(model, documents, denominator=None, batch=None):
    tokens, targets, ids = batch or rows()
    model.zero_grad()
    loss = model(tokens, targets, ids if documents else None, denominator)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def summed(tensors):
    """The sum over the ranks of each: what FSDP or DDP do with the gradients."""
    for tensor in tensors:
        dist.all_reduce(tensor)
    return tensors


def largest_error(ours, exact):
    return max(((a - b).norm() / (b.norm() + 1e-12)).item() for a, b in zip(ours, exact))


def join():
    """A world whose ranks are one context group."""
    return init_distributed(Parallel(context=rank_info().size))


def errors_of_models(names, documents, compiler=None, kernel=None):
    """Per model, how far this group's loss and gradients are from one process's; compiled ones run a second batch.

    In float64; in float32 with inductor, which in torch 2.11 mistakes the type of float64 attention on a CPU.
    """
    world = join()
    dtype = torch.float32 if compiler == "inductor" else torch.float64
    if kernel is not None:
        dispatch.why_not_cudnn_heads, dispatch._CHUNK_KERNEL = lambda *args: None, kernel
    errors = {}
    for name in names:
        model = build(replace(BASE, **MODELS[name]), dtype)
        exact = loss_and_gradients(model, documents)
        exact_later = loss_and_gradients(model, documents, batch=rows(seed=5))
        apply_context_parallel(model, world.group("context"))
        if compiler is not None:
            for block in model.blocks.values():
                block.compile(fullgraph=True, dynamic=False, backend=compiler)
        errors[name] = largest_error(summed(loss_and_gradients(model, documents)), exact)
        if compiler is not None:
            with torch._dynamo.config.patch(error_on_recompile=True):  # other documents are no other graph
                later = loss_and_gradients(model, documents, batch=rows(seed=5))
            errors[f"{name}, later"] = largest_error(summed(later), exact_later)
    return errors


TOLERANCES = {None: 1e-11, "aot_eager": 1e-11, "inductor": 1e-5}


class AllKeysByHalo(BLOCKS["swa"]):
    """Plainly causal, of keys that ranks exchange."""

    @classmethod
    def mask(cls, config):
        return MaskSpec()


class WindowOfGathered(BLOCKS["mla"]):
    """A window over keys that ranks gather."""

    @classmethod
    def mask(cls, config):
        return MaskSpec(config.swa_window, config.swa_sink_size)


def errors_of_other_kinds():
    """Of blocks that the package does not know, by what they declare."""
    BLOCKS.update(swa=AllKeysByHalo, mla=WindowOfGathered)
    return errors_of_models(["mixed"], False) | {"documents": errors_of_models(["mixed"], True)["mixed"]}


def test_what_a_kind_declares_is_all_that_sharing_needs():
    check(on_ranks(3, errors_of_other_kinds))


def check(errors, tolerance=1e-11):
    for rank, of_rank in enumerate(errors):
        for name, error in of_rank.items():
            assert error < tolerance, f"rank {rank}, {name}: {error:.1e}"


def errors_with_and_without_documents():
    return [errors_of_models(list(MODELS), documents) for documents in (False, True)]


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_equal_one_process(size):
    for documents, errors in zip(("without", "with"), zip(*on_ranks(size, errors_with_and_without_documents))):
        check([{f"{name}, {documents} documents": e for name, e in of_rank.items()} for of_rank in errors])


@pytest.mark.parametrize(
    "size, documents, compiler",
    [
        # The graphs of all, without a minute of code generation.
        (2, True, "aot_eager"),
        pytest.param(2, True, "inductor", marks=pytest.mark.slow),
        pytest.param(3, False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(4, True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(2, False, "inductor", marks=pytest.mark.slow),
        pytest.param(3, True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_equal_one_process(size, documents, compiler):
    errors = on_ranks(size, errors_of_models, ["grouped queries, qk_norm, q_lora"], documents, compiler)
    check(errors, TOLERANCES[compiler])


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_selective_blocks_equal_one_process(compiler):
    check(on_ranks(2, errors_of_models, ["selective"], True, compiler), TOLERANCES[compiler])


@pytest.mark.parametrize("compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_chunks_by_a_kernel_without_masks_equal_one_process(compiler):
    # To a SWA block the kernel is nothing.
    name = "mla" if compiler else "mixed"
    check(on_ranks(2, errors_of_models, [name], False, compiler, "plain"), TOLERANCES[compiler])


def flex_error():
    """Blocks under block masks, in a graph as on a GPU, against the same under booleans; forward only, on a CPU."""
    world = join()
    model = build(replace(BASE, dim=64), torch.float32)
    apply_context_parallel(model, world.group("context"))
    tokens, _, ids = rows()
    errors = []
    for documents in (ids, None):
        dense = model.context(T, documents)
        starts = None if documents is None else document_starts(documents)
        over = {"swa": dense["swa"].exchange, "mla": dense["mla"].layout}
        masks = {
            kind: _mask("block", over[kind], BLOCKS[kind].mask(model.config), starts, model.device) for kind in over
        }
        flex = SequenceContext(
            {kind: replace(dense[kind], mask=mask, implementation=dispatch.FLEX) for kind, mask in masks.items()}
        )
        assert isinstance(flex["swa"].mask, BlockMask)
        with torch.no_grad():
            x = model.embed(model.sequences.local(tokens))
            for block in model.blocks.values():
                compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="eager")
                exact, ours = block(x, dense), compiled(x, flex)
                errors.append(largest_error([ours], [exact]))
                x = exact
    return {"flex": max(errors)}


@pytest.mark.filterwarnings("ignore:.*unfused.*")
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_block_masks_mean_the_same_as_booleans(size):
    check(on_ranks(size, flex_error), 1e-5)


def kernels_asked_for():
    """Whether the kernel without masks is taken: it has no documents and is not the reference."""
    world = join()
    dispatch.why_not_cudnn_heads, dispatch._CHUNK_KERNEL = lambda *args: None, "plain"
    model = build(BASE)
    apply_context_parallel(model, world.group("context"))
    ids = rows()[2]
    found = [model.context(T, ids)["mla"].implementation is dispatch.CHUNKED for ids in (None, ids)]
    for backend in ("sdpa", "reference"):
        model.attention_backend = backend
        found.append(model.context(T)["mla"].implementation is dispatch.CHUNKED)
    return found


def test_documents_and_other_backends_take_masks():
    assert on_ranks(2, kernels_asked_for)[1] == [True, False, False, False]


def more_of_the_model():
    """(name, error) of what else the model does, on a group of two."""
    world = join()
    size, rank = world.size, world.rank
    tokens, targets, ids = rows()
    model = build(BASE)
    logits = model(tokens, document_ids=ids)
    denominated = loss_and_gradients(model, True, 7.0)
    reference_backend = build(BASE)
    exact_prompt = model.prefill(tokens[:, :5], cache_for(model))
    apply_context_parallel(model, world.group("context"))
    apply_context_parallel(reference_backend, world.group("context"))
    reference_backend.attention_backend = "reference"
    own = local_chunks(logits, SequenceLayout(T, size, rank))
    errors = {
        "logits of the own tokens": largest_error([model(tokens, document_ids=ids)], [own]),
        "a given denominator": largest_error(summed(loss_and_gradients(model, True, 7.0)), denominated),
        "reference": largest_error(summed(loss_and_gradients(reference_backend, True, 7.0)), denominated),
        "prefill": largest_error([model.prefill(tokens[:, :5], cache_for(model))], [exact_prompt]),
    }
    # As a pipeline stage does it: its own loop over blocks, on activations that are cut already.
    context = model.context(T, ids)
    x = model.embed(model.sequences.local(tokens))
    for block in model.blocks.values():
        x = block(x, context)
    share = model.loss(model.head(model.norm(x)), targets, 7.0)
    errors["a stage's own loop"] = largest_error(summed([share.detach()]), denominated[:1])
    with torch.inference_mode():  # as validation does it
        share = model(tokens, targets, ids, 7.0)
    errors["in inference mode"] = largest_error(summed([share.clone()]), denominated[:1])
    return errors


def bfloat16_error():
    world = join()
    model = SWAMLAModel(BASE)
    model.compute_dtype = torch.bfloat16
    exact = loss_and_gradients(model, True)
    apply_context_parallel(model, world.group("context"))
    return {"bfloat16": largest_error(summed(loss_and_gradients(model, True)), exact)}


def test_bfloat16_activations_are_exchanged_as_they_are():
    check(on_ranks(3, bfloat16_error), 2e-2)


def cache_for(model):
    return DecodeCache(model, 2, 8)


def test_logits_denominator_backend_decoding_and_stages():
    check(on_ranks(2, more_of_the_model))


def a_group_of_one():
    world = init_distributed(Parallel(context=1))
    model = build(BASE)
    exact = loss_and_gradients(model, True)
    apply_context_parallel(model, world.group("context"))
    tokens = rows()[0]
    return model.sequences.local(tokens) is tokens and largest_error(loss_and_gradients(model, True), exact) == 0


def test_a_group_of_one_changes_nothing():
    assert on_ranks(2, a_group_of_one) == [True, True]


def wrong_length():
    world = join()
    model = build(BASE)
    apply_context_parallel(model, world.group("context"))
    try:
        model(torch.zeros(1, 30, dtype=torch.int64))
    except AssertionError as error:
        return str(error)
    finally:
        dist.barrier()  # a rank that leaves while others still connect breaks their group


def test_a_row_that_cannot_be_cut_is_not_computed():
    assert all("30 tokens cannot be cut in 4 equal chunks" in message for message in on_ranks(2, wrong_length))


class Counted(TorchDispatchMode):
    """Bytes that this rank sends to and receives from others through the collectives of an exchange."""

    def __init__(self, size, rank):
        super().__init__()
        self.size, self.rank = size, rank
        self.sent = self.received = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "_c10d_functional::all_to_all_single":
            sent, receive_splits, send_splits, _ = args
            token = sent[:1].nbytes
            assert send_splits[self.rank] == receive_splits[self.rank] == 0
            self.sent += sum(send_splits) * token
            self.received += sum(receive_splits) * token
            assert out.nbytes == sum(receive_splits) * token
            assert sent.nbytes == sum(send_splits) * token
        elif name == "_c10d_functional::reduce_scatter_tensor":
            self.sent += args[0].nbytes - args[0].nbytes // self.size
            self.received += (self.size - 1) * out.nbytes
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.sent += (self.size - 1) * args[0].nbytes
            self.received += out.nbytes - args[0].nbytes
        else:
            assert "c10d" not in name or "wait_tensor" in name, f"{name} is not counted"
        return out


def sections_seen(cases):
    """For each case: every query sees, in the sections, the keys of the rule and each once; and the bytes are right.

    Gives the first case that fails and why; the number of cases if none does.
    """
    rank, size = init_gloo()
    group = dist.group.WORLD.group_name
    for chunk, window, sink, cut in cases:
        seq_len, batch = 2 * size * chunk, 2
        layout = SequenceLayout(seq_len, size, rank)
        exchange = plan_window_exchange(layout, window, sink)
        draw = torch.Generator().manual_seed(seq_len + window)
        ids = (torch.rand(batch, seq_len, generator=draw) < cut).cumsum(dim=1)
        starts = document_starts(ids)
        number = torch.arange(1, seq_len + 1, dtype=torch.float64).expand(batch, -1)[:, :, None, None]
        key = local_chunks(number, layout).expand(-1, -1, 2, 3).contiguous().requires_grad_()
        value = (-key.detach()).requires_grad_()
        with Counted(size, rank) as counted:
            keys, values = exchange_windows(key, value, exchange, *sink_sources(starts, exchange), group)
        forward = counted.sent, counted.received
        with counted:
            (keys.sum() + values.sum()).backward()
        backward = counted.sent - forward[0], counted.received - forward[1]
        case = f"chunk {chunk}, window {window}, sink {sink}, cut {cut}, rank {rank} of {size}"
        if forward != window_exchange_bytes(exchange, batch, 2, 3, 8) or backward != forward[::-1]:
            return f"{case}: bytes {forward}, backward {backward}"
        if not torch.equal(keys, -values) or not torch.equal(keys, keys[:, :, :1, :1].expand_as(keys)):
            return f"{case}: keys and values are not those of the same tokens"
        held = keys[:, :, 0, 0].long()  # [B, 2 section], 0 where there is no token
        mask = dense_mask_of(window_intervals(starts, exchange), 2 * exchange.section)[:, 0].long()  # [B, Q, 2 section]
        seen = torch.zeros(batch, 2 * chunk, seq_len + 1, dtype=torch.int64)
        seen.scatter_add_(2, held[:, None].expand_as(mask), mask)
        rule = local_chunks(dense_mask(starts, window, sink)[:, 0], layout).long()
        if seen[..., 0].any() or not torch.equal(seen[..., 1:], rule):
            return f"{case}: {(seen[..., 1:] != rule).nonzero()[:5].tolist()}"
    return len(cases)


@pytest.mark.parametrize("size", SIZES)
def test_every_query_finds_its_keys_once_and_the_bytes_are_those_of_the_formula(size):
    cases = list(itertools.product([1, 2, 5], [1, 2, 6, 11, 100], [0, 1, 4, 100], [0.0, 0.2, 1.0]))
    assert on_ranks(size, sections_seen, cases) == [len(cases)] * size


def gathered_in_order():
    rank, size = init_gloo()
    layout = SequenceLayout(4 * size, size, rank)
    whole = torch.randn(2, 4 * size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = local_chunks(whole, layout).requires_grad_()
    rows = all_gather_sequence(part, layout, dist.group.WORLD.group_name)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1 + rank), dtype=torch.float64)
    rows.backward(upstream)
    dist.all_reduce(upstream)
    return torch.equal(rows, whole) and torch.allclose(part.grad, local_chunks(upstream, layout), rtol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_gathered_latents_are_in_the_order_of_the_row(size):
    assert on_ranks(size, gathered_in_order) == [True] * size


def bytes_of_passes(names):
    """Of each model's forward pass: what a rank sends and receives, and what the formula says of its layers."""
    world = join()
    rank, size = world.rank, world.size
    found = []
    for name in names:
        model = build(replace(BASE, **MODELS[name]))
        apply_context_parallel(model, world.group("context"))
        model(*rows()[:2])  # what is exchanged once is not counted
        with Counted(size, rank) as counted:
            model(*rows()[:2])
        layers = [
            exchanged_bytes(BLOCKS[kind], model.config, SequenceLayout(T, size, rank), 1, 2, torch.float64)
            for kind in model.config.block_kinds
        ]
        found.append(((counted.sent, counted.received), tuple(map(sum, zip(*layers)))))
    return found


def test_what_plan_says_of_layers_passes_through_the_collectives():
    for found in on_ranks(2, bytes_of_passes, ["mixed", "grouped queries, qk_norm, q_lora", "selective", "no sink"]):
        for passed, planned in found:
            assert passed == planned > (0, 0)


def test_an_exchange_that_is_not_known_is_refused(monkeypatch):
    model = build(replace(BASE, **SWA_ONLY))
    monkeypatch.setattr(BLOCKS["swa"], "key_exchange", "ring")
    layout = SequenceLayout(T, 2, 0)
    with pytest.raises(AssertionError, match="no exchange of keys is 'ring'"):
        SharedSequences(2, 0, "").context(model.config, T, None, torch.device("cpu"), torch.float64)
    with pytest.raises(AssertionError, match="no exchange of keys is 'ring'"):
        exchanged_bytes(BLOCKS["swa"], model.config, layout, 1, 2, torch.float64)
