"""Selective attention against the paper's own steps, written for one document in float64.

What the Triton kernels do is marked gpu; with TRITON_INTERPRET=1 they run on a CPU, slowly (Triton 3.6 does it with
NumPy before 2.4, and not in bfloat16).
"""

import os

import pytest
import torch

from swamla_titan.kernels.attention import selective
from swamla_titan.kernels.attention.masks import Selection, SelectionRule, document_ends, document_starts
from swamla_titan.kernels.attention.selective import (
    reference_selected_sums,
    reference_selective_attention,
    selected_sums,
    selective_attention,
)
from swamla_titan.kernels.device import Tiles
from tests.kernels.nearness import relative_error

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # norm of the error over the result's
SHAPES = {  # tokens, heads, width, width of values, mean length of documents
    "as base has them": (200, 2, 192, 128, 90),
    "one document": (150, 2, 48, 32, 0),
    "tiny documents": (100, 2, 48, 32, 2),
    "a single token": (1, 1, 48, 32, 0),
    "shorter than a tile": (7, 1, 80, 16, 3),
    "a multiple of the tile": (128, 3, 64, 64, 64),
}


def papers(query, key, value, head, scale):
    """One document, [H, T, D] each: the listing of the paper."""
    logits = query @ key.transpose(1, 2) * scale
    tokens = logits.shape[-1]
    logits = logits.masked_fill(torch.ones(tokens, tokens, device=logits.device).triu(1).bool(), float("-inf"))
    selected = torch.relu(logits[head])
    keeps = torch.ones_like(selected)
    keeps[:, 0] = 0  # the first token is never masked
    keeps.fill_diagonal_(0)  # nor does a token mask itself
    selected = selected * keeps
    rolled = torch.cat([torch.zeros_like(selected[:1]), selected[:-1]])  # a query is masked by those before it
    return (logits - rolled.cumsum(dim=0)).softmax(dim=-1) @ value


def exact(query, key, value, ids, head, scale):
    """[B, T, H, D] with document ids [B, T]: document by document."""
    rows = []
    for x, y, z, row in zip(query, key, value, ids):
        lengths = torch.unique_consecutive(row, return_counts=True)[1].tolist()
        parts = zip(*(each.transpose(0, 1).split(lengths, dim=1) for each in (x, y, z)))
        rows.append(torch.cat([papers(*part, head, scale) for part in parts], dim=1).transpose(0, 1))
    return torch.stack(rows)


def inputs(shape, dtype, device, rows=2):
    """Queries, keys and values, those as views of what other numbers lie in as well, and document ids."""
    seq_len, heads, width, v_width, documents = shape
    query, key = (torch.randn(rows, seq_len, heads, width, device=device).to(dtype) for _ in range(2))
    value = torch.randn(rows, seq_len, heads, v_width + 32, device=device).to(dtype)[..., 32:]
    ids = (torch.rand(rows, seq_len, device=device) < (1 / documents if documents else 0)).cumsum(dim=1)
    return [x.detach().requires_grad_() for x in (query, key, value)], ids


def rule_of(ids, chunks=(0,)):
    starts = document_starts(ids)
    return SelectionRule(starts.to(torch.int32), document_ends(starts).to(torch.int32), chunks)


def assert_exact(ours, ours_in, ids, head, scale, tolerance):
    exact_in = [x.detach().double().requires_grad_() for x in ours_in]
    expected = exact(*exact_in, ids, head, scale)
    assert relative_error(ours, expected) < tolerance
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, ours_in, upstream)
    for name, a, b in zip("qkv", gradients, torch.autograd.grad(expected, exact_in, upstream.double())):
        assert relative_error(a, b) < 2 * tolerance, f"gradient of {name}"


def in_chunks(attend, sums, given, ids, head, scale, chunks):
    """Each of two ranks computes two of four chunks, as context parallelism has them; their results in order."""
    query, key, value = given
    length = query.shape[1] // 4
    of_chunk = [None] * 4
    slices = [query[:, start : start + length] for start in range(0, 4 * length, length)]
    rules = [rule_of(ids, tuple(number * length for number in pair)) for pair in chunks]
    totals = [None] * 4
    for pair, rule in zip(chunks, rules):
        own = torch.cat([slices[number] for number in pair], dim=1)
        for number, total in zip(pair, sums(own[:, :, head], key[:, :, head], rule, scale).unbind(dim=1)):
            totals[number] = total
    before = torch.stack([torch.zeros_like(totals[0]), *totals[:-1]]).cumsum(dim=0)
    for pair, rule in zip(chunks, rules):
        own = torch.cat([slices[number] for number in pair], dim=1)
        selection = Selection(rule, head, before=torch.stack([before[number] for number in pair], dim=1))
        for number, out in zip(pair, attend(own, key, value, selection, scale).chunk(2, dim=1)):
            of_chunk[number] = out
    return torch.cat(of_chunk, dim=1)


PAIRS = ((0, 3), (1, 2))


@pytest.mark.parametrize("documents", [0, 1, 12])
@pytest.mark.parametrize("rows", [1024, 16])
def test_the_reference_is_the_papers(documents, rows, monkeypatch):
    monkeypatch.setattr(selective, "_REFERENCE_ROWS", rows)
    given, ids = inputs((50, 3, 8, 6, documents), torch.float64, "cpu")
    ours = reference_selective_attention(*given, Selection(rule_of(ids), 1), 0.6)
    assert_exact(ours, given, ids, 1, 0.6, 1e-13)


@pytest.mark.parametrize("documents", [0, 12])
def test_chunks_of_the_reference_need_the_sums_of_others_alone(documents):
    given, ids = inputs((48, 3, 8, 6, documents), torch.float64, "cpu")
    ours = in_chunks(reference_selective_attention, reference_selected_sums, given, ids, 2, 0.6, PAIRS)
    assert_exact(ours, given, ids, 2, 0.6, 1e-13)


def test_a_selecting_head_given_apart_has_its_own_gradients():
    given, ids = inputs((40, 3, 8, 6, 12), torch.float64, "cpu")
    by = [x[:, :, 1].detach().requires_grad_() for x in given[:2]]
    one = reference_selective_attention(*given, Selection(rule_of(ids), 1), 0.6)
    apart = reference_selective_attention(*given, Selection(rule_of(ids), -1, *by), 0.6)
    assert torch.equal(one, apart)
    upstream = torch.randn_like(one)
    together = torch.autograd.grad(one, given[:2], upstream)
    own = torch.autograd.grad(apart, (*given[:2], *by), upstream)
    for whole, rest, selecting in zip(together, own[:2], own[2:]):
        assert relative_error(whole[:, :, 0], rest[:, :, 0]) < 1e-13
        assert relative_error(whole[:, :, 1], rest[:, :, 1] + selecting) < 1e-13


def check(shape, dtype, attend=selective_attention, head=0):
    given, ids = inputs(shape, dtype, DEVICE)
    ours = attend(*given, Selection(rule_of(ids), head), shape[2] ** -0.5)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert_exact(ours, given, ids, head, shape[2] ** -0.5, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_are_the_papers(shape, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("not in Triton's interpreter")
    check(shape, dtype, head=shape[1] - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["one document", "tiny documents"])
def test_in_several_slabs(shape, monkeypatch):
    """Their bounds are no multiples of any tile, and the last one is shorter."""
    monkeypatch.setattr(selective, "MOST_ELEMENTS", 1)
    monkeypatch.setattr(selective, "_ROWS", 41)
    check(SHAPES[shape], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [pytest.param(None, marks=pytest.mark.tedious), PAIRS])
def test_sums_that_are_selected_again_are_those_that_were_not_saved(chunks, monkeypatch):
    monkeypatch.setattr(selective, "MOST_ELEMENTS", 1)
    monkeypatch.setattr(selective, "_ROWS", 4)
    given, ids = inputs((40, 1, 32, 16, 20), torch.float16, DEVICE, rows=1)
    upstream, found = torch.randn_like(given[2]), []
    for most in (64, 2):  # 10 slabs, or 3 of each chunk
        monkeypatch.setattr(selective, "MOST_SAVED", most)
        if chunks:
            out = in_chunks(selective_attention, selected_sums, given, ids, 0, 0.2, chunks)
        else:
            out = selective_attention(*given, Selection(rule_of(ids), 0), 0.2)
        found.append([out, *torch.autograd.grad(out, given, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [pytest.param(0, marks=pytest.mark.tedious), 30])
def test_chunks_need_the_sums_of_others_alone(documents, monkeypatch):
    monkeypatch.setattr(selective, "MOST_ELEMENTS", 1)
    monkeypatch.setattr(selective, "_ROWS", 24)  # two slabs a chunk
    given, ids = inputs((152, 2, 48, 32, documents), torch.float16, DEVICE, rows=1)
    ours = in_chunks(selective_attention, selected_sums, given, ids, 1, 0.2, PAIRS)
    assert_exact(ours, given, ids, 1, 0.2, TOLERANCE[torch.float16])


@pytest.mark.gpu
def test_a_selecting_head_given_apart():
    given, ids = inputs((90, 2, 48, 32, 30), torch.float16, DEVICE)
    by = [x[:, :, 0].detach().requires_grad_() for x in given[:2]]
    ours = selective_attention(*given, Selection(rule_of(ids), -1, *by), 0.2)
    wide = [x.detach().double().requires_grad_() for x in (*given, *by)]
    expected = reference_selective_attention(*wide[:3], Selection(rule_of(ids), -1, *wide[3:]), 0.2)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (*given, *by), upstream)
    for a, b in zip(found, torch.autograd.grad(expected, wide, upstream.double())):
        assert relative_error(a, b) < 4e-3


@pytest.mark.gpu
def test_bounds_of_one_sequence_serve_a_batch():
    given, _ = inputs((60, 2, 48, 32, 0), torch.float16, DEVICE)
    ids = torch.zeros(2, 60, dtype=torch.int64, device=DEVICE)
    whole, one = (selective_attention(*given, Selection(rule_of(each), 0), 0.2) for each in (ids, ids[:1]))
    assert torch.equal(whole, one)


@pytest.mark.gpu
@pytest.mark.tedious
@pytest.mark.parametrize("rows", [(16, 64), (64, 16), (128, 32)])
def test_tiles_of_any_size(rows, monkeypatch):
    tiles = Tiles(*rows, 4, 2)
    monkeypatch.setattr(selective, "FORWARD", tiles)
    monkeypatch.setattr(selective, "BACKWARD", (tiles, tiles))
    monkeypatch.setattr(selective, "SELECTION", (tiles, tiles))
    check(SHAPES["tiny documents"], torch.float16)
    check(SHAPES["one document"], torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes there")
@pytest.mark.parametrize("documents", [0, 500])
def test_of_real_size(documents):
    check((2048, 4, 192, 128, documents), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.tedious
def test_every_run_gives_the_same_bits():
    given, ids = inputs(SHAPES["as base has them"], torch.float16, DEVICE)
    upstream, found = torch.randn_like(given[2]), []
    for _ in range(3):
        out = selective_attention(*given, Selection(rule_of(ids), 0), 0.07)
        found.append([out, *torch.autograd.grad(out, given, upstream)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.gpu
@pytest.mark.tedious
def test_the_operators_declare_what_they_do():
    (query, key, value), ids = inputs((20, 1, 48, 32, 10), torch.float16, DEVICE)
    rule = rule_of(ids)
    before = torch.rand(2, 1, 20, device=DEVICE, requires_grad=True)
    by = query[:, :, 0].detach().requires_grad_(), key[:, :, 0].detach().requires_grad_()
    for selecting in ((None, None, None), (*by, before)):
        torch.library.opcheck(
            torch.ops.swamla_titan.selective_attention.default,
            (query, key, value, *selecting, rule.starts, rule.ends, [0], 0, 0.2),
            atol=1e-2,
            rtol=1e-2,
        )
    sums = (*by, rule.starts, rule.ends, [0], 0.2)
    torch.library.opcheck(torch.ops.swamla_titan.selected_sums.default, sums, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("batch, seq_len", [(16, 2048), (4, 8192), (1, 32768), (1, 1 << 20), (64, 2048), (3, 100)])
def test_what_is_there_for_pairs_of_tokens_does_not_grow_with_the_square(batch, seq_len):
    [found] = selective.slabs_of_chunks((0,), seq_len, selective._most_rows(batch, seq_len))
    assert sum(slab.rows for slab in found) == seq_len
    assert [slab.places for slab in found] == [slab.at for slab in found]
    rows = max(slab.rows for slab in found)
    assert batch * rows * seq_len <= max(selective.MOST_ELEMENTS, 128 * batch * seq_len)
    assert len(found) == 1 or rows % 128 == 0


@pytest.mark.parametrize(
    "batch, seq_len, chunks, mib",
    [
        *((16, 2048, 1, 0.125), (1, 32768, 1, 2), (1, 65536, 1, 16), (1, 131072, 1, 32), (1, 262144, 1, 64)),
        *((1, 1 << 20, 1, 256), (1, 65536, 2, 8), (1, 262144, 2, 128), (1, 1 << 20, 2, 512)),
    ],
)
def test_the_sums_that_the_backward_pass_is_left_are_as_large_as_documented(batch, seq_len, chunks, mib):
    """Of two ranks with two chunks each, or of one process."""
    query = torch.empty(batch, seq_len // (1 if chunks == 1 else 2), 1, 32, dtype=torch.bfloat16, device="meta")
    key = torch.empty(batch, seq_len, 1, 32, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(1, seq_len, dtype=torch.int32, device="meta")
    starts = [0, seq_len // 4 * 3][:chunks]
    *_, sums = torch.ops.swamla_titan.selective_attention(
        query, key, key, None, None, None, bounds, bounds, starts, 0, 1.0
    )
    assert sums.nbytes / 2**20 == mib


@pytest.mark.parametrize("count, levels", [(1, 0), (4, 0), (5, 1), (16, 1), (17, 2), (61, 2)])
def test_slabs_come_in_reverse_with_the_sums_before_each_from_few_that_are_saved(count, levels, monkeypatch):
    """In place of what a slab selects, its number: the sums before the slab n are those of 0 ... n - 1."""
    monkeypatch.setattr(selective, "MOST_SAVED", 4)
    selections, held = 0, []
    real = torch.Tensor.new_empty

    def select(number, before, after):
        nonlocal selections
        torch.add(before, number, out=after)
        selections += 1

    def new_empty(of, *shape):
        held.append(shape[0])
        return real(of, *shape)

    saved = torch.full((len(selective.stretches(range(count))), 1), float("nan"))
    saved[0] = 0
    for given in selective.with_sums(range(count), saved):
        select(*given)
    assert len(saved) <= 4
    selections = 0
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = [(number, sums.item()) for number, sums in selective.slabs_in_reverse(range(count), saved, select)]
    assert found == [(number, sum(range(number))) for number in reversed(range(count))]
    assert selections <= levels * count
    assert (selections == 0) == (levels == 0)
    assert max(held, default=0) <= 4
