"""Selective attention in MLA blocks: what a block computes, and a cache that drops what is deselected."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory_budget import losses
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.generation import generate
from tests.model.tiny import ALL_MLA, build, random_tokens

HEAD = 2
SELECTIVE = ALL_MLA | {"num_layers": 1, "mla_selective": True, "selection_head": HEAD}


def heads_of(model, tokens):
    """The first block's input [T, dim], and queries, keys and values of one text in one document, [H, T, D] each."""
    block = model.blocks["0"]
    x = model.embed(tokens[None])
    normed, context = block.attention_norm(x), model.context(len(tokens))["mla"]
    heads = block.attention.expand(normed, *block.attention.compress(normed, context), context)
    return x[0], [each[0].transpose(0, 1) for each in heads]


def selected(query, key, scale):
    """S [H, T, T] and F [T, T] of one document, query by query."""
    scores, tokens = query @ key.transpose(1, 2) * scale, query.shape[1]
    masked = torch.zeros(tokens, tokens, dtype=scores.dtype)
    for t in range(1, tokens):
        masked[t] = masked[t - 1]
        for s in range(1, t - 1):  # neither the first token nor the query t - 1 itself
            masked[t, s] += max(scores[HEAD, t - 1, s].item(), 0.0)
    return scores, masked


def logits_after(model, x, attended):
    """Of tokens whose attention gave [n, H, v], from the block's input x [n, dim]."""
    block = model.blocks["0"]
    return model.head(model.norm(block._add(x[None], block.attention.wo(attended.flatten(1))[None])))[0, :, :50]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [1, 9, 10]])
def test_a_block_masks_what_earlier_queries_of_the_document_selected(lengths):
    model = build(**SELECTIVE)
    texts = [random_tokens(length) for length in lengths]
    ids = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    expected = []
    for text in texts:
        x, (query, key, value) = heads_of(model, text)
        scores, masked = selected(query, key, model.blocks["0"].attention.scale)
        unseen = torch.ones(len(text), len(text)).triu(1).bool()
        weights = (scores - masked).masked_fill(unseen, float("-inf")).softmax(dim=-1)
        expected.append(logits_after(model, x, (weights @ value).transpose(0, 1)))
    found = model(torch.cat(texts)[None], document_ids=ids[None])[0]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("budget, prompt", [(3, 12), (8, 5), (8, 8), (8, 20), (30, 12)])
def test_a_full_cache_drops_the_key_of_which_most_was_selected(budget, prompt):
    """Of one layer, where keys do not depend on what was attended to, so that a slow simulation can follow."""
    model = build(**SELECTIVE)
    text = random_tokens(prompt + 15)
    x, (query, key, value) = heads_of(model, text)
    scores, masked = selected(query, key, model.blocks["0"].attention.scale)
    cache = DecodeCache(model, 1, len(text), budget)
    model.prefill(text[None, :prompt], cache)
    kept = list(range(prompt))
    dropped = 0
    for t in range(prompt, len(text)):
        while len(kept) > (budget if t == prompt else budget - 1):
            candidates = [s for s in kept if s not in (0, t - 1)]
            kept.remove(max(candidates, key=lambda s: masked[t, s].item()))
            dropped += 1
        if len(kept) == budget:
            kept.remove(max((s for s in kept if s not in (0, t - 1)), key=lambda s: masked[t, s].item()))
        kept.append(t)
        weights = (scores[:, t, kept] - masked[t, kept]).softmax(dim=-1)[:, None]
        expected = logits_after(model, x[t : t + 1], (weights @ value[:, kept]).transpose(0, 1))
        torch.testing.assert_close(model.decode(text[None, t : t + 1], cache), expected, rtol=0, atol=1e-10)
    assert (dropped > 0) == (budget < len(text))
    assert cache.layers["0"].latents.shape == (1, min(budget, len(text)), 12)


ENGRAM = {"engram": {"layers": [1, 2], "orders": [2, 3], "heads": 1, "d_mem": 8, "table_size": 31}}


@torch.no_grad()
@pytest.mark.parametrize("engram", [{}, ENGRAM], ids=["alone", "with Engram"])
def test_each_sequence_of_a_batch_drops_tokens_by_itself_and_padding_first(engram):
    model = build(**SELECTIVE | {"num_layers": 3, "swa_layers_per_cycle": 2} | engram)
    texts = [random_tokens(length + 20) for length in (3, 11, 14)]
    padded = torch.stack([torch.cat([random_tokens(14 - len(text) + 20), text[:-20]]) for text in texts])
    caches = [DecodeCache(model, 3, 34, 12), *(DecodeCache(model, 1, len(text), 12) for text in texts)]
    together = model.prefill(padded, caches[0], torch.tensor([len(text) - 20 for text in texts]))
    apart = [model.prefill(text[None, :-20], cache) for text, cache in zip(texts, caches[1:])]
    for step in range(20, 0, -1):
        torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-11)
        together = model.decode(torch.stack([text[-step] for text in texts])[:, None], caches[0])
        apart = [model.decode(text[None, [-step]], cache) for text, cache in zip(texts, caches[1:])]


@torch.no_grad()
@pytest.mark.parametrize("engram", [{}, ENGRAM], ids=["alone", "with Engram"])
def test_a_budget_of_as_many_tokens_as_come_changes_nothing(engram):
    model, text = build(**SELECTIVE | {"num_layers": 3, "swa_layers_per_cycle": 1} | engram), random_tokens(2, 30)
    caches = [DecodeCache(model, 2, 40, budget) for budget in (None, 30, 29)]
    logits = [model.prefill(text[:, :12], cache) for cache in caches]
    for t in range(12, 30):
        assert torch.equal(logits[0], logits[1])
        logits = [model.decode(text[:, t : t + 1], cache) for cache in caches]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@torch.no_grad()
@pytest.mark.parametrize("budget", [3, 9, 29])
def test_losses_under_a_budget_are_those_of_tokens_that_are_decoded_with_it(budget):
    """As benchmarks/memory_budget.py computes them."""
    model, text = build(**SELECTIVE | {"num_layers": 3, "swa_layers_per_cycle": 1}), random_tokens(2, 30)
    cache, found = DecodeCache(model, 2, 30, budget), []
    logits = model.prefill(text[:, :1], cache)
    for t in range(1, 30):
        found.append(F.cross_entropy(logits.float(), text[:, t], reduction="none"))
        logits = model.decode(text[:, t : t + 1], cache)
    torch.testing.assert_close(losses(model, text, budget), torch.stack(found, dim=1))


def test_a_budget_is_refused_where_nothing_can_be_dropped():
    prompt = [random_tokens(5).tolist()]
    with pytest.raises(ValueError, match=r"memory_budget = 8: no layer drops tokens without model.mla_selective"):
        generate(build(), prompt, 3, memory_budget=8)
    with pytest.raises(ValueError, match="memory_budget = 2: expected >= 3"):
        generate(build(**SELECTIVE), prompt, 3, memory_budget=2)
    assert generate(build(**SELECTIVE), prompt, 8, temperature=0, memory_budget=100) == generate(
        build(**SELECTIVE), prompt, 8, temperature=0
    )


def test_blocks_are_one_graph_for_any_documents():
    model, tokens = build(**SELECTIVE), random_tokens(2, 24)
    documents = [(torch.rand(2, 24) < 0.2).cumsum(dim=1) for _ in range(2)]
    exact = [model(tokens, tokens, each) for each in documents]
    model.blocks["0"].compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for expected, each in zip(exact, documents):
        with torch._dynamo.config.patch(error_on_recompile=each is documents[1]):
            loss = model(tokens, tokens, each)
            loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
