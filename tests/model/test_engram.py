"""Engram against code that was written from the paper's text, with loops over tokens, and integers of any size."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from swamla_titan.model import FLAVORS, ModelConfig, SWAMLAModel
from swamla_titan.model.annex import StreamContext
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.model.annexes import ModelAnnexes
from swamla_titan.model.counts import parameter_counts, training_flops
from swamla_titan.model.engram import hashes, ngram_hashes, primes_from
from tests.model.tiny import TINY, build, random_tokens

SHAPES = {
    "two orders": {"layers": [0, 2], "orders": [2, 3], "heads": 2, "d_mem": 16, "table_size": 31},
    "order 4 alone, 3 taps, sharpened": {
        **{"layers": [1], "orders": [4], "heads": 3, "d_mem": 9, "table_size": 101},
        **{"kernel": 3, "sharpen_gate": True},
    },
    "one tap": {"layers": [2], "orders": [2, 4], "heads": 1, "d_mem": 6, "table_size": 2, "kernel": 1},
}
PAD = TINY.vocab_size  # without a tokenizer tokens stand for themselves


def shape(layers, orders, heads, table_size, seed):
    return EngramConfig(layers, tuple(orders), heads, table_size=table_size, seed=seed)


def documents_of(ids):
    """[first token, end) of each run of equal ids."""
    cuts = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1]), len(ids)]
    return list(pairwise(cuts))


def rows_of(tokens, orders, multipliers, primes, pad=PAD):
    """For each token of a document the row of each table, in a storage of one table after the other."""
    found = []
    for t in range(len(tokens)):
        rows, before = [], 0
        for order, of_order in zip(orders, primes):
            mixed = 0
            for k in range(order):
                mixed ^= (tokens[t - k] if t >= k else pad) * multipliers[k]
            assert 0 <= mixed < 2**63
            for prime in of_order:
                rows.append(before + mixed % prime)
                before += prime
        found.append(rows)
    return found


def normed(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def by_the_paper(x, tokens, documents, weights, config, layer):
    """The stream [B, T, dim] with an Engram added, from its `weights` by name."""
    own, dim = config.engram, x.shape[-1]
    used = hashes(config)[layer]
    out = torch.zeros_like(x)
    for b, row in enumerate(tokens.tolist()):
        for first, end in documents_of(documents[b].tolist()):
            looked_up = rows_of(row[first:end], own.orders, used.multipliers, used.primes)
            values = []
            for t in range(first, end):
                memory = torch.cat([weights["table.weight"][index] for index in looked_up[t - first]])
                query = normed(x[b, t], weights["query_norm.weight"])
                key = normed(weights["key.weight"] @ memory, weights["key_norm.weight"])
                gate = (query * key).sum() / math.sqrt(dim)
                if own.sharpen_gate:
                    gate = torch.sign(gate) * torch.sqrt(torch.clamp(torch.abs(gate), min=1e-6))
                values.append(torch.sigmoid(gate) * (weights["value.weight"] @ memory))
            taps = weights["convolution.weight"].view(own.kernel, dim)
            inner = [normed(value, weights["convolution.norm.weight"]) for value in values]
            for t in range(end - first):
                mixed = torch.zeros_like(x[b, t])
                for k in range(own.kernel):
                    if t - k * own.orders[-1] >= 0:
                        mixed = mixed + taps[k] * inner[t - k * own.orders[-1]]
                out[b, first + t] = x[b, first + t] + values[t] + mixed * torch.sigmoid(mixed)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_documents", [False, True])
def test_value_and_gradient_equal_the_papers_equations(shape, with_documents):
    torch.manual_seed(0)
    model = build(engram=SHAPES[shape])
    tokens, (layer, *_) = random_tokens(2, 22), model.config.engram.layers
    documents = (torch.rand(2, 22) < 0.15).cumsum(dim=1) if with_documents else torch.zeros(2, 22, dtype=torch.int64)
    annex = model.annexes[str(layer)]["engram"]
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in annex.named_parameters()}
    x, direction = torch.randn(2, 22, TINY.dim, dtype=torch.float64), torch.randn(2, 22, TINY.dim, dtype=torch.float64)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected = by_the_paper(theirs, tokens, documents, weights, model.config, layer)
    (expected * direction).sum().backward()
    memories = model.annexes.look_up(tokens, documents if with_documents else None, torch.float64)
    found = model.annexes.before(str(layer), ours, memories)
    (found * direction).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
    annex.table.gradient.merge()
    of_table = annex.table.gradient.dense(len(annex.table.weight))
    for name, weight in annex.named_parameters():
        gradient = of_table if name == "table.weight" else weight.grad
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-9, atol=1e-11, msg=name)
        assert weights[name].grad.norm() > 0, name


@pytest.mark.parametrize("largest", [50, 50_257, 1 << 24])
def test_indices_equal_integers_of_any_size(largest):
    """Also for the largest ids, whose products come near 2^63."""
    orders = (2, 3, 4)
    own = ngram_hashes(shape((0, 5), orders, 3, 997, 7), largest)
    tokens = torch.randint(max(0, largest - 1000), largest, (2, 40))
    documents = (torch.rand(2, 40) < 0.2).cumsum(dim=1)
    positions = torch.tensor(
        [[t - first for first, end in documents_of(ids) for t in range(first, end)] for ids in documents.tolist()]
    )
    for each in own.values():
        found = each.indices(tokens, positions, largest).tolist()
        for b, row in enumerate(tokens.tolist()):
            for first, end in documents_of(documents[b].tolist()):
                expected = rows_of(row[first:end], orders, each.multipliers, each.primes, largest)
                assert found[b][first:end] == expected


def test_multipliers_are_odd_and_primes_all_differ():
    own = ngram_hashes(shape((1, 2, 9), (2, 4), 5, 1000, 0), 50_257)
    numbers = [multiplier for each in own.values() for multiplier in each.multipliers]
    primes = [prime for each in own.values() for of_order in each.primes for prime in of_order]
    assert len(set(numbers)) == 3 * 4
    assert all(number % 2 == 1 and 0 < number * 50_257 < 2**63 for number in numbers)
    by_division = [n for n in range(1000, 2000) if all(n % divisor for divisor in range(2, 45))]
    assert primes == by_division[: 3 * 2 * 5]
    assert next(primes_from(2**31)) == 2_147_483_659
    assert [prime for prime, _ in zip(primes_from(0), range(5))] == [2, 3, 5, 7, 11]


def test_the_hashes_are_what_they_were():
    """Another number here, and checkpoints would look up other rows than they learned."""
    first = ngram_hashes(shape((2, 6), (2, 3), 4, 100_000, 0), 50_257)[2]
    assert first.multipliers == (169_573_894_385_599, 120_258_012_623_701, 152_073_823_290_245)
    assert first.primes == ((100_003, 100_019, 100_043, 100_049), (100_057, 100_069, 100_103, 100_109))
    assert ngram_hashes(shape((6,), (2, 3), 4, 100_000, 0), 50_257)[6].multipliers != first.multipliers
    assert ngram_hashes(shape((2,), (2, 3), 4, 100_000, 1), 50_257)[2].multipliers != first.multipliers


def test_presets_have_the_published_sizes():
    known = EngramConfig.presets
    deepseek = ModelConfig(num_layers=15, engram=known["deepseek-v4.1-flash"])
    assert [each.rows for each in hashes(deepseek).values()] == [384_006_168, 384_016_682]
    assert (deepseek.engram.num_tables, deepseek.engram.row_width) == (3 * 8, 256)
    qwen = ModelConfig(num_layers=3, engram=known["qwen3.8-flash-next"])
    ((layer, own),) = hashes(qwen).items()
    assert (layer, qwen.engram.num_tables) == (2, 16)
    assert own.rows * qwen.engram.row_width == pytest.approx(51e9, rel=0.001)


def test_it_stands_on_any_layer_of_every_flavor():
    for flavor in FLAVORS.values():
        layers = 0, flavor.num_layers - 1
        with torch.device("meta"):
            own = ModelAnnexes(replace(flavor, engram=EngramConfig(layers)))
        assert [(layer, annex.value.weight.shape) for (layer, _), annex in own.each()] == [
            (str(layer), (flavor.dim, 512)) for layer in layers
        ]


def test_random_ngrams_hit_all_rows_alike():
    """Pearson's statistic of each table has the mean and the spread that chance gives it."""
    own = ngram_hashes(shape((3,), (2, 3), 4, 1009, 0), 32_974)[3]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32_974, (1, 100_000), generator=generator)
    indices = own.indices(ids, torch.arange(100_000)[None], 32_974)[0]
    assert indices.min() >= 0
    assert indices.max() < own.rows
    before = 0
    for table, prime in enumerate(prime for of_order in own.primes for prime in of_order):
        counts = torch.bincount(indices[:, table] - before, minlength=prime).double()
        assert len(counts) == prime
        statistic = ((counts - 100_000 / prime).square() / (100_000 / prime)).sum().item()
        assert abs(statistic - (prime - 1)) / math.sqrt(2 * (prime - 1)) < 4
        before += prime


def test_a_document_does_not_see_the_one_before_it():
    model = build(engram=SHAPES["two orders"])
    tokens, documents = random_tokens(1, 24), torch.tensor([[0] * 9 + [1] * 15])
    with torch.no_grad():
        together = model(tokens, document_ids=documents)
        torch.testing.assert_close(together[:, 9:], model(tokens[:, 9:]), rtol=1e-11, atol=1e-11)
        assert not torch.allclose(model(tokens)[:, 9:], together[:, 9:])


def test_the_convolution_adds_nothing_at_first_and_then_learns():
    model = SWAMLAModel(ModelConfig(**{**vars(TINY), "engram": SHAPES["two orders"]}))
    annex = model.annexes["0"]["engram"]
    x = torch.randn(1, 8, TINY.dim)
    assert torch.equal(annex.convolution(x, StreamContext(torch.arange(8)[None])), torch.zeros_like(x))
    tokens = random_tokens(2, 8)
    model(tokens, tokens).backward()
    assert annex.convolution.weight.grad.norm() > 0


def test_without_engram_there_is_nothing_of_it():
    plain = SWAMLAModel(TINY)
    assert len(plain.annexes) == 0
    assert not [name for name, _ in plain.named_parameters() if "annex" in name]
    assert plain.annexes.look_up(random_tokens(1, 4), None, torch.float32) is None


def test_the_compressed_vocabulary_makes_tokens_alike():
    model = build(engram=SHAPES["two orders"])
    ids = torch.arange(TINY.vocab_size).numpy()
    ids[7] = 3
    tokens = random_tokens(1, 12)
    tokens[0, 3] = 7
    other = tokens.clone()
    other[0, 3] = 3
    annex = model.annexes["0"]["engram"]

    def rows(of):
        return annex.indices(model.annexes.compressed_ids(of), torch.arange(12)[None], model.annexes.compressed_ids.pad)

    assert not torch.equal(rows(tokens), rows(other))
    model.annexes.use(ids, TINY.vocab_size)
    assert torch.equal(rows(tokens), rows(other))


def test_gates_are_observed_in_training_and_counted_once():
    model = build(engram=SHAPES["two orders"])
    tokens = random_tokens(2, 8)
    annex = model.annexes["2"]["engram"]
    model(tokens)
    assert annex.take_observed() == {}
    model.train()
    for _ in range(2):
        model(tokens)
    [(total, count)] = annex.take_observed().values()
    assert count == 2 * tokens.numel()
    assert 0 < total / count < 1
    assert annex.take_observed() == {}


def test_gates_of_sequences_that_fill_up_a_micro_batch_do_not_count():
    model = build(engram=SHAPES["two orders"]).train()
    tokens, taken = random_tokens(3, 8), []
    for more in (0, 2):
        filled = torch.cat([tokens, tokens.new_zeros(more, 8)])
        targets = torch.cat([tokens, tokens.new_full((more, 8), -100)])
        model(filled, targets)
        taken.append([annex.take_observed()["gate"] for _, annex in model.annexes.each()])
    assert [count for _, count in taken[1]] == [3 * 8] * 2
    assert taken[1] == taken[0]


def test_operations_and_parameters_are_counted():
    with_engram = ModelConfig(**{**vars(TINY), "engram": SHAPES["two orders"]})
    extra = training_flops(with_engram, 10) - training_flops(TINY, 10)
    linear, gate_and_convolution = 2 * 2 * 16 * TINY.dim, 2 * TINY.dim * (1 + 4)
    assert extra == 2 * 3 * 10 * (linear + gate_and_convolution)
    total, inner = (a - b for a, b in zip(parameter_counts(with_engram), parameter_counts(TINY)))
    assert inner == 2 * (2 * 16 * TINY.dim + 3 * TINY.dim + 4 * TINY.dim)
    assert total == inner + 4 * sum(each.rows for each in hashes(with_engram).values())
