"""The order of a mixture: exact shares at every prefix, slots that all ranks have equally many of, closed forms."""

from fractions import Fraction

import numpy as np
import pytest

from swamla_titan.config.mixture import exact
from swamla_titan.data.batches import micro_batch_count, sequences_per_rank
from swamla_titan.data.mixture import Piece, SequenceOrder, quota_table

NUMBERS = np.arange(20_000)
MIXTURES = [
    {"a": 0.5, "b": 0.5},
    {"a": 0.7, "b": 0.2, "c": 0.1},
    {"a": 0.25, "b": 0.251, "c": 0.499},
    {"a": 0.333, "b": 0.333, "c": 0.334},
    {"a": 0.02, "b": 0.1212, "c": 0.3974, "d": 0.4339, "e": 0.0275},
    {"a": 0.9999, "b": 0.0001},
    {"a": 0.0, "b": 1.0},
    {f"s{number}": 0.02 for number in range(50)},
]


def order_of(weights, streams=64, first=0):
    before = [Piece(0, {name: float(name == min(weights)) for name in weights})] if first else []
    return SequenceOrder(streams, tuple(weights), [*before, Piece(first, weights)])


def test_weights_are_the_decimal_numbers_that_were_written():
    assert sum(map(exact, [0.1] * 10)) == 1
    assert exact(1e-05) == Fraction(1, 100_000)


@pytest.mark.parametrize("weights", MIXTURES)
@pytest.mark.parametrize("first", [0, 777])
def test_every_prefix_has_each_source_to_within_one_sequence(weights, first):
    order = order_of(weights, first=first)
    sources = order.sources(first + NUMBERS)
    for source, weight in enumerate(weights.values()):
        share = exact(weight)
        taken = np.cumsum(sources == source)
        expected = (NUMBERS + 1) * share.numerator  # over the denominator
        assert np.abs(expected - taken * share.denominator).max() < share.denominator


def test_random_mixtures_have_their_shares_too():
    chance = np.random.default_rng(0)
    for _ in range(60):
        parts = chance.multinomial(1000, chance.dirichlet(np.ones(chance.integers(2, 12))))
        table = quota_table(tuple(Fraction(int(part), 1000) for part in parts))
        taken = np.cumsum(table[:, None] == np.arange(len(parts)), axis=0)  # [period, sources]
        exactly = (np.arange(len(table))[:, None] + 1) * parts / 1000
        assert np.abs(taken - exactly).max() < 1 - 1e-9
        assert taken[-1].tolist() == (parts * len(table) // 1000).tolist()


def test_the_order_never_changes():
    assert quota_table((Fraction(1, 3),) * 3).tolist() == [0, 1, 2]
    order = SequenceOrder(4, "abc", [Piece(0, {"a": 0.5, "b": 0.3, "c": 0.2})])
    assert order.sources(NUMBERS[:20]).tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2] * 2
    assert order.slots(NUMBERS[:20]).tolist() == [0, 1, 2, 3, 3, 0, 1, 2, 0, 1, 2, 3, 3, 0, 1, 2, 3, 0, 1, 2]


def test_one_source_is_read_by_streams_in_turn():
    for order in (SequenceOrder(5), SequenceOrder(5, ["only"], [Piece(0, {"only": 1.0})])):
        assert order.has_one_source
        assert order.cursor_keys(NUMBERS).tolist() == (NUMBERS % 5).tolist()
        assert order.counts(12).tolist() == [12]


@pytest.mark.parametrize("first", [0, 1, 63, 4999, 123_456_789_012])
def test_an_order_is_a_function_of_the_number_alone(first):
    pieces = [Piece(0, MIXTURES[1]), Piece(100, MIXTURES[2]), Piece(5000, {"a": 0.0, "b": 0.9, "c": 0.1})]
    order = SequenceOrder(7, "abc", pieces)
    numbers = first + NUMBERS[:300]
    keys = order.cursor_keys(numbers)
    assert keys.tolist() == [order.cursor_keys(numbers[index : index + 1])[0] for index in range(300)]
    before, after = order.counts(first), order.counts(first + 300)
    assert (after - before).tolist() == np.bincount(keys // 7, minlength=3).tolist()
    if first < 5000:
        assert order.counts_by_stream(first).reshape(3, 7).sum(axis=1).tolist() == before.tolist()
        assert (
            order.counts_by_stream(first).tolist()
            == np.bincount(order.cursor_keys(np.arange(first)), minlength=21).tolist()
        )


def test_weights_that_change_hold_from_their_sequence_on():
    one = SequenceOrder(8, "abc", [Piece(0, MIXTURES[1])])
    two = SequenceOrder(8, "abc", [Piece(0, MIXTURES[1]), Piece(96, {"a": 0.0, "b": 0.5, "c": 0.5})])
    assert two.slots(NUMBERS[:96]).tolist() == one.slots(NUMBERS[:96]).tolist()
    assert two.sources(NUMBERS[:80]).tolist() == one.sources(NUMBERS[:80]).tolist()
    assert (two.sources(NUMBERS[96:]) == 0).sum() <= 1  # what it was owed
    assert np.abs(two.counts(1096) - [96 * 0.7, 96 * 0.2 + 500, 96 * 0.1 + 500]).max() < 1


def test_every_prefix_is_exact_also_where_weights_change():
    chance = np.random.default_rng(0)
    for _ in range(60):
        names = "abcdefg"[: chance.integers(2, 8)]
        firsts = np.cumsum([int(chance.integers(0, most)) + 1 for most in chance.choice([5, 60, 900], 5)])
        shares = chance.multinomial(100, chance.dirichlet(np.ones(len(names)) * 0.7), size=5)  # percents
        pieces = [
            Piece(int(first), {name: percent / 100 for name, percent in zip(names, row)})
            for first, row in zip(firsts, shares.tolist())
        ]
        order = SequenceOrder(8, names, pieces)
        numbers = np.arange(firsts[0], firsts[-1] + 500)
        sources = order.sources(numbers)
        taken = np.cumsum(sources[:, None] == np.arange(len(names)), axis=0)  # [sequences, sources]
        exactly = np.cumsum(shares[np.searchsorted(firsts, numbers, side="right") - 1], axis=0)
        assert np.abs(100 * taken - exactly).max() < 100
        for number in chance.integers(firsts[0], numbers[-1], 5).tolist():
            assert (
                order.counts(number).tolist()
                == np.bincount(sources[: number - firsts[0]], minlength=len(names)).tolist()
            )
            assert order.sources(np.array([number]))[0] == sources[number - firsts[0]]


@pytest.mark.parametrize("weights", MIXTURES)
@pytest.mark.parametrize("size, streams", [(8, 64), (96, 64), (256, 64), (12, 20), (500, 8)])
def test_ranks_have_equally_many_sequences_of_each_batch(weights, size, streams):
    order = order_of(weights, streams, first=3 * size)
    for world_size in (2, 4):
        for step in range(300):
            assert sequences_per_rank(step * size, size, order, world_size) == [size // world_size] * world_size
        assert micro_batch_count(size * 7, size, order, world_size, size // world_size) == 1


@pytest.mark.parametrize("weights", MIXTURES)
def test_streams_of_a_source_advance_equally(weights):
    order = order_of(weights)
    numbers = np.arange(1 << 18)
    keys = order.cursor_keys(numbers)
    for source in range(len(weights)):
        own = numbers[keys // 64 == source], keys[keys // 64 == source] % 64
        for end in range(1 << 12, 1 << 18, 1 << 12):
            taken = np.bincount(own[1][: np.searchsorted(own[0], end)], minlength=64)
            assert taken.max() - taken.min() <= 20  # of 4096 sequences that a slot has in the end


def test_streams_of_a_source_are_equal_after_a_cycle_of_all_shifts():
    order = SequenceOrder(6, "abc", [Piece(0, {"a": 0.5, "b": 0.3, "c": 0.2})])
    cycle = 6 * order._shifts[0].repeats * 6  # sequences of so many rounds for each slot
    taken = np.bincount(order.cursor_keys(np.arange(cycle)), minlength=18).reshape(3, 6)
    assert taken.tolist() == [[cycle * share // 60] * 6 for share in (5, 3, 2)]
